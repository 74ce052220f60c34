"""Atomic writes: a file or a folder appears under its name only when it is complete and on the disk."""

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO


def partial_path(target: Path) -> Path:
    """Return a hidden name next to `target`, unique to this thread. `.*.partial` matches it."""
    return target.with_name(f".{target.name}.{os.getpid()}-{threading.get_ident()}.partial")


@contextmanager
def atomic_write(target: str | Path) -> Iterator[BinaryIO]:
    """Open a binary file that replaces `target` when the block ends without an error.

    The bytes go to a temporary file in the same folder, which is made if need be. Other processes see the old file or
    the new one, never a part. After an error or a kill the old file is unchanged.

    Args:
        target: file to write.

    Yields:
        A binary stream.

    Raises:
        OSError: of any file operation; its `filename` is `target`.
    """
    target = Path(target)
    partial = partial_path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            yield stream
            flush_to_disk(stream)
        rename(partial, target)
    except OSError as error:
        if error.filename in (None, str(partial), partial):
            raise OSError(error.errno, error.strerror or str(error), str(target)) from error
        raise
    finally:
        with suppress(OSError):
            partial.unlink()


def atomic_write_text(target: str | Path, text: str) -> None:
    """Replace a file with a text in UTF-8, as `atomic_write`. Line ends stay as they are."""
    with atomic_write(target) as stream:
        stream.write(text.encode())


@contextmanager
def atomic_folder(target: str | Path) -> Iterator[Path]:
    """Create a folder that gets the name `target` when the block ends without an error.

    Args:
        target: folder to make. It may exist if it is empty.

    Yields:
        An empty temporary folder next to it. Files in it get the permissions that the umask of this process gives,
        whatever a library set.

    Raises:
        OSError: of any file operation.
    """
    target = Path(target)
    partial = partial_path(target)
    try:
        partial.mkdir(parents=True)
        yield partial
        mode = partial.stat().st_mode & 0o666
        for path in partial.rglob("*"):
            if path.is_file():
                path.chmod(mode)
        if target.is_dir():
            target.rmdir()
        rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def rename(partial: Path, target: Path) -> None:
    """Rename a file or a folder in place of `target`, and wait until the new name is on the disk."""
    os.replace(partial, target)
    with suppress(OSError):  # some systems cannot open or synchronise a folder
        descriptor = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def flush_to_disk(stream: IO[bytes]) -> None:
    """Wait until everything written to a stream is on the disk."""
    stream.flush()
    os.fsync(stream.fileno())
