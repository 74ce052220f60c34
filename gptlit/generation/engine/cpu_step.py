"""One token on a CPU in numpy: the logits of `Decoder.step`, from the same weights and cache, for small models.

A token of a small model is about a hundred small operations. Each costs numpy half of what it costs torch, and
deciding in Python which one comes next costs as much again. So the operations of a token are prepared once, as a list
of calls on fixed memory, and a token runs through the list.

Operations that numpy lacks (softmax, erf, layer norms that are not folded) are torch's, on the same memory. So are the
matmuls, except small ones of one row: numpy's BLAS has threads of its own, and where they compete with torch's for the
same cores, a shared product takes milliseconds.

Shapes as in `gptlit.model.gpt`: B sequences, C channels, H heads of D channels, F = mlp_ratio · C, V tokens.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from gptlit.generation.engine.affine import Affine
from gptlit.generation.engine.cache_view import Array, CacheView, SharedBuffer
from gptlit.generation.engine.decoder import Decoder, Layer, Norm
from gptlit.generation.engine.folding import fold
from gptlit.generation.engine.limits import NUMPY_BELOW, VECTOR_SIZE
from gptlit.model.block import RMS_NORM_EPS
from gptlit.model.kv_cache import KVCache

Operation = Callable[[], object]


class CpuStep:
    """`CpuStep(decoder, B)(ids, cache)` equals `decoder.step(ids, cache)` for ids (B,): logits (B, V).

    The next call overwrites the logits.
    """

    def __init__(self, decoder: Decoder, rows: int) -> None:
        self.decoder, self.rows = decoder, rows
        self.program: TokenProgram | None = None  # made when first needed, which takes the time of about ten tokens

    @staticmethod
    def serves(decoder: Decoder, rows: int) -> bool:
        """Whether numpy can compute on the weights, and is faster than torch for so many rows."""
        tokens = decoder.token_embedding
        readable = (
            type(tokens) is Tensor and tokens.device.type == "cpu" and tokens.dtype in (torch.float32, torch.float64)
        )
        weights = [decoder.lm_head, *(part for layer in decoder.layers for part in affine_maps(layer))]
        small = rows * sum(part.weight.numel() for part in weights) <= NUMPY_BELOW
        return readable and small and all(part.packed is None and part.small is None for part in weights)

    def __call__(self, ids: Tensor, cache: KVCache) -> Tensor:
        if cache.row_lengths is not None or not 0 < cache.length < cache.capacity:
            return self.decoder(ids[:, None], cache=cache)
        if self.program is None:
            self.program = TokenProgram(self.decoder, self.rows)
        logits = self.program.run(ids, cache)
        cache.advance(1)
        return logits


class TokenProgram:
    """The operations of a token in B rows.

    The methods from `attention` on return operations in the order of execution. None of the operations may refer to
    this object: in a reference cycle it, and the weights with it, would stay until the garbage collector runs.
    """

    def __init__(self, decoder: Decoder, rows: int) -> None:
        self.config, self.dtype, self.rows = decoder.config, decoder.dtype, rows
        config = decoder.config
        B, C, H, D, F = rows, config.n_embd, config.n_head, config.head_dim, config.mlp_ratio * config.n_embd
        weights = fold(decoder, rows)
        self.eps, self.halved = weights.eps, weights.halved
        self.token_embedding = weights.token_embedding.numpy()  # (V, C)
        positions = weights.position_embedding
        self.position_embedding = None if positions is None else positions.numpy()  # (block_size, C)
        self.view = CacheView(decoder, rows)

        self.x, self.normed, self.branch = self.buffer(B, C), self.buffer(B, C), self.buffer(B, C)
        self.hidden, self.inner = self.buffer(B, F), self.buffer(B, F)
        self.qkv, self.logits = self.buffer(B, 3 * C), self.buffer(B, config.vocab_size)
        # If nothing is done to queries after the matmul, those of one row are read from its output.
        self.scale = 1.0 if weights.scaled else D**-0.5
        self.raw = weights.scaled and decoder.cos is None
        queries = self.qkv.tensor[:, :C].view(H, D) if self.raw and B == 1 else self.buffer(B * H, D).tensor
        self.queries, self.attended = SharedBuffer(queries[:, None], queries.numpy()), self.buffer(B, C)

        self.operations: list[Operation] = []
        if config.norm == "rmsnorm":
            self.operations += [self.rms_norm(self.x, RMS_NORM_EPS, self.x)]
        for number, layer in enumerate(weights.layers):
            self.operations += [*self.attention(number, layer), *self.mlp(number, layer)]
        normalise, x = self.normalised(weights.last_norm)
        self.operations += [*normalise, *self.matmul(weights.lm_head, x, self.logits)]

    def run(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Return the logits (B, V) after ids (B,), and write their keys and values to the cache."""
        self.view.move_to_end_of(cache)
        x = self.x.array
        np.take(self.token_embedding, ids.numpy(), axis=0, out=x, mode="clip")  # other modes buffer the output
        if self.position_embedding is not None:
            np.add(x, self.position_embedding[self.view.n], out=x)
        for operation in self.operations:
            operation()
        cap = self.config.logit_softcap
        return self.logits.tensor if cap is None else cap * torch.tanh(self.logits.tensor / cap)

    def buffer(self, *shape: int) -> SharedBuffer:
        return SharedBuffer.of(torch.empty(shape, dtype=self.dtype))

    def number(self, value: float) -> Array:
        """Return a number as an array: a Python number would be converted at every use."""
        return np.asarray(value, self.x.array.dtype)

    def attention(self, number: int, layer: Layer) -> list[Operation]:
        """Add the output of attention of layer `number` to x."""
        normalise, x = self.normalised(layer.norm_1)
        heads = self.attended.tensor.view(-1, self.config.head_dim)  # (B · H, D)
        return [
            *normalise,
            *self.matmul(layer.qkv, x, self.qkv),
            *self.split(number),
            partial(self.view.attend, number, self.queries, SharedBuffer(heads[:, None], heads.numpy())),
            *self.join(layer.proj, self.attended),
        ]

    def split(self, number: int) -> list[Operation]:
        """Write keys and values of `qkv` to the cache and queries / √D to `queries`, with RoPE and QK-norm if used."""
        view, qk_norm, scale = self.view, self.config.qk_norm, self.number(self.scale)
        qkv = self.qkv.array.reshape(self.rows, 3, self.config.n_head, -1)  # (B, 3, H, D)
        qk, keys_and_values = qkv[:, :2], qkv[:, 1:].swapaxes(0, 1)  # (B, 2, H, D), (2, B, H, D)
        queries = self.queries.array.reshape(qk[:, 0].shape)  # (B, H, D)

        def copy() -> None:
            view.new[number] = keys_and_values

        def rotate_and_normalise() -> None:
            turned = view.rotated(qk)
            if qk_norm:
                turned = rms_norm(turned)
            new = view.new[number]
            new[0], new[1] = turned[:, 1], keys_and_values[1]
            np.multiply(turned[:, 0], scale, out=queries)

        if not self.raw:
            return [rotate_and_normalise]
        return [copy] if self.rows == 1 else [copy, partial(np.copyto, queries, qk[:, 0])]

    def mlp(self, number: int, layer: Layer) -> list[Operation]:
        """Add the output of the MLP of layer `number` to x."""
        if layer.fc is None or layer.out is None:
            return []
        operations, h = self.normalised(layer.norm_2)
        if reach := self.config.token_shift:
            operations.append(partial(self.view.shift, number, reach, h.array, self.normed.array))
            h = self.normed
        return [
            *operations,
            *self.matmul(layer.fc, h, self.hidden),
            *self.activated(),
            *self.join(layer.out, self.hidden),
        ]

    def activated(self) -> list[Operation]:
        """Apply the MLP's non-linearity to `hidden`."""
        hidden, inner, activation = self.hidden, self.inner, self.config.activation
        h, i = hidden.array, inner.array
        if self.halved:
            return [
                partial(torch.erf, hidden.tensor, out=inner.tensor),
                partial(np.add, i, self.number(1), out=i),
                partial(np.multiply, h, i, out=h),
            ]
        if activation in ("relu", "relu2"):
            squares: list[Operation] = [partial(np.multiply, h, h, out=h)] if activation == "relu2" else []
            return [partial(np.maximum, h, self.number(0), out=h), *squares]
        approximate = "none" if activation == "gelu" else "tanh"
        return [partial(torch.ops.aten.gelu.out, hidden.tensor, approximate=approximate, out=hidden.tensor)]

    def normalised(self, norm: Norm) -> tuple[list[Operation], SharedBuffer]:
        """Return the operations that normalise x, and the buffer of their result."""
        x, normed = self.x, self.normed
        if self.eps is not None:
            return [self.rms_norm(x, self.eps, normed)], normed
        if self.config.norm == "none":
            return [], x
        return [lambda: np.copyto(normed.array, norm(x.tensor).numpy())], normed

    def rms_norm(self, x: SharedBuffer, eps: float, out: SharedBuffer) -> Operation:
        """Write x / √(mean of x² + eps) to `out`."""
        if self.rows > 1:
            return partial(rms_norm, x.array, eps, out.array)
        row, target = x.array[0], out.array[0]
        size, sqrt, multiply = row.size, math.sqrt, np.multiply  # Python's arithmetic is the fastest for one number
        return lambda: multiply(row, 1 / sqrt(row.dot(row) / size + eps), out=target)

    def join(self, affine: Affine, h: SharedBuffer) -> list[Operation]:
        """Add h W + b to x; without residual connections, write it to x."""
        if not self.config.residual:
            return self.matmul(affine, h, self.x)
        x, branch = self.x.array, self.branch
        return [*self.matmul(affine, h, branch), partial(np.add, x, branch.array, out=x)]

    def matmul(self, affine: Affine, x: SharedBuffer, out: SharedBuffer) -> list[Operation]:
        """Write x W + b for x (B, in) to `out` (B, out)."""
        operations: list[Operation] = [partial(torch.mm, x.tensor, affine.weight, out=out.tensor)]
        pieces = small_pieces(affine.weight.numpy().T) if self.rows == 1 else None
        if pieces is not None:
            target = out.array.reshape(pieces.shape[:2])  # (count, out / count)
            operations = [partial(np.matvec, pieces, x.array, out=target)]
        if affine.bias is not None:
            operations.append(partial(np.add, out.array, affine.bias.numpy(), out=out.array))
        return operations


def affine_maps(layer: Layer) -> list[Affine]:
    """Return the affine maps of a block."""
    return [part for part in (layer.qkv, layer.proj, layer.fc, layer.out) if part is not None]


def rms_norm(x: Array, eps: float = RMS_NORM_EPS, out: Array | None = None) -> Array:
    """Return x / √(mean of x² + eps) over the last axis."""
    size = np.vecdot(x, x)
    size *= 1 / x.shape[-1]
    size += eps
    return np.divide(x, np.sqrt(size, out=size)[..., None], out=out)


def small_pieces(weight: Array) -> Array | None:
    """Split the rows of a weight (out, in) into the fewest equal pieces (count, out / count, in) of `VECTOR_SIZE`.

    None if equal pieces would be many more than unequal ones: each costs a call, and 97 rows would be 97 pieces.
    """
    rows, columns = weight.shape
    fewest = -(-rows * columns // VECTOR_SIZE)
    count = next((n for n in range(fewest, fewest + 8) if rows % n == 0 and rows // n * columns <= VECTOR_SIZE), None)
    return None if count is None else np.ascontiguousarray(weight).reshape(count, rows // count, columns)
