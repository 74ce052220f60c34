"""CUDA graphs: work captured once and replayed with one launch."""

import warnings
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import cache

import torch
from torch import Tensor

from gptlit.errors import reason_of


class CudaGraphCapturer:
    """Captures work on a stream that no other capturer uses at the same time.

    cuBLAS keeps its workspace per stream, captured graphs contain its address, and torch frees it together with the
    first graph of that stream. So all graphs of one capturer must be dropped together.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream: torch.cuda.Stream | None = None
        if device.type != "cuda":
            return
        idle = idle_streams(device)
        self.stream = idle.pop() if idle else torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        weakref.finalize(self, idle.append, self.stream)

    def capture(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Capture `work` and return a function that replays it into the memory of one result.

        `work` runs once before the capture. Returns `work` itself on a device other than CUDA, and, with a warning, if
        capturing fails.
        """
        if self.stream is None:
            return work
        try:
            self._warm_up(work, self.stream)
            return self._captured(work, self.stream)
        except RuntimeError as error:  # out of memory, an old driver, …
            warnings.warn(f"sampling continues without a CUDA graph, more slowly: {reason_of(error)}", stacklevel=2)
            end_failed_capture(self.stream.device)
            return work

    @staticmethod
    def _warm_up(work: Callable[[], Tensor], stream: torch.cuda.Stream) -> None:
        """Run `work` once on the stream: libraries allocate on first use, which cannot be captured."""
        before = torch.cuda.current_stream(stream.device)
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            work()
        before.wait_stream(stream)

    def _captured(self, work: Callable[[], Tensor], stream: torch.cuda.Stream) -> Callable[[], Tensor]:
        graph = torch.cuda.CUDAGraph()
        # The outer context restores the stream even if capturing fails, which the inner one does not.
        # `thread_local`: other threads, such as a data loader's, may allocate memory meanwhile.
        with (
            torch.cuda.stream(stream),
            torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"),
        ):
            result = work()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


def end_failed_capture(device: torch.device) -> None:
    """Capture a trivial graph on another stream after a failed capture.

    Until a capture succeeds, torch treats its random generator as captured and refuses to draw numbers.
    """
    stream = CudaGraphCapturer(device).stream
    with suppress(RuntimeError), torch.cuda.stream(stream), torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
        torch.zeros((), device=device)


@cache
def idle_streams(device: torch.device) -> list[torch.cuda.Stream]:
    """Return the streams of deleted capturers, for reuse: each keeps a workspace of tens of megabytes."""
    return []
