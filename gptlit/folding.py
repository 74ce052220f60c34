"""Small operations of sampling moved into the weights beside them, ahead of the first token.

A small model's token is over in the time of a hundred operations, and each costs more to begin than to do. Of a layer
norm, x ↦ g · (x - mean) / σ + β, the gain g and the bias β go into the product behind it. The mean is 0 when every
product and table that adds to the residual stream gives numbers of mean 0, so what is left is x / √(mean of x²): the
same as of RMSNorm (Ashkboos et al., arXiv:2401.15024). The 1 / √D of attention goes into the queries' weights, and the
√½ inside of GELU into the products around it.

Shapes as in `gptlit.decode`.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gptlit.affine import Affine
from gptlit.decode import Decoder, Layer, LayerNorm, Norm
from gptlit.model import RMS_NORM_EPS


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


def fold(decoder: Decoder, gelu: bool) -> Folded:
    """Folds what can be folded: with `gelu` the non-linearity too. The decoder stays as it is.

    Where weights are packed, nothing is: they are large, and small operations beside them do not matter.
    """
    config = decoder.config
    eps = RMS_NORM_EPS if config.norm == "rmsnorm" else None
    weights = Folded(
        decoder.tokens, decoder.places, decoder.layers, decoder.last_norm, decoder.lm_head, eps, False, False
    )
    products = [decoder.lm_head, *(product for layer in decoder.layers for product in products_of(layer))]
    if any(product.packed is not None for product in products):
        return weights
    if not config.qk_norm:  # a norm would take the factor out again
        weights = with_scaled_queries(weights, config.head_dim**-0.5)
    if gelu and config.activation == "gelu":
        weights = with_halved_gelu(weights)
    # Before the text begins, an MLP that looks back sees zeros, not β.
    if isinstance(decoder.last_norm, LayerNorm) and not config.token_shift:
        weights = without_layer_norms(weights, decoder.last_norm.eps)
    return weights


def products_of(layer: Layer) -> list[Affine]:
    return [product for product in (layer.qkv, layer.proj, layer.fc, layer.out) if product is not None]


def with_scaled_queries(weights: Folded, scale: float) -> Folded:
    def scaled(qkv: Affine) -> Affine:
        factors = torch.ones_like(qkv.weight[0])  # (3C,)
        factors[: len(factors) // 3] = scale
        return Affine(qkv.weight * factors, None if qkv.bias is None else qkv.bias * factors, None)

    return replace(weights, layers=[replace(layer, qkv=scaled(layer.qkv)) for layer in weights.layers], scaled=True)


def with_halved_gelu(weights: Folded) -> Folded:
    root = math.sqrt(0.5)

    def halved(layer: Layer) -> Layer:
        if layer.fc is None or layer.out is None:
            return layer
        fc = Affine(layer.fc.weight * root, None if layer.fc.bias is None else layer.fc.bias * root, None)
        return replace(layer, fc=fc, out=Affine(layer.out.weight * root, layer.out.bias, None))

    return replace(weights, layers=[halved(layer) for layer in weights.layers], halved=True)


def without_layer_norms(weights: Folded, eps: float) -> Folded:
    layers = [
        replace(
            layer,
            qkv=behind_norm(layer.norm_1, layer.qkv),
            proj=centred(layer.proj),
            fc=None if layer.fc is None else behind_norm(layer.norm_2, layer.fc),
            out=None if layer.out is None else centred(layer.out),
        )
        for layer in weights.layers
    ]
    return replace(
        weights,
        tokens=without_mean(weights.tokens),
        places=None if weights.places is None else without_mean(weights.places),
        layers=layers,
        lm_head=behind_norm(weights.last_norm, weights.lm_head),
        eps=eps,
    )


def behind_norm(norm: Norm, affine: Affine) -> Affine:
    """W and b of the product that takes what is left of the norm: x̂ (g W) + (β W + b)."""
    assert isinstance(norm, LayerNorm)
    bias = affine.bias
    if norm.bias is not None:
        bias = norm.bias @ affine.weight if bias is None else torch.addmv(bias, affine.weight.t(), norm.bias)
    return Affine(affine.weight * norm.weight[:, None], bias, None)


def centred(affine: Affine) -> Affine:
    """The same product without the mean of what it gives."""
    bias = affine.bias
    return Affine(without_mean(affine.weight), None if bias is None else without_mean(bias), None)


def without_mean(rows: Tensor) -> Tensor:
    return rows - rows.mean(-1, keepdim=True)
