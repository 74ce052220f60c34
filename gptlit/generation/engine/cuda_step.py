"""One token on a GPU as one launch: what `Decoder` computes, recorded as a CUDA graph and played again for every id.

A small model's token is a hundred kernels of a few microseconds each, and starting them one by one from Python takes
longer than they do. A recording fixes addresses, shapes and every number that the host knew; so ids and positions are
read from memory that stays where it is, and attention runs over a fixed span of the cache, masked behind each row.

Shapes as in `gptlit.model.gpt`: B sequences, T positions, V symbols.
"""

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gptlit.device.cuda_graphs import Recorder
from gptlit.generation.engine.decoder import Decoder
from gptlit.model.kv_cache import KVCache

SHORTEST_SPAN = 64  # positions: attention over fewer takes no less time
RECORDING_PAYS_FROM = 32  # ids: recording takes the time of some ten that are not recorded


class CudaGraphStep:
    """`CudaGraphStep(decoder, B)(ids, cache)` is `decoder.step(ids, cache)` for ids (B,): logits (B, V), at one launch.

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
        """Whether the weights lie on a device that replays CUDA graphs, and nothing synchronises in between, as
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


class CudaGraphWindow:
    """Re-reads the full window for every id: `CudaGraphWindow(decoder, window)(ids)` is `decoder` of the window (B, T)
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
