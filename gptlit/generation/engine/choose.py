"""The entry of the engine: the fastest way to compute the next token on the device at hand.

The thresholds stand in `gptlit.generation.engine.limits`. Every way computes the same logits, up to rounding.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gptlit.generation.engine.cpu_step import CpuStep
from gptlit.generation.engine.cuda_step import CudaGraphStep, CudaGraphWindow
from gptlit.generation.engine.decoder import Decoder
from gptlit.generation.engine.limits import CAPTURE_FROM_IDS
from gptlit.model.kv_cache import KVCache

Step = Callable[[Tensor, KVCache], Tensor]
"""Ids (B,) and the cache they are appended to -> logits (B, V), which the next call may overwrite."""
Window = Callable[[Tensor], Tensor]
"""Ids (B,) -> logits (B, V), which the next call may overwrite."""


def make_step(decoder: Decoder, rows: int, ids_to_come: int) -> Step:
    """Return the function that reads one more id of each row.

    Args:
        decoder: the model.
        rows: B, the number of rows.
        ids_to_come: how often the function will be called; capturing CUDA graphs pays only for many ids.
    """
    if CpuStep.serves(decoder, rows):
        return CpuStep(decoder, rows)
    if ids_to_come >= CAPTURE_FROM_IDS and CudaGraphStep.serves(decoder):
        return CudaGraphStep(decoder, rows)
    return decoder.step


def make_window(decoder: Decoder, window: Tensor, ids_to_come: int) -> Window:
    """Return the function that drops the oldest id of a full window, appends a new one and reads all of it again.

    Args:
        decoder: the model.
        window: the newest `block_size` ids of each row, (B, T).
        ids_to_come: how often the function will be called.
    """
    if ids_to_come >= CAPTURE_FROM_IDS and CudaGraphStep.serves(decoder):
        return CudaGraphWindow(decoder, window)
    return EagerWindow(decoder, window)


class EagerWindow:
    """Re-reads the full window for every id, kernel by kernel."""

    def __init__(self, decoder: Decoder, window: Tensor) -> None:
        self.decoder, self.window = decoder, window

    def __call__(self, ids: Tensor) -> Tensor:
        self.window = torch.cat((self.window[:, 1:], ids[:, None]), 1)
        return self.decoder(self.window)
