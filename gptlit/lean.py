"""One token on a CPU, in numpy where that is cheaper: what `Decoder.step` computes, from the same weights and cache.

A small model's token is over in the time of a hundred small operations, and each costs numpy half of what it costs
torch. What torch does in one operation (norms, softmax, GELU) stays torch's, on the same memory. So do the products,
but for the smallest: numpy's BLAS has threads of its own, and where torch's wait for work on the same cores, a product
that it shares out to them takes milliseconds.

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
from gptlit.decode import Decoder, Layer
from gptlit.kv_cache import KVCache
from gptlit.model import RMS_NORM_EPS, activate

Array = NDArray[np.floating[Any]]
UNSHARED = 8192  # numbers in a matrix: of a smaller one, no OpenBLAS shares out the product with a vector
FEW_HEADS = 8  # of all rows: numpy takes one after the other, and so long only is that the faster way
ERF_PAYS_BELOW = 4096  # numbers: torch's GELU takes 4 µs to begin and is then three times as fast as its erf


class LeanStep:
    """`LeanStep(decoder, B)(ids, cache)` is `decoder.step(ids, cache)` for ids (B,): logits (B, V).

    The logits are overwritten by the next call. Weights, and a cache, must be on the CPU, in float32 or float64.
    """

    def __init__(self, decoder: Decoder, rows: int) -> None:
        self.decoder, self.config = decoder, decoder.config
        config = decoder.config
        B, C, H, D, F = rows, config.n_embd, config.n_head, config.head_dim, config.mlp_ratio * config.n_embd

        def buffer(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=decoder.tokens.dtype)

        # The same memory for torch and for numpy: each view costs as much as an operation.
        self.x_tensor, self.inner_tensor = buffer(B, C), buffer(B, F)
        self.queries_tensor, self.gathered_tensor = buffer(B * H, 1, D), buffer(B * H, 1, D)
        self.x, self.inner = self.x_tensor.numpy(), self.inner_tensor.numpy()
        self.queries, self.gathered = self.queries_tensor.numpy(), self.gathered_tensor.numpy()
        self.queries_rows = self.queries.reshape(B, H, D)
        self.gathered_rows = self.gathered.reshape(B, C)
        # As arrays: a Python number would be turned into one at every use.
        self.scale, self.sqrt_half, self.half, self.one, self.zero = (
            np.asarray(number, self.x.dtype) for number in (D**-0.5, math.sqrt(0.5), 0.5, 1, 0)
        )

        self.tokens = decoder.tokens.numpy()  # (V, C)
        self.places = None if decoder.places is None else decoder.places.numpy()  # (block_size, C)
        qkv, branch, hidden = buffer(B, 3 * C), buffer(B, C), buffer(B, F)
        self.layers = [LeanLayer(layer, qkv, branch, hidden) for layer in decoder.layers]
        self.last_norm = decoder.last_norm
        self.lm_head = LeanAffine(decoder.lm_head, buffer(B, config.vocab_size))
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
        new_keys, new_values = cache.keys.numpy()[..., n, :], cache.values.numpy()[..., n, :]  # (n_layer, B, H, D)
        attend, x = self.attention(cache, n + 1), self.x
        np.take(self.tokens, ids.numpy(), axis=0, out=x, mode="clip")  # the only mode that writes to `out` at once
        if self.places is not None:
            np.add(x, self.places[n], out=x)
        if config.norm == "rmsnorm":
            rms_norm(x, x)
        for i, layer in enumerate(self.layers):
            qkv = layer.qkv(self.norm(layer.norm_1)).reshape(B, 3, H, -1)
            new_keys[i] = self.queries_and_keys(qkv, n)
            new_values[i] = qkv[:, 2]
            attend(i)
            self.join(layer.proj, self.gathered_rows)
            if layer.fc is not None and layer.out is not None:
                h = self.norm(layer.norm_2)  # (B, C)
                if cache.earlier is not None:
                    h = self.shifted(h, cache.earlier[i].numpy(), n)
                self.join(layer.out, self.activated(layer.fc(h)))
        cache.advance(1)
        logits = torch.from_numpy(self.lm_head(self.norm(self.last_norm)))
        cap = config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def attention(self, cache: KVCache, length: int) -> Callable[[int], None]:
        """What, told a layer, gathers from its first `length` values (B · H, length, D) by `queries` (B · H, 1, D)."""
        heads, D = len(self.queries), self.queries.shape[2]
        scores, weights = np.empty((2, heads, 1, length), self.x.dtype)
        scores_tensor, weights_tensor = torch.from_numpy(scores), torch.from_numpy(weights)
        if heads <= FEW_HEADS and length * D <= UNSHARED:
            shape = len(self.layers), heads, cache.capacity, D
            keys, values = (kept.numpy().reshape(shape)[:, :, :length] for kept in (cache.keys, cache.values))
            keys = keys.swapaxes(2, 3)

            def in_numpy(layer: int) -> None:
                np.matmul(self.queries, keys[layer], out=scores)
                torch.softmax(scores_tensor, -1, out=weights_tensor)
                np.matmul(weights, values[layer], out=self.gathered)

            return in_numpy
        # All layers' views at once: each by itself costs as much as a product.
        kept_keys, kept_values = (kept.flatten(1, 2).narrow(2, 0, length) for kept in (cache.keys, cache.values))
        key_views, value_views = kept_keys.transpose(2, 3).unbind(), kept_values.unbind()

        def in_torch(layer: int) -> None:
            torch.bmm(self.queries_tensor, key_views[layer], out=scores_tensor)
            torch.softmax(scores_tensor, -1, out=weights_tensor)
            torch.bmm(weights_tensor, value_views[layer], out=self.gathered_tensor)

        return in_torch

    def norm(self, norm: Callable[[Tensor], Tensor]) -> Array:
        """What a norm makes of x, (B, C)."""
        return rms_norm(self.x) if self.config.norm == "rmsnorm" else norm(self.x_tensor).numpy()

    def queries_and_keys(self, qkv: Array, n: int) -> Array:
        """Keys (B, H, D) of position n, rotated and normalised where the model does; `queries` become the queries of
        it, divided by √D. qkv (B, 3, H, D).
        """
        qk = qkv[:, :2]  # (B, 2, H, D)
        if self.rotations is not None:
            cos, sin = self.rotations[0][n], self.rotations[1][n]  # (2, D / 2)
            halves = qk.reshape(*qk.shape[:3], 2, -1)  # (B, 2, H, 2, D / 2)
            turned = halves * cos
            turned += halves[..., ::-1, :] * sin
            qk = turned.reshape(qk.shape)
        if self.config.qk_norm:
            qk = rms_norm(qk)
        np.multiply(qk[:, 0], self.scale, out=self.queries_rows)
        return qk[:, 1]

    def activated(self, hidden: Array) -> Array:
        """The MLP's non-linearity of `hidden` (B, F), which may be overwritten."""
        inner = self.inner
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


def rms_norm(x: Array, out: Array | None = None) -> Array:
    """`gptlit.model.rms_norm` in numpy."""
    size = np.vecdot(x, x)
    size *= 1 / x.shape[-1]
    size += RMS_NORM_EPS
    return np.divide(x, np.sqrt(size, out=size)[..., None], out=out)


class LeanAffine:
    """x W + b (B, out) of x (B, in), which is overwritten by the next product; `out` is memory for it."""

    __slots__ = ("bias", "out", "out_pieces", "out_tensor", "packed", "pieces", "weight")

    def __init__(self, affine: Affine, out: Tensor) -> None:
        self.weight, self.packed = affine.weight, affine.packed_for(len(out))
        self.bias = None if affine.bias is None else affine.bias.numpy()
        self.out, self.out_tensor = out.numpy(), out
        self.pieces: Array | None = None
        if len(out) == 1 and self.packed is None and len(affine.weight) <= UNSHARED:
            self.pieces = unshared_pieces(affine.weight.numpy().T)
            self.out_pieces = self.out.reshape(self.pieces.shape[:2])

    def __call__(self, x: Array) -> Array:
        out = self.out
        if self.packed is not None:
            out = packed_product(torch.from_numpy(x), self.packed, None).numpy()
        elif self.pieces is not None:
            np.matmul(self.pieces, x[0], out=self.out_pieces)
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
