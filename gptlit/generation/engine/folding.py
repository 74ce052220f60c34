"""Small operations of sampling folded into the neighbouring weights, once before the first token.

Of a layer norm, x ↦ g · (x - mean) / σ + β, gain g and bias β are folded into the matmul that follows. The mean is 0 if
every matmul and table that adds to the residual stream has output of mean 0, so x / √(mean of x²) remains, as in
RMSNorm (Ashkboos et al., arXiv:2401.15024). The 1 / √D of attention goes into the query weights, and the √½ inside GELU
into the matmuls around it. Each operation less is a few microseconds of a small model's token.

Shapes as in `gptlit.generation.engine.decoder`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gptlit.generation.engine.affine import Affine
from gptlit.generation.engine.decoder import Decoder, Layer, LayerNorm, Norm
from gptlit.generation.engine.limits import ERF_BELOW
from gptlit.model.block import RMS_NORM_EPS


@dataclass(frozen=True)
class Folded:
    """The weights of a decoder after folding.

    Args:
        eps: every norm is x / √(mean of x² + eps); None where the norms are still the layers' own.
        scaled: queries come out divided by √D.
        halved: `fc` of the MLP computes z = √½ h, and `out` expects √2 · gelu(h) = z (1 + erf z).
    """

    token_embedding: Tensor
    position_embedding: Tensor | None
    layers: list[Layer]
    last_norm: Norm
    lm_head: Affine
    eps: float | None
    scaled: bool
    halved: bool


def fold(decoder: Decoder, rows: int) -> Folded:
    """Fold what can be folded, for tokens of `rows` rows. The decoder is not changed."""
    config, norm = decoder.config, decoder.last_norm
    tokens, positions = decoder.token_embedding, decoder.position_embedding
    layers, lm_head = decoder.layers, decoder.lm_head
    eps = RMS_NORM_EPS if config.norm == "rmsnorm" else None
    scaled = not config.qk_norm  # QK-norm would remove the factor again
    halved = config.activation == "gelu" and rows * config.mlp_ratio * config.n_embd <= ERF_BELOW
    # With token shift the MLP sees zeros before the text begins, which is not what a folded norm gives.
    norms = isinstance(norm, LayerNorm) and not config.token_shift
    if isinstance(norm, LayerNorm) and norms:
        eps, lm_head, tokens = norm.eps, after(norm, lm_head), without_mean(tokens)
        positions = None if positions is None else without_mean(positions)
    scale, root = config.head_dim**-0.5 if scaled else 1.0, math.sqrt(0.5) if halved else 1.0
    layers = [folded_layer(layer, norms, scale, root) for layer in layers]
    return Folded(tokens, positions, layers, norm, lm_head, eps, scaled, halved)


def folded_layer(layer: Layer, norms: bool, scale: float, root: float) -> Layer:
    """Fold one block.

    Args:
        layer: the block.
        norms: fold the layer norms, so that x / √(mean of x²) remains of them.
        scale: factor of the queries.
        root: factor before and after the MLP's non-linearity.
    """
    qkv, proj, fc, out = layer.qkv, layer.proj, layer.fc, layer.out
    if norms or scale != 1:
        qkv = after(layer.norm_1 if norms else None, qkv)
        for part in (qkv.weight, qkv.bias):
            if part is not None:
                part[..., : part.size(-1) // 3] *= scale
    if norms:
        proj, out = centred(proj), None if out is None else centred(out)
    if fc is not None and (norms or root != 1):
        fc = after(layer.norm_2 if norms else None, fc, root)
    if out is not None and root != 1:
        out = Affine(out.weight * root, out.bias, None)
    return Layer(layer.norm_1, qkv, proj, layer.norm_2, fc, out)


def after(norm: Norm | None, affine: Affine, factor: float = 1.0) -> Affine:
    """Return factor · (W x + b) of a norm's output x, as a function of the normalised input: x̂ (g W) + (β W + b).

    The result has memory of its own.
    """
    weight, bias = affine.weight, affine.bias
    gain = torch.full_like(weight[:, 0], factor)  # (in,)
    if isinstance(norm, LayerNorm):
        gain *= norm.weight
        if norm.bias is not None:
            bias = norm.bias @ weight if bias is None else torch.addmv(bias, weight.t(), norm.bias)
    return Affine(weight * gain[:, None], None if bias is None else bias * factor, None)


def centred(affine: Affine) -> Affine:
    """Return the same affine map with the mean of its output removed."""
    bias = affine.bias
    return Affine(without_mean(affine.weight), None if bias is None else without_mean(bias), None)


def without_mean(rows: Tensor) -> Tensor:
    """Subtract the mean over the last axis."""
    return rows - rows.mean(-1, keepdim=True)
