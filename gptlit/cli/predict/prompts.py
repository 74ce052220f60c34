"""Prompts: from a flag, a file or stdin to ids, and dealt out to the devices."""

import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from gptlit.errors import UserError
from gptlit.tokenizer import Tokenizer

ROWS_AT_ONCE = 64  # texts drawn side by side: beyond this a CPU gains nothing


@dataclass  # not frozen: a Trainer in another precision copies it field by field
class Prompt:
    """One prompt: its place in the order, its text, and the ids that the model begins with."""

    index: int
    text: str
    ids: list[int]


def read_prompts(prompt: str | None, prompts: str | None) -> list[str | None]:
    """The prompts in order; None where none was given and a new line begins.

    Raises:
        UserError: when both are given, a file cannot be read, or a line of JSONL has no prompt.
    """
    if prompt is not None and prompts is not None:
        raise UserError("--prompt and --prompts exclude each other: give one of them")
    if prompts is None:
        if prompt == "-":
            return [read_stdin("--prompt")]
        if prompt is not None and prompt.startswith("FILE:"):
            return [read_text(prompt.removeprefix("FILE:"), "--prompt")]
        return [prompt]
    text = read_stdin("--prompts") if prompts == "-" else read_text(prompts, "--prompts")
    if not text:
        raise UserError(f"--prompts {prompts}: there is no line in it")
    lines = text.removesuffix("\n").split("\n")  # not splitlines: form feeds and the like belong to a prompt
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if is_jsonl(prompts):
        return [prompt_of(line, f"--prompts {prompts}, line {number}") for number, line in numbered]
    if prompts == "-":  # has no name that would tell
        with suppress(UserError):
            return [prompt_of(line, "") for _, line in numbered]
    return list(lines)


def prompt_of(line: str, where: str) -> str:
    """The prompt in a line of JSON."""
    try:
        text = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{where}: this is not JSON with a "prompt"') from error
    if not isinstance(text, str):
        raise UserError(f'{where}: "prompt" must be a text')
    return text


def read_stdin(flag: str) -> str:
    """All of stdin, UTF-8 whatever the terminal is set to, byte order mark dropped."""
    if sys.stdin is None:
        raise UserError(f"{flag} -: stdin is closed")
    try:
        if isinstance(sys.stdin, TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(f"{flag} -: not UTF-8 at byte {error.start}: convert it first") from error


def read_text(path: str, flag: str) -> str:
    """A UTF-8 file, byte order mark dropped."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{flag} {path}: not UTF-8 at byte {error.start}: convert it first") from error
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror}: name a file that can be read") from error


def begin(index: int, text: str | None, tokenizer: Tokenizer, unknown: str) -> Prompt:
    """Encodes a prompt; an empty one begins with a new line, or with the first symbol of a vocabulary without it."""
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        half, place = error.object[error.start], error.start + 1
        raise UserError(f"prompt {index + 1} is no text: {half!r} at character {place} is half of one") from error
    ids = tokenizer.encode(text or "", unknown=unknown)
    if ids:
        return Prompt(index, text or "", ids)
    try:
        return Prompt(index, "", tokenizer.encode("\n"))
    except UserError:
        return Prompt(index, "", [0])


def is_jsonl(path: str | None) -> bool:
    """Whether a file's name says that each of its lines is JSON."""
    return path is not None and path.endswith((".jsonl", ".ndjson"))


class Prompts(pl.LightningDataModule):
    """Groups of prompts, dealt out to the devices in turn; the first process has read them."""

    def __init__(self, prompts: Sequence[Prompt], num_samples: int) -> None:
        super().__init__()
        self.prompts, self.num_samples = prompts, num_samples

    def setup(self, stage: str) -> None:
        """Hands the prompts to the other processes: stdin can be read only once."""
        assert self.trainer is not None
        self.prompts = self.trainer.strategy.broadcast(self.prompts)

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
