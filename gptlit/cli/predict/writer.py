"""Output of `gptlit predict`: text while it is sampled, or one JSON object per sample."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

from gptlit.cli.predict.prompts import Prompt, is_jsonl
from gptlit.errors import UserError
from gptlit.generation.text import GeneratedText, GenerationConfig

BETWEEN_SAMPLES = "\n---------------\n"


class TextWriter:
    """Writes samples in the order of the prompts. Implements `gptlit.generation.TextSink`.

    The first sample of each batch is written while it is sampled, except to JSONL.

    Args:
        file: where to write.
        config: what is generated.
        output: path of the file, whose ending selects JSONL; None is stdout.
        repeat_prompt: write the prompt before each text.
    """

    def __init__(self, file: TextIO, config: GenerationConfig, output: str | None, repeat_prompt: bool) -> None:
        self.file, self.config, self.repeat_prompt = file, config, repeat_prompt
        self.jsonl = is_jsonl(output)
        self.ordered = True  # False if other ranks generate samples too: keep results for `write_all`
        self.results: list[dict[str, Any]] = []
        self.written = 0

    @property
    def live(self) -> bool:
        """Whether the first sample of a batch is written while it is sampled."""
        return self.ordered and not self.jsonl

    def begin(self, batch: Sequence[Prompt]) -> None:
        """Write the first prompt of a batch, before the model reads it."""
        if batch and self.live:
            self._separate()
            self.write(0, batch[0].text if self.repeat_prompt else "")

    def write(self, row: int, text: str) -> None:
        """Write text of the first sample of the batch at once."""
        if row == 0 and self.live:
            self.file.write(text)
            self.file.flush()

    def end(self, batch: Sequence[Prompt], rows: Sequence[GeneratedText]) -> None:
        """Write the other samples of the batch, or keep all of them."""
        config = self.config
        for number, row in enumerate(rows):
            prompt, sample = batch[number // config.num_samples], number % config.num_samples
            result = {
                "prompt": prompt.text,
                "sample": sample,
                "text": row.text,
                "seed": config.seed,
                "sampling": asdict(config.sampling),
                "max_new_tokens": config.max_new_tokens,
                "context": config.context,
                "weights_dtype": config.weights_dtype,
                "tokens": row.tokens,
                "log_probabilities": row.log_probabilities,
            }
            if not self.ordered:
                self.results.append({"order": (prompt.index, sample), **result})
            elif not (self.live and number == 0):
                self._write(result)
        if self.live:
            self.file.flush()

    def write_all(self, results: Sequence[dict[str, Any]]) -> None:
        """Write the results of all ranks in order."""
        for result in sorted(results, key=lambda result: result["order"]):
            self._write({name: value for name, value in result.items() if name != "order"})

    def close(self) -> None:
        """End the last line."""
        if not self.jsonl:
            self.file.write("\n")
        self.file.flush()

    def _write(self, result: dict[str, Any]) -> None:
        if self.jsonl:
            self.file.write(json.dumps(result, ensure_ascii=False) + "\n")
            return
        self._separate()
        self.file.write((result["prompt"] if self.repeat_prompt else "") + result["text"])

    def _separate(self) -> None:
        if self.written:
            self.file.write(BETWEEN_SAMPLES)
        self.written += 1


@contextmanager
def open_output(path: str | None) -> Iterator[TextIO]:
    """Open the file to write, or stdout. A new file is removed after a failure if nothing was written to it.

    Raises:
        UserError: if the file exists or cannot be created.
    """
    if path is None:
        if sys.stdout is None:
            raise UserError("stdout is closed: give --output FILE")
        if isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8", newline="\n")
        yield sys.stdout
        return
    try:
        file = open(path, "x", encoding="utf-8", newline="\n")  # noqa: SIM115  closed below
    except FileExistsError as error:
        raise UserError(f"{path}: the file exists: choose another name", "output") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: choose another place", "output") from error
    try:
        with file:
            yield file
    except BaseException:
        if Path(path).is_file() and not Path(path).stat().st_size:
            Path(path).unlink()
        raise
