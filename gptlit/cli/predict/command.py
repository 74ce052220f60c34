"""`gptlit predict`: text drawn from a checkpoint alone, streamed to stdout or written to a file."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from io import TextIOWrapper
from pathlib import Path
from typing import Any, Literal, TextIO

import lightning.pytorch as pl
import torch
from jsonargparse import Namespace
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from gptlit.checkpoint.files import find_checkpoint, read_checkpoint
from gptlit.checkpoint.run_dir import first_process
from gptlit.cli.messages import say
from gptlit.cli.parser import Parser, option_names, parse
from gptlit.cli.predict.prompts import Prompt, Prompts, begin, is_jsonl, read_prompts
from gptlit.cli.settings import check_config, values_of
from gptlit.cli.streams import drop_the_rest
from gptlit.device.memory import keep_freed_memory
from gptlit.device.processes import leave_process_group
from gptlit.errors import UserError
from gptlit.generation.generate import Sampling
from gptlit.generation.text import GenerationConfig
from gptlit.training.module import load_model

BETWEEN_SAMPLES = "\n---------------\n"


def make_parser() -> Parser:
    """The flags of `gptlit predict`."""
    parser = Parser(prog="gptlit predict", description="Draw text from a trained model.", exit_on_error=False)
    parser.add_argument("-c", "--config", action="config", help="YAML file with any of these options.")
    parser.add_argument("--ckpt_path", type=str | None, help="Run folder (its best.ckpt) or checkpoint file.")
    parser.add_argument(
        "--prompt",
        type=str | None,
        help="Text to continue; `-` reads it from stdin, `FILE:path` from a file. Without it, a new line begins.",
    )
    parser.add_argument(
        "--prompts",
        type=str | None,
        help='File of prompts, one a line, or JSONL with {"prompt": …}; `-` is stdin, of either kind.',
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


def predict(verb: str, arguments: list[str]) -> int:  # noqa: C901
    """Draws the texts; returns the exit code."""
    keep_freed_memory()
    parser = make_parser()
    for config in values_of(arguments, "--config", "-c"):
        check_config(config, option_names(parser))
    options = parse(parser, arguments)
    sampling = Sampling(**{name: options[name] for name in ("temperature", "top_k", "top_p", "min_p")})
    if options.ckpt_path is None:
        raise UserError("gptlit predict needs --ckpt_path: a run folder or a checkpoint file")
    for name in ("max_new_tokens", "num_samples"):
        if options[name] < 1:
            raise UserError(f"--{name} is {options[name]}: it must be 1 or more")
    stop = tuple(options.stop or ())
    if "" in stop:
        raise UserError("--stop is empty: give the text to stop before, or leave it out")
    first = first_process()  # the others are handed its prompts, and write nothing
    texts = read_prompts(options.prompt, options.prompts) if first else []

    model = load_model(read_checkpoint(find_checkpoint(options.ckpt_path, "best")))
    model.generation_config = GenerationConfig(
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
    writer = TextWriter(options)
    trainer = make_trainer(options.trainer, writer)
    with open_output(options.output) if first else open(os.devnull, "w", encoding="utf-8") as writer.file:
        for prompt, text in zip(prompts, texts, strict=True):
            if not prompt.text:
                say_how_it_begins(prompt, text is not None, model.tokenizer.decode(prompt.ids))
        try:
            trainer.predict(model, datamodule=Prompts(prompts, options.num_samples), return_predictions=False)
        except BrokenPipeError:
            raise
        except OSError as error:
            if error.strerror is None:
                raise
            say(f"gptlit: {options.output or 'stdout'} cannot be written: {error.strerror}")
            drop_the_rest(writer.file)
            return 1
    leave_process_group()
    return 0


def say_how_it_begins(prompt: Prompt, given: bool, start: str) -> None:
    """Names, on stderr, what the model reads in the place of a prompt that is empty or was not given."""
    who = f"prompt {prompt.index + 1} is empty: it" if given else "no --prompt: the text"
    what = "a new line" if start == "\n" else repr(start)
    say(f"{who} begins with {what}")


def make_trainer(settings: Namespace, writer: "TextWriter") -> pl.Trainer:
    """A Trainer that only predicts.

    Raises:
        UserError: when the machine has not what the settings name.
    """
    try:
        return pl.Trainer(
            **vars(settings),
            callbacks=[writer],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
    except (MisconfigurationException, ModuleNotFoundError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"the Trainer does not take these trainer settings: {error}") from error


@contextmanager
def open_output(path: str | None) -> Iterator[TextIO]:
    """The file to write, or stdout. A new file in which nothing was written is removed after a failure.

    Raises:
        UserError: when the file exists or cannot be made.
    """
    if path is None:
        if sys.stdout is None:
            raise UserError("stdout is closed: give --output FILE")
        if isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8", newline="\n")
        yield sys.stdout
        return
    try:
        file = open(path, "x", encoding="utf-8", newline="\n")  # noqa: SIM115  closed below, whatever comes
    except FileExistsError as error:
        raise UserError(f"--output {path}: the file exists: choose another name") from error
    except OSError as error:
        raise UserError(f"--output {path}: {error.strerror}: choose another place") from error
    try:
        with file:
            yield file
    except BaseException:
        if Path(path).is_file() and not Path(path).stat().st_size:
            Path(path).unlink()
        raise


class TextWriter(pl.Callback):
    """Writes the texts in the order of the prompts; the first of a group appears while it is drawn."""

    file: TextIO

    def __init__(self, options: Namespace) -> None:
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
        drawing: GenerationConfig = pl_module.generation_config
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
