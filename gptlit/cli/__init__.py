"""The command: `run` hands a verb to its room and turns mistakes of the user into one line and exit code 2."""

import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from gptlit.cli.streams import drop_the_rest, lasting_stderr
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
            from gptlit.cli.fit.command import train as command
        elif verb == "ladder":
            from gptlit.cli.ladder.command import ladder as command
        elif verb == "export":
            from gptlit.cli.export import export as command
        elif verb == "completion":
            from gptlit.cli.completion import completion as command
        else:
            from gptlit.cli.predict.command import predict as command
        return command(verb, list(arguments))
    except UserError as error:
        from gptlit.checkpoint.run_dir import started_by_first_process

        if not started_by_first_process():  # which makes the same mistake, and says so
            print(f"gptlit: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of a pipe (`gptlit predict | head`) has gone; that is not an error.
        drop_the_rest(sys.stdout)
        return 0


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
