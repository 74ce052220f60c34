"""Prompts of `gptlit predict`: from a flag, a file or stdin to ids."""

import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path

from gptlit.errors import UserError
from gptlit.tokenizer import Tokenizer

ROWS_AT_ONCE = 64  # samples per batch; larger batches are no faster on a CPU


@dataclass  # not frozen: a Trainer in another precision copies it field by field
class Prompt:
    """One prompt."""

    index: int
    """Position in the order of the prompts."""
    text: str
    ids: list[int]
    """What the model reads."""


def read_prompts(prompt: str | None, prompts: str | None) -> list[str | None]:
    """Return the prompts in order; None where none was given.

    Args:
        prompt: value of `--prompt`.
        prompts: value of `--prompts`.

    Raises:
        UserError: if both are given, a file cannot be read or holds no prompt, or a line of JSONL has none.
    """
    if prompt is not None and prompts is not None:
        raise UserError("--prompt and --prompts exclude each other: give one of them")
    if prompts is None:
        if prompt == "-":
            return [read_stdin("prompt")]
        if prompt is not None and prompt.startswith("FILE:"):
            return [read_text(prompt.removeprefix("FILE:"), "prompt", "FILE:")]
        return [prompt]
    text = read_stdin("prompts") if prompts == "-" else read_text(prompts, "prompts")
    if not text:
        raise UserError(f"{prompts}: the file is empty: give one prompt per line", "prompts")
    lines = text.removesuffix("\n").split("\n")  # not splitlines: form feeds and the like belong to a prompt
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not any(lines) or (is_jsonl(prompts) and not numbered):
        raise UserError(f"{prompts}: every line is blank: give one prompt per line", "prompts")
    if is_jsonl(prompts):
        return [prompt_of(line, f"{prompts}, line {number}") for number, line in numbered]
    if prompts == "-" and numbered:  # has no ending that tells the format
        with suppress(UserError):
            return [prompt_of(line, "") for _, line in numbered]
    return list(lines)


def prompt_of(line: str, where: str) -> str:
    """Return the prompt in a line of JSON.

    Raises:
        UserError: if there is none.
    """
    try:
        text = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{where}: not JSON with a "prompt"', "prompts") from error
    if not isinstance(text, str):
        raise UserError(f'{where}: "prompt" is not a string', "prompts")
    return text


def read_stdin(setting: str) -> str:
    """Read all of stdin as UTF-8, whatever the terminal's encoding; byte order mark and line ends as `read_text`."""
    if sys.stdin is None:
        raise UserError("-: stdin is closed", setting)
    try:
        if isinstance(sys.stdin, TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict", newline=None)  # \r\n and \r become \n
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(f"-: not UTF-8 at byte {error.start}: convert it first", setting) from error


def read_text(path: str, setting: str, prefix: str = "") -> str:
    """Read a UTF-8 file without the byte order mark; `\\r\\n` and `\\r` become `\\n`, as in a corpus.

    Messages name the file with the prefix that the user typed.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{prefix}{path}: not UTF-8 at byte {error.start}: convert it first", setting) from error
    except OSError as error:
        raise UserError(f"{prefix}{path}: {error.strerror}: name a file that can be read", setting) from error


def encode_prompt(index: int, text: str | None, tokenizer: Tokenizer, unknown: str, start: str = "\n") -> Prompt:
    """Encode a prompt. An empty one becomes `start`, or the first token of a vocabulary that lacks it.

    Args:
        index: position in the order of the prompts.
        text: the prompt; None if none was given.
        tokenizer: of the model.
        unknown: what to do with characters outside the vocabulary, see `Tokenizer.encode`.
        start: text after which a document begins.
    """
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        half, place = error.object[error.start], error.start + 1
        raise UserError(
            f"prompt {index + 1} is not text: {half!r} at character {place} is an unpaired surrogate"
        ) from error
    ids = tokenizer.encode(text or "", unknown=unknown)
    if ids:
        return Prompt(index, text or "", ids)
    try:
        return Prompt(index, "", tokenizer.encode(start))
    except UserError:
        return Prompt(index, "", [0])


def in_batches(prompts: Sequence[Prompt], num_samples: int, world_size: int = 1) -> list[list[Prompt]]:
    """Split prompts into batches of at most 64 samples, or one prompt, and at least one batch per rank if possible."""
    share = -(-len(prompts) // world_size)
    size = max(1, min(share, ROWS_AT_ONCE // num_samples))
    return [list(prompts[first : first + size]) for first in range(0, len(prompts), size)]


def is_jsonl(path: str | None) -> bool:
    """Whether the ending of a path says JSON Lines."""
    return path is not None and path.endswith((".jsonl", ".ndjson"))
