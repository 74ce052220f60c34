"""Files that are kept between two starts: their folder, small records, a lock, and a progress bar."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from gptlit.checkpoint.atomic import atomic_write
from gptlit.errors import UserError

FORMAT = 2  # of what is kept; a new number puts everything older out of use


def cache_folder() -> Path:
    """Return the folder of everything that is kept: `$XDG_CACHE_HOME/gptlit`, by default `~/.cache/gptlit`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "gptlit"


def token_folder() -> Path:
    """Return `<cache>/tokens`, created if need be.

    Raises:
        UserError: it cannot be written.
    """
    folder = cache_folder() / "tokens"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot use {folder} ({error.strerror}): set XDG_CACHE_HOME to another folder") from error
    return folder


@contextmanager
def building(path: Path) -> Iterator[None]:
    """Let one process at a time build the file at `path`; the others wait, and then find it."""
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=1)
    except Timeout:
        console().print(f"waiting for another process that builds {path}")
        lock.acquire()
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): set XDG_CACHE_HOME to another folder") from error
    try:
        yield
    finally:
        lock.release()


def hash_of(*things: object) -> str:
    """Return 32 hexadecimal digits, a function of numbers, strings and lists of them."""
    return hashlib.sha256(json.dumps(things).encode()).hexdigest()[:32]


def console() -> Console:
    """Return a console on stderr; stdout is for sampled text alone."""
    return Console(stderr=True, soft_wrap=True, highlight=False)


@contextmanager
def progress(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show a bar on a terminal, one line at the end elsewhere; gives the function that advances it."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(20),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console(), refresh_per_second=4) as bar:
        task = bar.add_task(label, total=total)
        yield lambda amount: bar.advance(task, amount)
        bar.update(task, total=bar.tasks[0].completed)


def write_record(path: Path, fields: dict[str, Any]) -> None:
    """Write a small JSON file with its own checksum, atomically, also where several threads write the same."""
    content = json.dumps(fields).encode()
    with atomic_write(path) as stream:
        stream.write(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)


def read_record(path: Path) -> dict[str, Any] | None:
    """Return what `write_record` wrote, or None when it is missing or damaged."""
    try:
        digest, _, content = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    return json.loads(content) if hashlib.sha256(content).hexdigest().encode() == digest else None
