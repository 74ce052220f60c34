"""The command: `run` hands a verb to its room and turns mistakes of the user into one line and exit code 2."""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from types import FrameType
from typing import Any, TextIO, cast

from gptlit.errors import UserError

TRAINING_VERBS = ("fit", "validate", "test")


def run(verb: str, arguments: Sequence[str]) -> int:
    """Runs `gptlit VERB ARGUMENTS`; returns the exit code.

    0 done · 1 a run could not go on (a full disk, a loss that is no number) · 2 a mistake of the user · 128 + n stopped
    by signal n: 130 by SIGINT, 143 by SIGTERM. Anything else that goes wrong is ours and keeps its traceback (exit
    code 1).
    """
    with lasting_stderr(), exit_on_signals():
        return _run(verb, arguments)


def _run(verb: str, arguments: Sequence[str]) -> int:
    from gptlit.cli.messages import quiet_libraries

    quiet_libraries()
    try:
        if verb in TRAINING_VERBS:
            from gptlit.cli.training import train as command
        elif verb == "ladder":
            from gptlit.cli.ladder import ladder as command
        elif verb == "export":
            from gptlit.cli.export import export as command
        elif verb == "completion":
            from gptlit.cli.completion import completion as command
        else:
            from gptlit.cli.predict import predict as command
        return command(verb, list(arguments))
    except UserError as error:
        from gptlit.cli.runs import started_by_first_process

        if not started_by_first_process():  # which makes the same mistake, and says so
            print(f"gptlit: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of a pipe (`gptlit predict | head`) has gone; that is not an error.
        drop_the_rest(sys.stdout)
        return 0


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


@contextmanager
def exit_on_signals() -> Iterator[None]:
    """Inside, signals that ask to stop raise SystemExit(128 + n), so that what was begun is cleared away.

    While it trains, `gptlit.callbacks.signals` listens instead.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
