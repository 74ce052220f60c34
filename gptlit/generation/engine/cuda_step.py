"""One token on a GPU with one launch: the work of `Decoder`, captured as a CUDA graph and replayed for every id.

A token of a small model is about a hundred kernels of a few microseconds each, and launching them from Python takes
longer than they run. A CUDA graph fixes addresses, shapes and every number known to the host. So ids and positions are
read from fixed memory, and attention runs over a fixed span of the cache with a mask.

Shapes as in `gptlit.model.gpt`: B sequences, T positions, V tokens.
"""

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gptlit.device.cuda_graphs import CudaGraphCapturer
from gptlit.generation.engine.decoder import Decoder
from gptlit.generation.engine.limits import SHORTEST_SPAN
from gptlit.model.kv_cache import KVCache


class CudaGraphStep:
    """`CudaGraphStep(decoder, B)(ids, cache)` equals `decoder.step(ids, cache)` for ids (B,): logits (B, V).

    The next call overwrites the logits. Rows may differ in length. There is one graph per span of the cache (64
    positions, 128, 256, …), captured when it is first needed, so that a short text in a long cache does not pay for
    all of it. Another cache is captured again.
    """

    def __init__(self, decoder: Decoder, rows: int) -> None:
        self.decoder = decoder
        self.ids = torch.zeros(rows, dtype=torch.long, device=decoder.device)
        self.positions = torch.zeros_like(self.ids)
        self.cache: KVCache | None = None
        self.graphs: dict[int, Callable[[], Tensor]] = {}  # of this cache, by span

    @staticmethod
    def serves(decoder: Decoder) -> bool:
        """Whether the device has CUDA graphs and nothing synchronises, as deterministic writes to the cache may do."""
        return decoder.device.type == "cuda" and not torch.are_deterministic_algorithms_enabled()

    def __call__(self, ids: Tensor, cache: KVCache) -> Tensor:
        if not 0 < cache.length < cache.capacity:
            return self.decoder(ids[:, None], cache=cache)
        if cache is not self.cache:
            self.cache, self.graphs, self.capturer = cache, {}, CudaGraphCapturer(self.ids.device)
            # Positions after a row's end get the weight 0; but 0 times uninitialised memory may be NaN.
            cache.keys[:, :, :, cache.length :] = cache.values[:, :, :, cache.length :] = 0
        span = self.span(cache)
        if span not in self.graphs:
            self.set_inputs(ids, cache)
            self.graphs[span] = self.capturer.capture(partial(self.token, cache, span))
        self.set_inputs(ids, cache)  # again: capturing runs the token once
        logits = self.graphs[span]()
        cache.advance(1)
        return logits

    @staticmethod
    def span(cache: KVCache) -> int:
        """Return how many positions of the cache attention covers for the next token, its own included."""
        span = SHORTEST_SPAN
        while span <= cache.length:
            span *= 2
        return min(span, cache.capacity)

    def set_inputs(self, ids: Tensor, cache: KVCache) -> None:
        """Copy ids (B,) and their positions to where the graphs read them, without synchronising."""
        self.ids.copy_(ids)
        if cache.row_lengths is None:
            self.positions.fill_(cache.length)
        else:
            self.positions.copy_(cache.row_lengths)

    def token(self, cache: KVCache, span: int) -> Tensor:
        """Compute the logits (B, V) after `ids` at `positions`, and advance `positions`. This is what is captured.

        The decoder sees rows of different lengths in a cache that is filled up to the end of the span.
        """
        view = copy.copy(cache)  # the same memory
        view.length, view.row_lengths = span - 1, self.positions
        return self.decoder(self.ids[:, None], cache=view)


class CudaGraphWindow:
    """Re-reads the full window for every id, with one launch: see `gptlit.generation.engine.choose.Window`.

    The next call overwrites the logits.
    """

    def __init__(self, decoder: Decoder, window: Tensor) -> None:
        self.window = window.clone()
        self.capturer = CudaGraphCapturer(window.device)
        self.replay = self.capturer.capture(partial(decoder, self.window))

    def __call__(self, ids: Tensor) -> Tensor:
        self.window.copy_(torch.cat((self.window[:, 1:], ids[:, None]), 1))
        return self.replay()
