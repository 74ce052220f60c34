"""CUDA graphs: work captured once and replayed with one launch."""

import warnings
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import cache as cached
from typing import TypeVar

import torch
from torch import Tensor

from gptlit.errors import reason_of

Result = TypeVar("Result")


class Recorder:
    """Records work on a GPU, all of it on one stream that no other recorder uses in the meantime.

    For matrix products have scratch memory that belongs to the stream, recordings keep its address, and torch frees it
    with the first recording of that stream that is dropped: those of a recorder must be dropped together.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream: torch.cuda.Stream | None = None
        if device.type != "cuda":
            return
        idle = idle_streams(device)
        self.stream = idle.pop() if idle else torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        weakref.finalize(self, idle.append, self.stream)

    def record(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """What does the same as `work`, at one launch, into the memory of one result; it is run once on the way.

        That is `work` itself on another device, and where recording fails.
        """
        if self.stream is None:
            return work
        try:
            self.warm_up(work)
            return self.capture(work)
        except RuntimeError as error:  # out of memory, an old driver: slower is better than not at all
            warnings.warn(f"sampling goes on without a CUDA graph, and slower: {reason_of(error)}", stacklevel=2)
            close_attempt(self.stream.device)
            return work

    def warm_up(self, work: Callable[[], object]) -> None:
        """Runs `work` on the stream: libraries set themselves up when first used, which cannot be recorded."""
        if self.stream is None:
            work()
            return
        before = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(before)
        with torch.cuda.stream(self.stream):
            work()
        before.wait_stream(self.stream)

    def capture(self, work: Callable[[], Result]) -> Callable[[], Result]:
        """What does the same as `work`, which is recorded and not run; `work` itself on another device.

        Raises:
            RuntimeError: when `work` does what cannot be recorded, such as waiting for the device.
        """
        if self.stream is None:
            return work
        graph = torch.cuda.CUDAGraph()
        # The outer context puts the old stream back even when recording fails, which the inner one then does not.
        # Other threads, such as a data loader's, may allocate memory in the meantime.
        with (
            torch.cuda.stream(self.stream),
            torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"),
        ):
            result = work()

        def play() -> Result:
            graph.replay()
            return result

        return play


def close_attempt(device: torch.device) -> None:
    """Records next to nothing after a recording that failed, on a stream whose scratch memory nobody uses.

    Until one ends well, torch holds its random numbers to be part of a recording, and refuses to draw any outside.
    """
    stream = Recorder(device).stream
    with suppress(RuntimeError), torch.cuda.stream(stream), torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
        torch.zeros((), device=device)


@cached
def idle_streams(device: torch.device) -> list[torch.cuda.Stream]:
    """Streams that recorders have left behind. Used again, since each keeps scratch memory of tens of megabytes."""
    return []
