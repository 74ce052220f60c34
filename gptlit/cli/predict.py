"""`gptlit predict`: text drawn from a checkpoint alone, streamed to stdout or written to a file."""

import json
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

import lightning.pytorch as pl
import torch
from jsonargparse import ArgumentParser, Namespace
from torch.utils.data import DataLoader

from gptlit.cli.messages import parser_error_line, say
from gptlit.cli.runs import find_checkpoint, load_model, read_checkpoint
from gptlit.drawing import Drawing
from gptlit.errors import UserError
from gptlit.sampling import Sampling
from gptlit.tokenizer import Tokenizer

BETWEEN_SAMPLES = "\n---------------\n"
ROWS_AT_ONCE = 64  # texts drawn side by side: beyond this a CPU gains nothing


@dataclass(frozen=True)
class Prompt:
    """One prompt: its place in the order, its text, and the ids that the model begins with."""

    index: int
    text: str
    ids: list[int]


def make_parser() -> ArgumentParser:
    """The flags of `gptlit predict`."""
    parser = ArgumentParser(prog="gptlit predict", description="Draw text from a trained model.", exit_on_error=False)
    parser.add_argument("-c", "--config", action="config", help="YAML file with any of these options.")
    parser.add_argument("--ckpt_path", type=str | None, help="Run folder (its best.ckpt) or checkpoint file.")
    parser.add_argument(
        "--prompt",
        type=str | None,
        help="Text to continue; `-` reads it from stdin, `FILE:path` from a file. Without it, a new line begins.",
    )
    parser.add_argument(
        "--prompts", type=str | None, help='File of prompts, one a line, or JSONL with {"prompt": …}; `-` is stdin.'
    )
    parser.add_argument("--max_new_tokens", type=int, default=500, help="Tokens drawn for each text.")
    parser.add_argument("--num_samples", type=int, default=1, help="Texts drawn for each prompt.")
    parser.add_argument("--seed", type=int, default=1337, help="Sample k of a seed is the same text in any company.")
    parser.add_class_arguments(Sampling, None)
    parser.add_argument("--stop", type=str, action="append", help="Text to stop before; may be given several times.")
    parser.add_argument(
        "--context",
        type=Literal["exact", "rolling"],
        default="exact",
        help="Beyond block_size: read the last block_size tokens anew for every token, or (rolling, fast, "
        "approximate) keep half of the cache.",
    )
    parser.add_argument(
        "--unknown", type=str, default="error", help="Unknown characters of a prompt: error, skip or replace:C."
    )
    parser.add_argument("--repeat_prompt", type=bool, default=True, help="Print the prompt before the text.")
    parser.add_argument(
        "--output", type=str | None, help="Write to this file: JSONL with log-probabilities if it ends so, else text."
    )
    parser.add_argument("--trainer.accelerator", type=str, default="auto", help="As of the Lightning Trainer.")
    parser.add_argument("--trainer.devices", type=int | str, default=1, help="Devices that share the prompts.")
    parser.add_argument("--trainer.strategy", type=str, default="auto", help="As of the Lightning Trainer.")
    parser.add_argument("--trainer.num_nodes", type=int, default=1, help="As of the Lightning Trainer.")
    parser.add_argument("--trainer.precision", type=str, default="32-true", help="As of the Lightning Trainer.")
    return parser


def predict(verb: str, arguments: list[str]) -> int:
    """Draws the texts; returns the exit code."""
    parser = make_parser()
    try:
        options = parser.parse_args(arguments)
        sampling = Sampling(**{name: options[name] for name in ("temperature", "top_k", "top_p", "min_p")})
    except (ArgumentError, TypeError, ValueError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(parser_error_line(error, [action.dest for action in parser._actions])) from error
    if options.ckpt_path is None:
        raise UserError("gptlit predict needs --ckpt_path: a run folder or a checkpoint file")
    for name in ("max_new_tokens", "num_samples"):
        if options[name] < 1:
            raise UserError(f"--{name} is {options[name]}: it must be 1 or more")
    stop = tuple(options.stop or ())
    if "" in stop:
        raise UserError("--stop is empty: give the text to stop before, or leave it out")
    texts = read_prompts(options.prompt, options.prompts)

    model = load_model(read_checkpoint(find_checkpoint(options.ckpt_path, "best")))
    model.drawing = Drawing(
        max_new_tokens=options.max_new_tokens,
        sampling=sampling,
        num_samples=options.num_samples,
        seed=options.seed,
        context=options.context,
        stop=stop,
        log_probabilities=is_jsonl(options.output),
    )
    assert model.tokenizer is not None
    prompts = [begin(index, text, model.tokenizer, options.unknown) for index, text in enumerate(texts)]
    with open_output(options.output) as file:
        writer = TextWriter(file, options)
        trainer = pl.Trainer(
            **vars(options.trainer),
            callbacks=[writer],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        trainer.predict(model, datamodule=Prompts(prompts, options.num_samples), return_predictions=False)
    return 0


def read_prompts(prompt: str | None, prompts: str | None) -> list[str | None]:
    """The prompts in order; None where none was given and a new line begins.

    Raises:
        UserError: when both are given, a file cannot be read, or a line of JSONL has no prompt.
    """
    if prompt is not None and prompts is not None:
        raise UserError("--prompt and --prompts exclude each other: give one of them")
    if prompts is None:
        if prompt == "-":
            return [sys.stdin.read()]
        if prompt is not None and prompt.startswith("FILE:"):
            return [read_text(prompt.removeprefix("FILE:"), "--prompt")]
        return [prompt]
    lines = (sys.stdin.read() if prompts == "-" else read_text(prompts, "--prompts")).splitlines()
    if not lines:
        raise UserError(f"--prompts {prompts}: there is no line in it")
    if not is_jsonl(prompts):
        return list(lines)
    found: list[str | None] = []
    for number, line in enumerate(lines, 1):
        try:
            text = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f'--prompts {prompts}, line {number}: this is not JSON with a "prompt"') from error
        if not isinstance(text, str):
            raise UserError(f'--prompts {prompts}, line {number}: "prompt" must be a text')
        found.append(text)
    return found


def read_text(path: str, flag: str) -> str:
    """A UTF-8 file, byte order mark dropped."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{flag} {path}: not UTF-8 at byte {error.start}: convert it first") from error
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror}: name a file that can be read") from error


def begin(index: int, text: str | None, tokenizer: Tokenizer, unknown: str) -> Prompt:
    """Encodes a prompt; an empty one begins with a new line, and says so."""
    ids = tokenizer.encode(text or "", unknown=unknown)
    if ids:
        return Prompt(index, text or "", ids)
    try:
        ids, start = tokenizer.encode("\n"), "a new line"
    except UserError:
        ids, start = [0], repr(tokenizer.decode([0]))
    if text is not None:
        say(f"prompt {index + 1} is empty: it begins with {start}")
    return Prompt(index, "", ids)


def is_jsonl(path: str | None) -> bool:
    """Whether a file's name says that each of its lines is JSON."""
    return path is not None and path.endswith((".jsonl", ".ndjson"))


def open_output(path: str | None) -> TextIO:
    """The file to write, or stdout.

    Raises:
        UserError: when the file exists or cannot be made.
    """
    if path is None:
        sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
        return open(sys.stdout.fileno(), "w", encoding="utf-8", closefd=False, newline="\n")
    try:
        return open(path, "x", encoding="utf-8", newline="\n")
    except FileExistsError as error:
        raise UserError(f"--output {path}: the file exists: choose another name") from error
    except OSError as error:
        raise UserError(f"--output {path}: {error.strerror}: choose another place") from error


class Prompts(pl.LightningDataModule):
    """Groups of prompts, dealt out to the devices in turn."""

    def __init__(self, prompts: Sequence[Prompt], num_samples: int) -> None:
        super().__init__()
        self.prompts, self.num_samples = prompts, num_samples

    def predict_dataloader(self) -> DataLoader[Any]:
        """The groups of this process; an empty one where there are fewer groups than processes."""
        assert self.trainer is not None
        share = -(-len(self.prompts) // self.trainer.world_size)
        size = max(1, min(share, ROWS_AT_ONCE // self.num_samples))
        groups = [list(self.prompts[first : first + size]) for first in range(0, len(self.prompts), size)]
        own: Any = groups[self.trainer.global_rank :: self.trainer.world_size] or [[]]
        return DataLoader(own, batch_size=None, collate_fn=list)

    def transfer_batch_to_device(self, batch: list[Prompt], device: torch.device, dataloader_idx: int) -> list[Prompt]:
        """Prompts are lists; the model puts them where it reads them."""
        return batch


class TextWriter(pl.Callback):
    """Writes the texts in the order of the prompts; the first of a group appears while it is drawn."""

    def __init__(self, file: TextIO, options: Namespace) -> None:
        self.file = file
        self.jsonl = is_jsonl(options.output)
        self.repeat_prompt = options.repeat_prompt
        self.settings = {"max_new_tokens": options.max_new_tokens, "context": options.context}
        self.results: list[dict[str, Any]] = []
        self.written = 0

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: list[Prompt],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draws, as the stream is read, and writes."""
        if not batch:
            return
        alone = trainer.world_size == 1
        live = alone and not self.jsonl
        drawing: Drawing = pl_module.drawing
        if live:
            self._between()
            self.file.write(batch[0].text if self.repeat_prompt else "")
            self.file.flush()
        for pieces in outputs.steps():
            if live and pieces[0]:
                self.file.write(pieces[0])
                self.file.flush()
        for number, row in enumerate(outputs.rows):
            prompt = batch[number // drawing.num_samples]
            sample = number % drawing.num_samples
            result = {
                "prompt": prompt.text,
                "sample": sample,
                "text": row.text,
                "seed": drawing.seed,
                "sampling": asdict(drawing.sampling),
                **self.settings,
                "tokens": row.tokens,
                "log_probabilities": row.log_probabilities,
            }
            if not alone:
                self.results.append({"order": (prompt.index, sample), **result})
            elif not (live and number == 0):
                self._write(result)
        if live:
            self.file.flush()

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Brings the texts of several devices into order, and ends the last line."""
        if trainer.world_size > 1:
            gathered: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(gathered, self.results)
            if not trainer.is_global_zero:
                return
            for result in sorted((r for part in gathered for r in part), key=lambda r: r["order"]):
                del result["order"]
                self._write(result)
        if not self.jsonl:
            self.file.write("\n")
        self.file.flush()

    def _write(self, result: dict[str, Any]) -> None:
        if self.jsonl:
            self.file.write(json.dumps(result, ensure_ascii=False) + "\n")
            return
        self._between()
        self.file.write((result["prompt"] if self.repeat_prompt else "") + result["text"])

    def _between(self) -> None:
        if self.written:
            self.file.write(BETWEEN_SAMPLES)
        self.written += 1
