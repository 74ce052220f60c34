"""The command: `run` hands a verb to its room and turns mistakes of the user into one line and exit code 2."""

import os
import sys
from collections.abc import Sequence

from gptlit.errors import UserError

TRAINING_VERBS = ("fit", "validate", "test")


def run(verb: str, arguments: Sequence[str]) -> int:
    """Runs `gptlit VERB ARGUMENTS`; returns the exit code.

    0 done · 2 a mistake of the user · 130 stopped by SIGINT · 143 stopped by SIGTERM. Anything else that goes wrong is
    ours and keeps its traceback (exit code 1).
    """
    from gptlit.cli.messages import quiet_libraries

    quiet_libraries()
    try:
        if verb in TRAINING_VERBS:
            from gptlit.cli.training import train as command
        elif verb == "ladder":
            from gptlit.cli.ladder import ladder as command
        elif verb == "export":
            from gptlit.cli.export import export as command
        else:
            from gptlit.cli.predict import predict as command
        return command(verb, list(arguments))
    except UserError as error:
        print(f"gptlit: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of a pipe (`gptlit predict | head`) has gone; that is not an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
