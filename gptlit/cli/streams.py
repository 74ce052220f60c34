"""stdout and stderr that outlive their reader: a closed pipe, a closed terminal, a full disk."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from typing import Any, TextIO, cast


def drop_the_rest(stream: Any) -> None:
    """What is still in the buffer of a stream that takes no more goes nowhere.

    Else it would fail again when Python ends (exit code 120).
    """
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class LastingStream:
    """A text stream that nothing fails for when its reader goes away, or its disk is full: the rest is dropped.

    A run must not end because the terminal was closed, or because of `2>&1 | head`.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """As of a text stream."""
        try:
            return int(self._stream.write(text))
        except OSError:
            drop_the_rest(self._stream)
            return len(text)

    def flush(self) -> None:
        """As of a text stream."""
        try:
            self._stream.flush()
        except OSError:
            drop_the_rest(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lasting_stderr() -> Iterator[None]:
    """Inside, what is said on stderr cannot fail; nor where the process was started without one."""
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,  # takes descriptor 2, if that is free
        redirect_stderr(cast(TextIO, LastingStream(sys.stderr or nowhere))),
    ):
        yield
