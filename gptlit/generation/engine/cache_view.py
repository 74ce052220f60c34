"""The key-value cache as numpy reads it: views of one position, and attention over them.

Shapes as in `gptlit.generation.engine.cpu_step`.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gptlit.generation.engine.decoder import Decoder
from gptlit.generation.engine.limits import VECTOR_SIZE
from gptlit.model.kv_cache import KVCache

Array = NDArray[np.floating[Any]]


class SharedBuffer(NamedTuple):
    """The same memory as a tensor and as an array. Converting at every use would cost as much as an operation."""

    tensor: Tensor
    array: Array

    @classmethod
    def of(cls, tensor: Tensor) -> "SharedBuffer":
        return cls(tensor, tensor.numpy())


class CacheView:
    """Views of the cache at the position n of the next token, made once for all layers."""

    n: int
    cos: Array  # (2, D / 2); `sin` alike
    sin: Array
    new: Array  # keys and values at n, (n_layer, 2, B, H, D)
    weights: SharedBuffer  # attention weights, (H, n + 1) in numpy, or (B · H, 1, n + 1) in torch
    in_numpy: bool  # whether attention is numpy's
    keys: Any  # per layer, (H, n + 1, D) in numpy, or (B · H, D, n + 1) in torch
    values: Any  # per layer, (B · H, n + 1, D)

    def __init__(self, decoder: Decoder, rows: int) -> None:
        self.rows, self.heads, self.head_dim = rows, rows * decoder.config.n_head, decoder.config.head_dim
        self.dtype = decoder.dtype
        self.cache: KVCache | None = None
        self.numpy_weights: dict[int, SharedBuffer] = {}  # by n; a rolling row returns to the same positions
        self.rotations: Array | None = None
        if decoder.cos is not None and decoder.sin is not None:
            # (block_size, 2, 2, D / 2): cos and sin; RoPE rotates channel pairs (i, i + D/2)
            both = torch.stack((decoder.cos, decoder.sin), 1)
            self.rotations = both.numpy().reshape(-1, 2, 2, self.head_dim // 2)

    def move_to_end_of(self, cache: KVCache) -> None:
        """Set the views for the position after what the cache holds."""
        if cache is not self.cache:
            both = cache.both.numpy()  # (2, n_layer, B, H, T, D)
            self.cache, self.by_layer = cache, both.swapaxes(0, 1)
            self.by_head = both.reshape(2, len(self.by_layer), self.heads, cache.capacity, self.head_dim)
        n = self.n = cache.length
        self.new = self.by_layer[..., n, :]
        if self.rotations is not None:
            self.cos, self.sin = self.rotations[n]
        self.in_numpy = self.rows == 1 and (n + 1) * self.head_dim <= VECTOR_SIZE
        if self.in_numpy:
            if n not in self.numpy_weights:
                self.numpy_weights[n] = SharedBuffer.of(torch.empty((self.heads, n + 1), dtype=self.dtype))
            self.weights = self.numpy_weights[n]
            self.keys, self.values = self.by_head[:, :, :, : n + 1]
        else:
            self.weights = SharedBuffer.of(torch.empty((self.heads, 1, n + 1), dtype=self.dtype))
            # All layers at once: making a view costs as much as a matmul.
            keys, values = (part.flatten(1, 2).narrow(2, 0, n + 1) for part in (cache.keys, cache.values))
            self.keys, self.values = keys.transpose(2, 3).unbind(), values.unbind()

    def attend(self, layer: int, queries: SharedBuffer, out: SharedBuffer) -> None:
        """Write the attention output for queries (B · H, D) to `out` (B · H, D); their tensors are (B · H, 1, D)."""
        tensor, array = self.weights
        if self.in_numpy:
            np.matvec(self.keys[layer], queries.array, out=array)
            torch.softmax(tensor, -1, out=tensor)
            np.vecmat(array, self.values[layer], out=out.array)
        else:
            torch.bmm(queries.tensor, self.keys[layer], out=tensor)
            torch.softmax(tensor, -1, out=tensor)
            torch.bmm(tensor, self.values[layer], out=out.tensor)

    def rotated(self, qk: Array) -> Array:
        """Apply RoPE for position n to queries and keys (B, 2, H, D)."""
        if self.rotations is None:
            return qk
        halves = qk.reshape(*qk.shape[:3], 2, -1)  # (B, 2, H, 2, D / 2)
        turned = halves * self.cos
        turned += halves[..., ::-1, :] * self.sin
        return turned.reshape(qk.shape)

    def shift(self, layer: int, reach: int, h: Array, out: Array) -> None:
        """Write `gptlit.model.block.shift_tokens` of h (B, C) to `out`, which may be h."""
        assert self.cache is not None
        assert self.cache.earlier is not None
        earlier = self.cache.earlier[layer].numpy()  # (B, reach + capacity, S)
        channels = earlier.shape[2]
        width = channels // reach
        earlier[:, reach + self.n] = h[:, :channels]
        if out is not h:
            np.copyto(out, h)
        for k in range(reach):
            group = slice(k * width, (k + 1) * width)
            out[:, group] = earlier[:, reach + self.n - 1 - k, group]
