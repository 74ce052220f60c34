"""The console for everything that a run prints on stderr."""

from functools import cache

from rich.console import Console


@cache
def console() -> Console:
    """Return the one console on stderr.

    All output of a run goes through it. Only then does rich put a line above the progress bar; a second console would
    write into the bar. It follows `sys.stderr` when that is redirected.
    """
    return Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False, force_jupyter=False)
