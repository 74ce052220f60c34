"""Small operations of sampling moved into the weights beside them, ahead of the first token.

A small model's token is over in the time of a hundred operations, and each costs more to begin than to do. Of a layer
norm, x ↦ g · (x - mean) / σ + β, the gain g and the bias β go into the product behind it. The mean is 0 when every
product and table that adds to the residual stream gives numbers of mean 0, so what is left is x / √(mean of x²): the
same as of RMSNorm (Ashkboos et al., arXiv:2401.15024). The 1 / √D of attention goes into the queries' weights, and the
√½ inside of GELU into the products around it.

Shapes as in `gptlit.generation.engine.decoder`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gptlit.generation.engine.affine import Affine, packing_pays
from gptlit.generation.engine.decoder import ERF_PAYS_BELOW, Decoder, Layer, LayerNorm, Norm
from gptlit.model.gpt import RMS_NORM_EPS


@dataclass(frozen=True)
class Folded:
    """The weights of a decoder, and what is left to do beside the products with them.

    Args:
        eps: every norm is x / √(mean of x² + eps); None where they are still the layers' own.
        scaled: queries come out divided by √D.
        halved: the MLP's `fc` gives z = √½ h and its `out` expects √2 · gelu(h), which is z (1 + erf z).
    """

    tokens: Tensor
    places: Tensor | None
    layers: list[Layer]
    last_norm: Norm
    lm_head: Affine
    eps: float | None
    scaled: bool
    halved: bool


def fold(decoder: Decoder, rows: int) -> Folded:
    """Folds what can be folded, for tokens of so many rows. The decoder stays as it is.

    Where products are so large, or of so many rows, that small operations beside them do not matter, nothing is.
    """
    config, norm = decoder.config, decoder.last_norm
    tokens, places, layers, lm_head = decoder.tokens, decoder.places, decoder.layers, decoder.lm_head
    eps = RMS_NORM_EPS if config.norm == "rmsnorm" else None
    products = [lm_head, *(product for layer in layers for product in (layer.qkv, layer.proj, layer.fc, layer.out))]
    if any(product is not None and packing_pays(rows, product.weight) for product in products):
        return Folded(tokens, places, layers, norm, lm_head, eps, scaled=False, halved=False)
    scaled = not config.qk_norm  # a norm would take the factor out again
    halved = config.activation == "gelu" and rows * config.mlp_ratio * config.n_embd <= ERF_PAYS_BELOW
    # Before the text begins, an MLP that looks back sees zeros, not what a norm makes of anything.
    norms = isinstance(norm, LayerNorm) and not config.token_shift
    if isinstance(norm, LayerNorm) and norms:
        eps, lm_head, tokens = norm.eps, behind(norm, lm_head), without_mean(tokens)
        places = None if places is None else without_mean(places)
    scale, root = config.head_dim**-0.5 if scaled else 1.0, math.sqrt(0.5) if halved else 1.0
    layers = [folded_layer(layer, norms, scale, root) for layer in layers]
    return Folded(tokens, places, layers, norm, lm_head, eps, scaled, halved)


def folded_layer(layer: Layer, norms: bool, scale: float, root: float) -> Layer:
    """A block whose queries come out `scale` times as large, whose MLP expects `root` before and behind its
    non-linearity, and of whose `norms` only x / √(mean of x²) is left to do.
    """
    qkv, proj, fc, out = layer.qkv, layer.proj, layer.fc, layer.out
    if norms or scale != 1:
        qkv = behind(layer.norm_1 if norms else None, qkv)
        for part in (qkv.weight, qkv.bias):
            if part is not None:
                part[..., : part.size(-1) // 3] *= scale
    if norms:
        proj, out = centred(proj), None if out is None else centred(out)
    if fc is not None and (norms or root != 1):
        fc = behind(layer.norm_2 if norms else None, fc, root)
    if out is not None and root != 1:
        out = Affine(out.weight * root, out.bias, None)
    return Layer(layer.norm_1, qkv, proj, layer.norm_2, fc, out)


def behind(norm: Norm | None, affine: Affine, factor: float = 1.0) -> Affine:
    """`factor` times W x + b, in memory of its own; x is what is left of the norm: x̂ (g W) + (β W + b)."""
    weight, bias = affine.weight, affine.bias
    gain = torch.full_like(weight[:, 0], factor)  # (in,)
    if isinstance(norm, LayerNorm):
        gain *= norm.weight
        if norm.bias is not None:
            bias = norm.bias @ weight if bias is None else torch.addmv(bias, weight.t(), norm.bias)
    return Affine(weight * gain[:, None], None if bias is None else bias * factor, None)


def centred(affine: Affine) -> Affine:
    """The same product without the mean of what it gives."""
    bias = affine.bias
    return Affine(without_mean(affine.weight), None if bias is None else without_mean(bias), None)


def without_mean(rows: Tensor) -> Tensor:
    return rows - rows.mean(-1, keepdim=True)
