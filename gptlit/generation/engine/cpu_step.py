"""One token on a CPU, in numpy where that is cheaper: what `Decoder.step` computes, from the same weights and cache.

A small model's token is over in the time of a hundred small operations, and each costs numpy half of what it costs
torch; finding out which comes next costs as much again. So the operations of a token are put down once, as a list of
calls that work on memory which stays where it is, and a token is one walk through the list.

What torch does in one operation (softmax, the error function, a layer norm that cannot be folded) stays torch's, on the
same memory. So do the products, but for the smallest: numpy's BLAS has threads of its own, and where torch's wait for
work on the same cores, a product that it shares out to them takes milliseconds.

Shapes as in `gptlit.model.gpt`: B sequences, C channels, H heads of D channels, F = mlp_ratio · C, V symbols.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gptlit.generation.engine.affine import Affine, packed_product
from gptlit.generation.engine.decoder import Decoder, Layer, Norm
from gptlit.generation.engine.folding import fold
from gptlit.model.gpt import RMS_NORM_EPS
from gptlit.model.kv_cache import KVCache

Array = NDArray[np.floating[Any]]
Operation = Callable[[], object]
UNSHARED = 8192  # numbers in a matrix: of a smaller one, no OpenBLAS shares out the product with a vector
FEW_ROWS = 4  # a product with each of them in turn is faster than one with all; a matrix of more is torch's
FEW_HEADS = 32  # of all rows: numpy takes one after the other, and so long only is that the faster way


class SharedBuffer(NamedTuple):
    """The same numbers for torch and for numpy: each view costs as much as an operation."""

    tensor: Tensor
    array: Array

    @classmethod
    def of(cls, tensor: Tensor) -> "SharedBuffer":
        return cls(tensor, tensor.numpy())


class CacheView:
    """What the operations of a token find in the cache at its position n: views that are made once for all layers."""

    n: int
    cos: Array  # (2, D / 2), as sin
    sin: Array
    new: Array  # what the cache has at n, (n_layer, 2, B, H, D)
    weights: SharedBuffer  # of attention, (B · H, n + 1), and (B · H, 1, n + 1) for torch's products
    few: bool  # so few that numpy multiplies
    keys: Any  # by layer, (B · H, n + 1, D) for numpy, and (B · H, D, n + 1) for torch
    values: Any  # by layer, (B · H, n + 1, D)

    def __init__(self, decoder: Decoder, rows: int) -> None:
        self.heads, self.head_dim = rows * decoder.config.n_head, decoder.config.head_dim
        self.dtype = decoder.tokens.dtype
        self.cache: KVCache | None = None
        self.few_weights: dict[int, SharedBuffer] = {}  # by n: a row that rolls is there again
        self.rotations: Array | None = None
        if decoder.cos is not None and decoder.sin is not None:
            # (block_size, 2, 2, D / 2): cos and sin; channel i of a head turns with channel i + D/2
            both = torch.stack((decoder.cos, decoder.sin), 1)
            self.rotations = both.numpy().reshape(-1, 2, 2, self.head_dim // 2)

    def look_at(self, cache: KVCache) -> None:
        """Moves to the position behind what the cache holds."""
        if cache is not self.cache:
            both = cache.both.numpy()  # (2, n_layer, B, H, T, D)
            self.cache, self.by_layer = cache, both.swapaxes(0, 1)
            self.by_head = both.reshape(2, len(self.by_layer), self.heads, cache.capacity, self.head_dim)
        n = self.n = cache.length
        self.new = self.by_layer[..., n, :]
        if self.rotations is not None:
            self.cos, self.sin = self.rotations[n]
        self.few = self.heads <= FEW_HEADS and (n + 1) * self.head_dim <= UNSHARED
        if self.few:
            if n not in self.few_weights:
                self.few_weights[n] = SharedBuffer.of(torch.empty((self.heads, n + 1), dtype=self.dtype))
            self.weights = self.few_weights[n]
            self.keys, self.values = self.by_head[:, :, :, : n + 1]
        else:
            self.weights = SharedBuffer.of(torch.empty((self.heads, 1, n + 1), dtype=self.dtype))
            # All layers' views at once: each by itself costs as much as a product.
            keys, values = (kept.flatten(1, 2).narrow(2, 0, n + 1) for kept in (cache.keys, cache.values))
            self.keys, self.values = keys.transpose(2, 3).unbind(), values.unbind()

    def gather(self, layer: int, queries: SharedBuffer, out: SharedBuffer) -> None:
        """Attention's values for queries (B · H, D), to `out` (B · H, D); both tensors are (B · H, 1, D)."""
        tensor, array = self.weights
        if self.few:
            np.matvec(self.keys[layer], queries.array, out=array)
            torch.softmax(tensor, -1, out=tensor)
            np.vecmat(array, self.values[layer], out=out.array)
        else:
            torch.bmm(queries.tensor, self.keys[layer], out=tensor)
            torch.softmax(tensor, -1, out=tensor)
            torch.bmm(tensor, self.values[layer], out=out.tensor)

    def rotated(self, qk: Array) -> Array:
        """Queries and keys (B, 2, H, D) as position n has them."""
        if self.rotations is None:
            return qk
        halves = qk.reshape(*qk.shape[:3], 2, -1)  # (B, 2, H, 2, D / 2)
        turned = halves * self.cos
        turned += halves[..., ::-1, :] * self.sin
        return turned.reshape(qk.shape)

    def shift(self, layer: int, reach: int, h: Array, out: Array) -> None:
        """`gptlit.model.gpt.shift_tokens` of h (B, C), to `out`, which may be h."""
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


class CpuStep:
    """`CpuStep(decoder, B)(ids, cache)` is `decoder.step(ids, cache)` for ids (B,): logits (B, V).

    The logits are overwritten by the next call. Weights, and a cache, must be on the CPU, in float32 or float64.
    """

    def __init__(self, decoder: Decoder, rows: int) -> None:
        self.decoder, self.rows = decoder, rows
        self.program: TokenProgram | None = (
            None  # written down when it is needed: that takes the time of some ten tokens
        )

    @staticmethod
    def serves(decoder: Decoder) -> bool:
        """Whether the weights lie where numpy can read them, in a precision that it computes in."""
        tokens = decoder.tokens
        return type(tokens) is Tensor and tokens.device.type == "cpu" and tokens.dtype in (torch.float32, torch.float64)

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

    The methods from `attention` on write down operations, in the order in which they are done. None of these may know
    of this object: it, and the weights with it, would be freed only when the garbage collector comes by.
    """

    def __init__(self, decoder: Decoder, rows: int) -> None:
        self.config, self.dtype, self.rows = decoder.config, decoder.tokens.dtype, rows
        config = decoder.config
        B, C, H, D, F = rows, config.n_embd, config.n_head, config.head_dim, config.mlp_ratio * config.n_embd
        weights = fold(decoder, rows)
        self.eps, self.halved = weights.eps, weights.halved
        self.tokens = weights.tokens.numpy()  # (V, C)
        self.places = None if weights.places is None else weights.places.numpy()  # (block_size, C)
        self.position = CacheView(decoder, rows)

        self.x, self.normed, self.branch = self.buffer(B, C), self.buffer(B, C), self.buffer(B, C)
        self.hidden, self.inner = self.buffer(B, F), self.buffer(B, F)
        self.qkv, self.logits = self.buffer(B, 3 * C), self.buffer(B, config.vocab_size)
        # Where nothing is done to them behind the product, one row's queries are read from where it puts them.
        self.scale = 1.0 if weights.scaled else D**-0.5
        self.raw = weights.scaled and decoder.cos is None
        queries = self.qkv.tensor[:, :C].view(H, D) if self.raw and B == 1 else self.buffer(B * H, D).tensor
        self.queries, self.gathered = SharedBuffer(queries[:, None], queries.numpy()), self.buffer(B, C)

        self.operations: list[Operation] = []
        if config.norm == "rmsnorm":
            self.operations += [self.unit(self.x, RMS_NORM_EPS, self.x)]
        for number, layer in enumerate(weights.layers):
            self.operations += [*self.attention(number, layer), *self.mlp(number, layer)]
        normalise, x = self.normalised(weights.last_norm)
        self.operations += [*normalise, *self.product(weights.lm_head, x, self.logits)]

    def run(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Logits (B, V) behind ids (B,), whose keys and values go into the cache."""
        self.position.look_at(cache)
        x = self.x.array
        np.take(self.tokens, ids.numpy(), axis=0, out=x, mode="clip")  # the only mode that writes to `out` at once
        if self.places is not None:
            np.add(x, self.places[self.position.n], out=x)
        for operation in self.operations:
            operation()
        cap = self.config.logit_softcap
        return self.logits.tensor if cap is None else cap * torch.tanh(self.logits.tensor / cap)

    def buffer(self, *shape: int) -> SharedBuffer:
        return SharedBuffer.of(torch.empty(shape, dtype=self.dtype))

    def number(self, value: float) -> Array:
        """As an array: a Python number would be turned into one at every use."""
        return np.asarray(value, self.x.array.dtype)

    def attention(self, number: int, layer: Layer) -> list[Operation]:
        """Adds what attention of layer `number` gathers to x."""
        normalise, x = self.normalised(layer.norm_1)
        heads = self.gathered.tensor.view(-1, self.config.head_dim)  # (B · H, D)
        return [
            *normalise,
            *self.product(layer.qkv, x, self.qkv),
            *self.spread(number),
            partial(self.position.gather, number, self.queries, SharedBuffer(heads[:, None], heads.numpy())),
            *self.join(layer.proj, self.gathered),
        ]

    def spread(self, number: int) -> list[Operation]:
        """Puts the keys and values of `qkv` into the cache, and the queries, divided by √D, into `queries`; rotated and
        normalised where the model does.
        """
        position, qk_norm, scale = self.position, self.config.qk_norm, self.number(self.scale)
        qkv = self.qkv.array.reshape(self.rows, 3, self.config.n_head, -1)  # (B, 3, H, D)
        qk, keys_and_values = qkv[:, :2], qkv[:, 1:].swapaxes(0, 1)  # (B, 2, H, D), (2, B, H, D)
        queries = self.queries.array.reshape(qk[:, 0].shape)  # (B, H, D)

        def as_they_are() -> None:
            position.new[number] = keys_and_values

        def turned_and_normalised() -> None:
            turned = position.rotated(qk)
            if qk_norm:
                turned = rms_norm(turned)
            new = position.new[number]
            new[0], new[1] = turned[:, 1], keys_and_values[1]
            np.multiply(turned[:, 0], scale, out=queries)

        if not self.raw:
            return [turned_and_normalised]
        return [as_they_are] if self.rows == 1 else [as_they_are, partial(np.copyto, queries, qk[:, 0])]

    def mlp(self, number: int, layer: Layer) -> list[Operation]:
        """Adds what the MLP of layer `number` makes of x to x."""
        if layer.fc is None or layer.out is None:
            return []
        operations, h = self.normalised(layer.norm_2)
        if reach := self.config.token_shift:
            operations.append(partial(self.position.shift, number, reach, h.array, self.normed.array))
            h = self.normed
        return [
            *operations,
            *self.product(layer.fc, h, self.hidden),
            *self.activated(),
            *self.join(layer.out, self.hidden),
        ]

    def activated(self) -> list[Operation]:
        """The MLP's non-linearity of `hidden`."""
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
        """What a norm makes of x, and where that is then."""
        x, normed = self.x, self.normed
        if self.eps is not None:
            return [self.unit(x, self.eps, normed)], normed
        if self.config.norm == "none":
            return [], x
        return [lambda: np.copyto(normed.array, norm(x.tensor).numpy())], normed

    def unit(self, x: SharedBuffer, eps: float, out: SharedBuffer) -> Operation:
        """Puts x / √(mean of x² + eps) to `out`."""
        if self.rows > 1:
            return partial(rms_norm, x.array, eps, out.array)
        row, target = x.array[0], out.array[0]
        size, sqrt, multiply = row.size, math.sqrt, np.multiply  # Python's arithmetic is the fastest for one number
        return lambda: multiply(row, 1 / sqrt(row.dot(row) / size + eps), out=target)

    def join(self, affine: Affine, h: SharedBuffer) -> list[Operation]:
        """Adds h W + b to x, or puts it in the place of x in a model without residual connections."""
        if not self.config.residual:
            return self.product(affine, h, self.x)
        x, branch = self.x.array, self.branch
        return [*self.product(affine, h, branch), partial(np.add, x, branch.array, out=x)]

    def product(self, affine: Affine, x: SharedBuffer, out: SharedBuffer) -> list[Operation]:
        """Puts x W + b of x (B, in) to `out` (B, out)."""
        packed, bias = affine.packed_for(self.rows), affine.bias
        if packed is not None:
            return [lambda: np.copyto(out.array, packed_product(x.tensor, packed, bias).numpy())]
        operations: list[Operation] = [partial(torch.mm, x.tensor, affine.weight, out=out.tensor)]
        pieces = unshared_pieces(affine.weight.numpy().T) if self.rows <= FEW_ROWS else None
        if pieces is not None:
            target = out.array.reshape(-1, *pieces.shape[:2])  # (B, count, out / count)
            operations = [partial(np.matvec, pieces, x.array[:, None], out=target)]
        if bias is not None:
            operations.append(partial(np.add, out.array, bias.numpy(), out=out.array))
        return operations


def rms_norm(x: Array, eps: float = RMS_NORM_EPS, out: Array | None = None) -> Array:
    """RMS normalisation, x / √(mean of x² + eps), over the last axis."""
    size = np.vecdot(x, x)
    size *= 1 / x.shape[-1]
    size += eps
    return np.divide(x, np.sqrt(size, out=size)[..., None], out=out)


def unshared_pieces(weight: Array) -> Array | None:
    """The rows of a weight (out, in) in the fewest equal pieces (count, out / count, in) that are small enough.

    None where those would be many more than unequal ones: each costs something to begin, and 97 rows make 97 pieces.
    """
    rows, columns = weight.shape
    fewest = -(-rows * columns // UNSHARED)
    count = next((n for n in range(fewest, fewest + 8) if rows % n == 0 and rows // n * columns <= UNSHARED), None)
    return None if count is None else np.ascontiguousarray(weight).reshape(count, rows // count, columns)
