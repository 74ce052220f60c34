"""GPT-2's weights: all biases present, and no bias in the head."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from gptlit.errors import UserError
from gptlit.model.config import GPTConfig
from gptlit.model.gpt import GPT

Weights = dict[str, Tensor]

HEAD_BIAS_TOLERANCE = 1e-6  # of the largest logit


def with_all_biases(weights: Mapping[str, Tensor]) -> Weights:
    """Return the weights of a `GPT` in float32 with missing biases as zeros and the bias of the head moved.

    Names and layout stay ours: projections are (out, in).

    Raises:
        UserError: if the bias of the head cannot be moved.
    """
    ours = {name: tensor.float() for name, tensor in weights.items()}
    for name, tensor in list(ours.items()):
        if name.endswith(".weight") and (is_projection(name) or ".ln_" in name):
            ours.setdefault(name.removesuffix("weight") + "bias", tensor.new_zeros(tensor.size(0)))
    head_bias = ours.pop("lm_head.bias", None)
    if head_bias is not None:
        name = "transformer.ln_f.bias"
        ours[name] = move_head_bias(ours["lm_head.weight"], head_bias, ours[name])
    return ours


def model_with_all_biases(gpt: GPTConfig, weights: Mapping[str, Tensor]) -> GPT:
    """Return the `GPT` that has the weights of `with_all_biases`, to check an exported file."""
    model = GPT(replace(gpt, bias=True, qkv_bias=True))
    head = {} if gpt.tie_weights else {"lm_head.bias": torch.zeros(gpt.vocab_size)}
    model.load_state_dict({**weights, **head})
    return model.eval()


def is_projection(name: str) -> bool:
    """Whether a weight is one of those that transformers' GPT-2 stores as (in, out) and we as (out, in)."""
    return name.startswith("transformer.h.") and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def move_head_bias(weight: Tensor, bias: Tensor, norm_bias: Tensor) -> Tensor:
    """Return β' (C,) such that W β' = W β + b, for a head W (V, C) with bias b (V,) after a LayerNorm with bias β (C,).

    GPT-2's head has no bias. With V <= C, the rows of W are in general independent, and the least-squares solution δ of
    W δ = b is exact.

    Raises:
        UserError: if b is not in the span of W's columns.
    """
    if not bool(bias.any()):
        return norm_bias
    W, b, before = weight.double(), bias.double(), norm_bias.double()
    moved = (before + torch.linalg.lstsq(W, b[:, None]).solution[:, 0]).float()
    target = W @ before + b  # (V,)
    error = float((W @ moved.double() - target).abs().max())
    if not error <= HEAD_BIAS_TOLERANCE * max(1.0, float(target.abs().max())):
        V, C = weight.shape
        raise UserError(
            "model.gpt.bias true with model.gpt.tie_weights false gives the head a bias, which GPT-2 has not, and it "
            f"cannot be moved into the last LayerNorm ({V} tokens, {C} channels; residual {error:.1e}): train with one "
            "of the two changed, or with at least as many channels as tokens"
        )
    return moved
