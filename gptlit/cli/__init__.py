"""The command line: `run` dispatches a verb; user errors become one line and exit code 2."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from gptlit.cli.streams import drop_the_rest, lasting_stderr
from gptlit.errors import UserError

TRAINING_VERBS = ("fit", "validate", "test")


def run(verb: str, arguments: Sequence[str], **options: Any) -> int:
    """Run `gptlit VERB ARGUMENTS`.

    Args:
        verb: one of `gptlit.cli.verbs.VERBS`.
        arguments: of the verb.
        **options: passed on to the function of the verb: `extra_callbacks=[…]` for fit.

    Returns:
        The exit code: 0 done; 1 training could not continue (disk full, non-finite loss); 2 user error; 128 + n stopped
        by signal n (130 for SIGINT, 143 for SIGTERM). Any other failure is ours and keeps its traceback (exit code 1).
    """
    with lasting_stderr(), exit_on_signals():
        return dispatch(verb, list(arguments), options)


def dispatch(verb: str, arguments: list[str], options: dict[str, Any]) -> int:
    """Call the function of a verb; user errors become one line and exit code 2."""
    from gptlit.cli.help import describe_fields
    from gptlit.cli.imports import collector_paused

    describe_fields(verb, arguments)
    try:
        with collector_paused():
            function = function_of(verb)
        return function(verb, arguments, **options)
    except UserError as error:
        from gptlit.checkpoint.run_dir import started_by_first_process

        if not started_by_first_process():  # the first process meets the same error and reports it
            flag = "--" if error.setting and not error.setting.startswith("-") else ""
            print(f"gptlit: {flag}{' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of a pipe (`gptlit predict | head`) has gone, which is not an error.
        drop_the_rest(sys.stdout)
        return 0


def function_of(verb: str) -> Callable[..., int]:
    """Import and return the function of a verb."""
    function: Callable[..., int]
    if verb == "predict":  # imports Lightning, and silences it, only where it needs it
        from gptlit.cli.predict.command import predict as function

        return function
    from gptlit.cli.messages import quiet_libraries

    quiet_libraries()
    if verb in TRAINING_VERBS:
        from gptlit.cli.fit.command import train as function
    elif verb == "ladder":
        from gptlit.cli.ladder.command import ladder as function
    elif verb == "compare":
        from gptlit.cli.compare import compare as function
    elif verb == "export":
        from gptlit.cli.export import export as function
    elif verb == "play":
        from gptlit.cli.play import play as function
    else:
        from gptlit.cli.completion import completion as function
    return function


@contextmanager
def exit_on_signals() -> Iterator[None]:
    """Context in which SIGINT, SIGTERM and SIGHUP raise SystemExit(128 + n), so that `finally` blocks clean up.

    A process that the first one has started ends with 0, since Lightning kills the first one with SIGKILL if another
    fails before it, and not before they are connected, since the first one waits for that without reading signals.
    During training, `gptlit.callbacks.signals` handles the signals instead.
    """
    from gptlit.checkpoint.run_dir import started_by_first_process

    started, received = started_by_first_process(), []

    def leave(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if not started or processes_are_connected():
            raise SystemExit(0 if started else 128 + number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, leave)
    try:
        yield
    except Exception:
        if started and received:  # the first process has left
            raise SystemExit(0) from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def processes_are_connected() -> bool:
    """Whether torch has connected this process with others; does not import torch."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()
