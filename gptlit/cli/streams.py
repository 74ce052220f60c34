"""Output streams that do not fail when the pipe or terminal is closed, or the disk is full."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from typing import Any, TextIO, cast


def drop_the_rest(stream: Any) -> None:
    """Redirect a failed stream to os.devnull: its buffer would fail again when Python exits (exit code 120)."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class LastingStream:
    """A text stream that drops its output after an `OSError`.

    A run must not end because the terminal was closed, or because of `2>&1 | head`.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return int(self._stream.write(text))
        except OSError:
            drop_the_rest(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            drop_the_rest(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lasting_stderr() -> Iterator[None]:
    """Context in which writing to stderr cannot fail, even if the process was started without one."""
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,  # takes descriptor 2, if that is free
        redirect_stderr(cast(TextIO, LastingStream(sys.stderr or nowhere))),
    ):
        yield
