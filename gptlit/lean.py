"""One token on a CPU, in numpy where that is cheaper: what `Decoder.step` computes, from the same weights and cache.

A small model's token is over in the time of a hundred small operations, and each costs numpy half of what it costs
torch. What torch does in one operation (norms, softmax, GELU) stays torch's, on the same memory. So do all matrix
products: numpy's BLAS has threads of its own, and where torch's wait for work on the same cores, each of its larger
products takes milliseconds.

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
from gptlit.model import RMS_NORM_EPS, KVCache, activate

Array = NDArray[np.floating[Any]]
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
        self.x_tensor, self.normed_tensor, self.inner_tensor = buffer(B, C), buffer(B, C), buffer(B, F)
        self.x, self.normed, self.inner = (
            tensor.numpy() for tensor in (self.x_tensor, self.normed_tensor, self.inner_tensor)
        )
        self.queries_tensor, self.gathered_heads = buffer(B * H, 1, D), buffer(B * H, 1, D)
        self.queries = self.queries_tensor.view(B, H, D).numpy()
        self.gathered = self.gathered_heads.view(B, C)
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
        keys, values = (kept.flatten(1, 2).narrow(2, 0, n + 1) for kept in (cache.keys, cache.values))
        seen = zip(keys.transpose(2, 3).unbind(), values.unbind(), strict=True)  # (B · H, D, n + 1), (B · H, n + 1, D)
        scores, x = torch.empty(B * H, 1, n + 1, dtype=self.x_tensor.dtype), self.x
        np.take(self.tokens, ids.numpy(), axis=0, out=x)
        if self.places is not None:
            np.add(x, self.places[n], out=x)
        if config.norm == "rmsnorm":
            rms_norm(x, x)
        for i, (layer, (keys, values)) in enumerate(zip(self.layers, seen, strict=True)):
            qkv = layer.qkv(self.norm(layer.norm_1)).reshape(B, 3, H, -1)
            new_keys[i] = self.queries_and_keys(qkv, n)
            new_values[i] = qkv[:, 2]
            torch.bmm(self.queries_tensor, keys, out=scores)
            torch.bmm(scores.softmax(-1), values, out=self.gathered_heads)
            self.join(layer.proj, self.gathered)
            if layer.fc is not None and layer.out is not None:
                h = self.norm(layer.norm_2)  # (B, C)
                if cache.earlier is not None:
                    h = self.shifted(h.numpy(), cache.earlier[i].numpy(), n)
                self.join(layer.out, self.activated(layer.fc(h)))
        cache.advance(1)
        logits = torch.from_numpy(self.lm_head(self.norm(self.last_norm)))
        cap = config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def norm(self, norm: Callable[[Tensor], Tensor]) -> Tensor:
        """What a norm makes of x, (B, C)."""
        if self.config.norm != "rmsnorm":
            return norm(self.x_tensor)
        rms_norm(self.x, self.normed)
        return self.normed_tensor

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
        np.multiply(qk[:, 0], self.scale, out=self.queries)
        return qk[:, 1]

    def activated(self, hidden: Array) -> Tensor:
        """The MLP's non-linearity of `hidden` (B, F), which may be overwritten."""
        inner = self.inner
        if self.config.activation == "relu2":
            np.maximum(hidden, self.zero, out=hidden)
            np.multiply(hidden, hidden, out=inner)
            return self.inner_tensor
        if self.config.activation != "gelu" or hidden.size > ERF_PAYS_BELOW:
            return activate(torch.from_numpy(hidden), self.config.activation)
        np.multiply(hidden, self.sqrt_half, out=inner)
        torch.erf(self.inner_tensor, out=self.inner_tensor)
        np.add(inner, self.one, out=inner)
        np.multiply(hidden, self.half, out=hidden)
        np.multiply(hidden, inner, out=inner)  # ½ h (1 + erf(h / √2))
        return self.inner_tensor

    def shifted(self, h: Array, earlier: Array, n: int) -> Tensor:
        """`gptlit.model.shift_tokens` of position n: h (B, C), earlier (B, reach + capacity, S)."""
        reach = self.config.token_shift
        channels = self.config.shifted_channels
        width = channels // reach
        earlier[:, reach + n] = h[:, :channels]
        h = h.copy()  # without a norm it is the residual stream itself
        for k in range(reach):
            group = slice(k * width, (k + 1) * width)
            h[:, group] = earlier[:, reach + n - 1 - k, group]
        return torch.from_numpy(h)

    def join(self, affine: "LeanAffine", h: Tensor) -> None:
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

    __slots__ = ("bias", "out", "out_tensor", "packed", "weight")

    def __init__(self, affine: Affine, out: Tensor) -> None:
        self.weight, self.packed = affine.weight, affine.packed_for(len(out))
        self.bias = None if affine.bias is None else affine.bias.numpy()
        self.out, self.out_tensor = out.numpy(), out

    def __call__(self, x: Tensor) -> Array:
        if self.packed is None:
            torch.mm(x, self.weight, out=self.out_tensor)
            out = self.out
        else:
            out = packed_product(x, self.packed, None).numpy()
        return out if self.bias is None else np.add(out, self.bias, out=out)


class LeanLayer:
    """A block's norms and products, with the memory for what the products give."""

    __slots__ = ("fc", "norm_1", "norm_2", "out", "proj", "qkv")

    def __init__(self, layer: Layer, qkv: Tensor, branch: Tensor, hidden: Tensor) -> None:
        self.norm_1, self.norm_2 = layer.norm_1, layer.norm_2
        self.qkv, self.proj = LeanAffine(layer.qkv, qkv), LeanAffine(layer.proj, branch)
        self.fc = None if layer.fc is None else LeanAffine(layer.fc, hidden)
        self.out = None if layer.out is None else LeanAffine(layer.out, branch)
