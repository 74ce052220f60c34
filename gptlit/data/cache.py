"""What is kept between two starts: the folder, small records, one maker at a time, and a bar while it is made."""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from gptlit.data.corpus.download import cache_folder
from gptlit.errors import UserError

FORMAT = 1  # of what is kept; a new number leaves everything older aside


def token_folder() -> Path:
    """`<cache>/tokens`, made if need be.

    Raises:
        UserError: when it cannot be written.
    """
    folder = cache_folder() / "tokens"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot use {folder} ({error.strerror}): set XDG_CACHE_HOME to another folder") from error
    return folder


@contextmanager
def building(path: Path) -> Iterator[None]:
    """One process at a time makes what is kept at `path`; the others wait, and then find it."""
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=1)
    except Timeout:
        console().print(f"waiting for another process that makes {path}")
        lock.acquire()
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): set XDG_CACHE_HOME to another folder") from error
    try:
        yield
    finally:
        lock.release()


def hash_of(*things: object) -> str:
    """32 hexadecimal digits, the same for the same numbers, strings and lists of them."""
    return hashlib.sha256(json.dumps(things).encode()).hexdigest()[:32]


def console() -> Console:
    """On stderr, as all that is not text."""
    return Console(stderr=True, soft_wrap=True, highlight=False)


@contextmanager
def progress(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, and one line at the end elsewhere; gives the function that moves it on."""
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
    """A small JSON file with its own checksum, replaced as a whole, also where several threads write the same."""
    content = json.dumps(fields).encode()
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
    temporary.write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
    os.replace(temporary, path)


def read_record(path: Path) -> dict[str, Any] | None:
    """What `write_record` wrote, or None when it is not there or damaged."""
    try:
        digest, _, content = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    return json.loads(content) if hashlib.sha256(content).hexdigest().encode() == digest else None
