"""One token on a CPU, in numpy where that is cheaper: what `Decoder.step` computes, from the same weights and cache.

A small model's token is over in the time of a hundred small operations, and each costs numpy half of what it costs
torch. What torch does in one operation (norms, softmax, GELU), and the products with the weights, stays torch's, on the
same memory.

Shapes as in `gptlit.model`: B sequences, C channels, H heads of D channels, V symbols.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gptlit.decode import Affine, Decoder, Layer
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
        self.last_norm = decoder.last_norm
        self.tokens = decoder.tokens.numpy()  # (V, C)
        self.places = None if decoder.places is None else decoder.places.numpy()  # (block_size, C)
        self.layers = [LeanLayer(layer) for layer in decoder.layers]
        self.lm_head = LeanAffine(decoder.lm_head)
        self.rotations: tuple[Array, Array] | None = None
        if decoder.cos is not None and decoder.sin is not None:
            # (block_size, 2, D / 2) each: channel i of a head turns with channel i + D/2
            cos, sin = decoder.cos.numpy(), decoder.sin.numpy()
            self.rotations = cos.reshape(-1, 2, D // 2), sin.reshape(-1, 2, D // 2)

        def buffer(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=decoder.tokens.dtype)

        # The same memory for torch and for numpy: each view costs as much as an operation.
        self.x_tensor, self.hidden_tensor, self.inner_tensor = buffer(B, C), buffer(B, F), buffer(B, F)
        self.x, self.hidden, self.inner = self.x_tensor.numpy(), self.hidden_tensor.numpy(), self.inner_tensor.numpy()
        self.logits_tensor = buffer(B, config.vocab_size)
        self.logits = self.logits_tensor.numpy()
        self.branch = buffer(B, C).numpy()
        self.qkv = buffer(B, 3 * C).numpy()
        self.q, self.k, self.v = self.qkv.reshape(B, 3, H, D).swapaxes(0, 1)  # (B, H, D) each
        self.qk = self.qkv.reshape(B, 3, H, D)[:, :2]  # (B, 2, H, D)
        self.gathered = buffer(B, H, 1, D).numpy()
        # As arrays: a Python number would be turned into one at every use.
        self.scale, self.sqrt_half, self.half, self.one = (
            np.asarray(number, self.x.dtype) for number in (D**-0.5, math.sqrt(0.5), 0.5, 1)
        )

    @staticmethod
    def serves(decoder: Decoder) -> bool:
        """Whether the weights lie where numpy can read them, in a precision that it computes in."""
        tokens = decoder.tokens
        return type(tokens) is Tensor and tokens.device.type == "cpu" and tokens.dtype in (torch.float32, torch.float64)

    def __call__(self, ids: Tensor, cache: KVCache) -> Tensor:
        n, B, config = cache.length, len(ids), self.config
        if cache.row_lengths is not None or not 0 < n < cache.capacity:
            return self.decoder(ids[:, None], cache=cache)
        seen = zip(cache.keys.numpy()[..., : n + 1, :], cache.values.numpy()[..., : n + 1, :], strict=True)
        scores_tensor = torch.empty(B, config.n_head, 1, n + 1, dtype=self.x_tensor.dtype)
        scores, x, gathered = scores_tensor.numpy(), self.x, self.gathered.reshape(B, -1)
        np.take(self.tokens, ids.numpy(), axis=0, out=x)
        if self.places is not None:
            np.add(x, self.places[n], out=x)
        if config.norm == "rmsnorm":
            x[:] = rms_norm(x)
        for i, (layer, (keys, values)) in enumerate(zip(self.layers, seen, strict=True)):
            layer.qkv(self.normed(layer.norm_1), self.qkv)
            q, k = self.queries_and_keys(n)  # (B, H, D) each
            keys[:, :, n] = k
            values[:, :, n] = self.v
            np.matmul(q[:, :, None], keys.swapaxes(2, 3), out=scores)  # (B, H, 1, n + 1)
            np.matmul(scores_tensor.softmax(-1).numpy(), values, out=self.gathered)  # (B, H, 1, D)
            self.join(layer.proj, gathered)
            if layer.fc is not None and layer.out is not None:
                h = self.normed(layer.norm_2)  # (B, C)
                if cache.earlier is not None:
                    h = self.shifted(h, cache.earlier[i].numpy(), n)
                layer.fc(h, self.hidden)
                self.join(layer.out, self.activated())
        cache.advance(1)
        self.lm_head(self.normed(self.last_norm), self.logits)
        cap = config.logit_softcap
        return self.logits_tensor if cap is None else cap * torch.tanh(self.logits_tensor / cap)

    def normed(self, norm: Callable[[Tensor], Tensor]) -> Array:
        """What a norm makes of x."""
        return rms_norm(self.x) if self.config.norm == "rmsnorm" else norm(self.x_tensor).numpy()

    def queries_and_keys(self, n: int) -> tuple[Array, Array]:
        """Queries, divided by √D, and keys (B, H, D) of position n, rotated and normalised where the model does."""
        if self.rotations is None and not self.config.qk_norm:
            return np.multiply(self.q, self.scale, out=self.q), self.k
        qk = self.qk
        if self.rotations is not None:
            cos, sin = self.rotations[0][n], self.rotations[1][n]  # (2, D / 2)
            halves = qk.reshape(*qk.shape[:3], 2, -1)  # (B, 2, H, 2, D / 2)
            turned = halves * cos
            turned += halves[..., ::-1, :] * sin
            qk = turned.reshape(qk.shape)
        if self.config.qk_norm:
            qk = rms_norm(qk)
        return qk[:, 0] * self.scale, qk[:, 1]

    def activated(self) -> Array:
        """The MLP's non-linearity of `hidden`, which may be overwritten."""
        hidden, inner = self.hidden, self.inner
        if self.config.activation == "relu2":
            np.maximum(hidden, 0, out=hidden)
            return np.multiply(hidden, hidden, out=hidden)
        if self.config.activation != "gelu" or hidden.size > ERF_PAYS_BELOW:
            return activate(self.hidden_tensor, self.config.activation).numpy()
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
        if not self.config.residual:
            affine(h, self.x)
            return
        affine(h, self.branch)
        np.add(self.x, self.branch, out=self.x)


def rms_norm(x: Array) -> Array:
    """`gptlit.model.rms_norm` in numpy."""
    size = np.vecdot(x, x)
    size *= 1 / x.shape[-1]
    size += RMS_NORM_EPS
    return x / np.sqrt(size, out=size)[..., None]


class LeanAffine:
    """X W + b into memory that is there, with W (in, out) as `Affine` has it.

    The product is torch's: numpy's BLAS has threads of its own, and where torch's wait for work on the same cores, each
    of its products takes milliseconds.
    """

    __slots__ = ("bias", "weight")

    def __init__(self, affine: Affine) -> None:
        self.weight = affine.weight
        self.bias = None if affine.bias is None else affine.bias.numpy()

    def __call__(self, x: Array, out: Array) -> None:
        torch.mm(torch.from_numpy(x), self.weight, out=torch.from_numpy(out))
        if self.bias is not None:
            np.add(out, self.bias, out=out)


class LeanLayer:
    """A block's norms and products."""

    __slots__ = ("fc", "norm_1", "norm_2", "out", "proj", "qkv")

    def __init__(self, layer: Layer) -> None:
        self.norm_1, self.norm_2 = layer.norm_1, layer.norm_2
        self.qkv, self.proj = LeanAffine(layer.qkv), LeanAffine(layer.proj)
        self.fc = None if layer.fc is None else LeanAffine(layer.fc)
        self.out = None if layer.out is None else LeanAffine(layer.out)
