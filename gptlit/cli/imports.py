"""Imports of large libraries in less time; tests/benchmarks/README.md has the figures."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Context for the first imports of a process: no garbage collection, and afterwards none of what they made.

    The objects of torch and Lightning live as long as the process. Python's collector reads all of them several times
    while they are made, during training, and when Python exits. A process that has torch already keeps its collector
    as it is, since `gc.freeze` would also keep garbage of its own.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
