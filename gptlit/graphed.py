"""One token on a GPU as one launch: what `Decoder` computes, recorded as a CUDA graph and played again for every id.

A small model's token is a hundred kernels of a few microseconds each, and starting them one by one from Python takes
longer than they do. A recording fixes addresses, shapes and every number that the host knew; so ids and positions are
read from memory that stays where it is, and attention runs over a fixed span of the cache, masked behind each row.

Shapes as in `gptlit.model`: B sequences, T positions, V symbols.
"""

import copy
import warnings
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import cache as cached
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from gptlit.decode import Decoder
from gptlit.errors import reason_of
from gptlit.kv_cache import KVCache

Result = TypeVar("Result")
SHORTEST_SPAN = 64  # positions: attention over fewer takes no less time
RECORDING_PAYS_FROM = 32  # ids: recording takes the time of some ten that are not recorded


class GraphedStep:
    """`GraphedStep(decoder, B)(ids, cache)` is `decoder.step(ids, cache)` for ids (B,): logits (B, V), at one launch.

    The logits are overwritten by the next call. Rows may differ in length. There is one recording for each span of
    the cache that was needed so far: 64 positions, 128, 256 and so on, so that a short text in a long cache does not
    pay for all of it. Another cache begins anew.
    """

    def __init__(self, decoder: Decoder, rows: int) -> None:
        self.decoder = decoder
        self.ids = torch.zeros(rows, dtype=torch.long, device=decoder.tokens.device)
        self.positions = torch.zeros_like(self.ids)
        self.cache: KVCache | None = None
        self.runs: dict[int, Callable[[], Tensor]] = {}  # recordings for this cache, by span

    @staticmethod
    def serves(decoder: Decoder) -> bool:
        """Whether the weights lie on a device that plays recordings, and nothing asks it a question in the middle, as
        writing to the cache may do in a fixed order.
        """
        return decoder.tokens.device.type == "cuda" and not torch.are_deterministic_algorithms_enabled()

    def __call__(self, ids: Tensor, cache: KVCache) -> Tensor:
        if not 0 < cache.length < cache.capacity:
            return self.decoder(ids[:, None], cache=cache)
        if cache is not self.cache:
            self.cache, self.runs, self.recorder = cache, {}, Recorder(self.ids.device)
            # What lies behind a row is masked by a weight of 0; but 0 times garbage may be NaN.
            cache.keys[:, :, :, cache.length :] = cache.values[:, :, :, cache.length :] = 0
        span = self.span(cache)
        if span not in self.runs:
            self.place(ids, cache)
            self.runs[span] = self.recorder.record(partial(self.token, cache, span))
        self.place(ids, cache)  # after recording too, which has run the token once
        logits = self.runs[span]()
        cache.advance(1)
        return logits

    @staticmethod
    def span(cache: KVCache) -> int:
        """How many positions of the cache the next token looks at, its own among them."""
        span = SHORTEST_SPAN
        while span <= cache.length:
            span *= 2
        return min(span, cache.capacity)

    def place(self, ids: Tensor, cache: KVCache) -> None:
        """Puts the ids (B,), and where they go in the cache, to where the recordings read them, without waiting."""
        self.ids.copy_(ids)
        if cache.row_lengths is None:
            self.positions.fill_(cache.length)
        else:
            self.positions.copy_(cache.row_lengths)

    def token(self, cache: KVCache, span: int) -> Tensor:
        """Logits (B, V) after `ids` at `positions`, which moves these on: nothing else in it depends on the text.

        To the decoder, these are rows of different lengths in a cache that is filled up to the end of the span.
        """
        window = copy.copy(cache)  # the same memory
        window.length, window.row_lengths = span - 1, self.positions
        return self.decoder(self.ids[:, None], cache=window)


class GraphedWindow:
    """Reads the whole window anew for every id: `GraphedWindow(decoder, window)(ids)` is `decoder` of the window (B, T)
    without its first column and with ids (B,) behind it, at one launch; and so on from there.

    The logits (B, V) are overwritten by the next call.
    """

    def __init__(self, decoder: Decoder, window: Tensor) -> None:
        self.window = window.clone()
        self.recorder = Recorder(window.device)
        self.run = self.recorder.record(partial(decoder, self.window))

    def __call__(self, ids: Tensor) -> Tensor:
        self.window.copy_(torch.cat((self.window[:, 1:], ids[:, None]), 1))
        return self.run()


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
