"""One token on a CPU, in numpy where that is cheaper: what `Decoder.step` computes, from the same weights and cache.

A small model's token is over in the time of a hundred small operations, and each costs numpy half of what it costs
torch. What torch does in one operation (norms, softmax, the error function) stays torch's, on the same memory. So do
the products, but for the smallest: numpy's BLAS has threads of its own, and where torch's wait for work on the same
cores, a product that it shares out to them takes milliseconds.

Shapes as in `gptlit.model`: B sequences, C channels, H heads of D channels, F = mlp_ratio · C, V symbols.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gptlit.affine import Affine, packed_product
from gptlit.decode import Decoder, Layer, Norm
from gptlit.folding import fold
from gptlit.kv_cache import KVCache
from gptlit.model import RMS_NORM_EPS, activate

Array = NDArray[np.floating[Any]]
UNSHARED = 8192  # numbers in a matrix: of a smaller one, no OpenBLAS shares out the product with a vector
FEW_ROWS = 4  # a product with each of them in turn is faster than one with all; a matrix of more is torch's
FEW_HEADS = 32  # of all rows: numpy takes one after the other, and so long only is that the faster way
ERF_PAYS_BELOW = 4096  # numbers: torch's GELU takes 4 µs to begin and is then three times as fast as its erf


class LeanStep:
    """`LeanStep(decoder, B)(ids, cache)` is `decoder.step(ids, cache)` for ids (B,): logits (B, V).

    The logits are overwritten by the next call. Weights, and a cache, must be on the CPU, in float32 or float64.
    """

    def __init__(self, decoder: Decoder, rows: int) -> None:
        self.decoder, self.config = decoder, decoder.config
        config = decoder.config
        B, C, H, D, F = rows, config.n_embd, config.n_head, config.head_dim, config.mlp_ratio * config.n_embd
        weights = fold(decoder, gelu=B * F <= ERF_PAYS_BELOW)
        self.eps, self.halved = weights.eps, weights.halved

        def buffer(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=decoder.tokens.dtype)

        # The same memory for torch and for numpy: each view costs as much as an operation.
        self.x_tensor, self.inner_tensor = buffer(B, C), buffer(B, F)
        self.queries_tensor, self.gathered_tensor = buffer(B * H, D), buffer(B * H, D)
        self.x, self.inner, self.normed = self.x_tensor.numpy(), self.inner_tensor.numpy(), buffer(B, C).numpy()
        self.queries, self.gathered = self.queries_tensor.numpy(), self.gathered_tensor.numpy()
        self.gathered_rows = self.gathered.reshape(B, C)
        # As arrays: a Python number would be turned into one at every use.
        self.scale, self.sqrt_half, self.half, self.one, self.zero = (
            np.asarray(number, self.x.dtype) for number in (1 if weights.scaled else D**-0.5, math.sqrt(0.5), 0.5, 1, 0)
        )

        self.tokens = weights.tokens.numpy()  # (V, C)
        self.places = None if weights.places is None else weights.places.numpy()  # (block_size, C)
        qkv, branch, hidden = buffer(B, 3 * C), buffer(B, C), buffer(B, F)
        self.layers = [LeanLayer(layer, qkv, branch, hidden) for layer in weights.layers]
        self.last_norm = weights.last_norm
        self.lm_head = LeanAffine(weights.lm_head, buffer(B, config.vocab_size))
        self.rotations: tuple[Array, Array] | None = None
        if decoder.cos is not None and decoder.sin is not None:
            # (block_size, 2, D / 2) each: channel i of a head turns with channel i + D/2
            cos, sin = decoder.cos.numpy(), decoder.sin.numpy()
            self.rotations = cos.reshape(-1, 2, D // 2), sin.reshape(-1, 2, D // 2)

    @staticmethod
    def serves(decoder: Decoder) -> bool:
        """Whether the weights lie where numpy can read them, in a precision that it computes in."""
        tokens = decoder.tokens
        return type(tokens) is Tensor and tokens.device.type == "cpu" and tokens.dtype in (torch.float32, torch.float64)

    def __call__(self, ids: Tensor, cache: KVCache) -> Tensor:
        n, B, H, config = cache.length, len(ids), self.config.n_head, self.config
        if cache.row_lengths is not None or not 0 < n < cache.capacity:
            return self.decoder(ids[:, None], cache=cache)
        remembered = cache.both.numpy()[..., n, :].swapaxes(0, 1)  # (n_layer, 2, B, H, D)
        attend, x = self.attention(cache, n + 1), self.x
        np.take(self.tokens, ids.numpy(), axis=0, out=x, mode="clip")  # the only mode that writes to `out` at once
        if self.places is not None:
            np.add(x, self.places[n], out=x)
        if config.norm == "rmsnorm":
            unit(x, RMS_NORM_EPS, out=x)
        for i, layer in enumerate(self.layers):
            qkv = layer.qkv(self.norm(layer.norm_1)).reshape(B, 3, H, -1)
            self.remember(qkv, n, remembered[i])
            attend(i)
            self.join(layer.proj, self.gathered_rows)
            if layer.fc is not None and layer.out is not None:
                h = self.norm(layer.norm_2)  # (B, C)
                if cache.earlier is not None:
                    h = self.shifted(h, cache.earlier[i].numpy(), n)
                self.join(layer.out, self.activated(layer.fc, h))
        cache.advance(1)
        logits = torch.from_numpy(self.lm_head(self.norm(self.last_norm)))
        cap = config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def attention(self, cache: KVCache, length: int) -> Callable[[int], None]:
        """What, told a layer, gathers from its first `length` values (B · H, length, D) by `queries` (B · H, D)."""
        heads, D = self.queries.shape
        weights_tensor = torch.empty((heads, length), dtype=self.x_tensor.dtype)
        if heads <= FEW_HEADS and length * D <= UNSHARED:
            both = cache.both.numpy().reshape(2, len(self.layers), heads, cache.capacity, D)[:, :, :, :length]
            keys, values, weights = both[0], both[1], weights_tensor.numpy()

            def in_numpy(layer: int) -> None:
                np.matvec(keys[layer], self.queries, out=weights)
                torch.softmax(weights_tensor, -1, out=weights_tensor)
                np.vecmat(weights, values[layer], out=self.gathered)

            return in_numpy
        # All layers' views at once: each by itself costs as much as a product.
        kept_keys, kept_values = (kept.flatten(1, 2).narrow(2, 0, length) for kept in (cache.keys, cache.values))
        key_views, value_views = kept_keys.transpose(2, 3).unbind(), kept_values.unbind()
        queries, gathered = self.queries_tensor[:, None], self.gathered_tensor[:, None]  # (B · H, 1, D)
        weights_tensor = weights_tensor[:, None]  # (B · H, 1, length)

        def in_torch(layer: int) -> None:
            torch.bmm(queries, key_views[layer], out=weights_tensor)
            torch.softmax(weights_tensor, -1, out=weights_tensor)
            torch.bmm(weights_tensor, value_views[layer], out=gathered)

        return in_torch

    def norm(self, norm: Norm) -> Array:
        """What a norm makes of x, (B, C)."""
        return norm(self.x_tensor).numpy() if self.eps is None else unit(self.x, self.eps, out=self.normed)

    def remember(self, qkv: Array, n: int, kept: Array) -> None:
        """Puts keys and values of position n into the cache, `kept` (2, B, H, D), and the queries into `queries`,
        divided by √D. Rotated and normalised where the model does. qkv (B, 3, H, D).
        """
        kept[1] = qkv[:, 2]
        qk = qkv[:, :2]  # (B, 2, H, D)
        if self.rotations is not None:
            cos, sin = self.rotations[0][n], self.rotations[1][n]  # (2, D / 2)
            halves = qk.reshape(*qk.shape[:3], 2, -1)  # (B, 2, H, 2, D / 2)
            turned = halves * cos
            turned += halves[..., ::-1, :] * sin
            qk = turned.reshape(qk.shape)
        if self.config.qk_norm:
            qk = unit(qk, RMS_NORM_EPS)
        kept[0] = qk[:, 1]
        np.multiply(qk[:, 0], self.scale, out=self.queries.reshape(qk[:, 0].shape))

    def activated(self, fc: "LeanAffine", h: Array) -> Array:
        """The MLP's non-linearity of h W + b, (B, F)."""
        hidden, inner = fc(h), self.inner
        if self.halved:
            torch.erf(fc.out_tensor, out=self.inner_tensor)
            np.add(inner, self.one, out=inner)
            return np.multiply(hidden, inner, out=hidden)
        if self.config.activation == "relu2":
            np.maximum(hidden, self.zero, out=hidden)
            return np.multiply(hidden, hidden, out=hidden)
        if self.config.activation != "gelu" or hidden.size > ERF_PAYS_BELOW:
            return activate(torch.from_numpy(hidden), self.config.activation).numpy()
        np.multiply(hidden, self.sqrt_half, out=inner)
        torch.erf(self.inner_tensor, out=self.inner_tensor)
        np.add(inner, self.one, out=inner)
        np.multiply(hidden, self.half, out=hidden)
        return np.multiply(hidden, inner, out=hidden)  # ½ h (1 + erf(h / √2))

    def shifted(self, h: Array, earlier: Array, n: int) -> Array:
        """`gptlit.model.shift_tokens` of position n: h (B, C), earlier (B, reach + capacity, S)."""
        reach = self.config.token_shift
        channels = self.config.shifted_channels
        width = channels // reach
        earlier[:, reach + n] = h[:, :channels]
        h = h.copy()  # without a norm it is the residual stream itself
        for k in range(reach):
            group = slice(k * width, (k + 1) * width)
            h[:, group] = earlier[:, reach + n - 1 - k, group]
        return h

    def join(self, affine: "LeanAffine", h: Array) -> None:
        """Adds h W + b to x, or puts it in the place of x in a model without residual connections."""
        if self.config.residual:
            np.add(self.x, affine(h), out=self.x)
        else:
            self.x[:] = affine(h)


def unit(x: Array, eps: float, out: Array | None = None) -> Array:
    """RMS normalisation, x / √(mean of x² + eps), over the last axis."""
    if x.shape[:-1] == (1,):  # Python's arithmetic is the fastest for one number
        row = x[0]
        return np.multiply(x, 1 / math.sqrt(row.dot(row) / row.size + eps), out=out)
    size = np.vecdot(x, x)
    size *= 1 / x.shape[-1]
    size += eps
    return np.divide(x, np.sqrt(size, out=size)[..., None], out=out)


class LeanAffine:
    """x W + b (B, out) of x (B, in), which is overwritten by the next product; `out` is memory for it."""

    __slots__ = ("bias", "out", "out_pieces", "out_tensor", "packed", "pieces", "weight")

    def __init__(self, affine: Affine, out: Tensor) -> None:
        self.weight, self.packed = affine.weight, affine.packed_for(len(out))
        self.bias = None if affine.bias is None else affine.bias.numpy()
        self.out, self.out_tensor = out.numpy(), out
        self.pieces: Array | None = None
        if len(out) <= FEW_ROWS and self.packed is None and len(affine.weight) <= UNSHARED:
            self.pieces = unshared_pieces(affine.weight.numpy().T)
            self.out_pieces = self.out.reshape(-1, *self.pieces.shape[:2])

    def __call__(self, x: Array) -> Array:
        out = self.out
        if self.packed is not None:
            out = packed_product(torch.from_numpy(x), self.packed, None).numpy()
        elif self.pieces is not None:
            np.matvec(self.pieces, x[:, None], out=self.out_pieces)
        else:
            torch.mm(torch.from_numpy(x), self.weight, out=self.out_tensor)
        return out if self.bias is None else np.add(out, self.bias, out=out)


def unshared_pieces(weight: Array) -> Array:
    """The rows of a weight (out, in) in the fewest equal pieces (count, out / count, in) that are small enough."""
    rows, columns = weight.shape
    count = next(n for n in range(1, rows + 1) if rows % n == 0 and rows // n * columns <= UNSHARED)
    return weight.reshape(count, rows // count, columns)


class LeanLayer:
    """A block's norms and products, with the memory for what the products give."""

    __slots__ = ("fc", "norm_1", "norm_2", "out", "proj", "qkv")

    def __init__(self, layer: Layer, qkv: Tensor, branch: Tensor, hidden: Tensor) -> None:
        self.norm_1, self.norm_2 = layer.norm_1, layer.norm_2
        self.qkv, self.proj = LeanAffine(layer.qkv, qkv), LeanAffine(layer.proj, branch)
        self.fc = None if layer.fc is None else LeanAffine(layer.fc, hidden)
        self.out = None if layer.out is None else LeanAffine(layer.out, branch)
