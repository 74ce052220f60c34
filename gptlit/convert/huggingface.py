"""Our names and theirs: `GPTConfig` and weights as transformers' GPT2LMHeadModel or NanoChatForCausalLM, both ways.

Two dialects of `GPTConfig` have an architecture of the same function in transformers; `architecture_of` decides. The
weights keep their values. Only names, layout and, for GPT-2, biases that are zero or moved are different.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from gptlit.errors import UserError
from gptlit.model.config import GPTConfig
from gptlit.model.gpt import GPT, RMS_NORM_EPS

Weights = dict[str, Tensor]

GPT2, NANOCHAT = "GPT2LMHeadModel", "NanoChatForCausalLM"
REQUIRED: dict[str, dict[str, Any]] = {
    GPT2: {
        "position": "learned",
        "norm": "layernorm",
        "residual": True,
        "qk_norm": False,
        "logit_softcap": None,
    },
    NANOCHAT: {
        "position": "rope",
        "norm": "rmsnorm",
        "residual": True,
        "qk_norm": True,
        "bias": False,
        "qkv_bias": False,
    },
}
WITHOUT_EFFECT = {"dropout", "attention_dropout", "embedding_dropout", "token_noise", "init"}  # once trained
SIZES = {"vocab_size", "block_size", "n_layer", "n_head", "n_embd", "mlp_ratio"}
EXPRESSED = {
    GPT2: SIZES | WITHOUT_EFFECT | {"bias", "qkv_bias", "activation", "tie_weights", "rope_base"},
    NANOCHAT: SIZES | WITHOUT_EFFECT | {"activation", "tie_weights", "rope_base", "logit_softcap"},
}  # fields that may have any value; what is in neither table must be as it is by default
ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_new", "relu2": "relu2"}  # ours: theirs
LAYER_NORM_EPS = 1e-5  # torch's default, and GPT-2's
HEAD_BIAS_TOLERANCE = 1e-6
# May stand under `gptlit` in a config.json.
SAID = ("bias", "qkv_bias", "dropout", "embedding_dropout", "token_noise", "init")


def architecture_of(gpt: GPTConfig) -> str:
    """The class of transformers that computes the same function.

    Raises:
        UserError: when there is none; names what stands in the way of the nearer one.
    """
    obstacles = {
        name: [
            f"model.gpt.{field} {show(getattr(gpt, field))} (it has {show(value)})"
            for field, value in required_of(name, gpt).items()
            if getattr(gpt, field) != value
        ]
        + [f"model.gpt.{field} 0 (it has 1 or more)" for field in ("n_layer", "mlp_ratio") if getattr(gpt, field) == 0]
        for name in REQUIRED
    }
    nearest = min(obstacles, key=lambda name: len(obstacles[name]))
    if obstacles[nearest]:
        raise UserError(
            f"this model has no counterpart in transformers: {nearest}, the nearest, cannot express "
            + ", nor ".join(obstacles[nearest])
        )
    return nearest


def required_of(architecture: str, gpt: GPTConfig) -> dict[str, Any]:
    """What each field must be that the architecture has no word for: so a switch that is new here is refused there."""
    unknown = {field.name: field.default for field in fields(gpt) if field.name not in EXPRESSED[architecture]}
    return unknown | REQUIRED[architecture]


def show(value: Any) -> str:
    """A value as YAML writes it."""
    return json.dumps(value).strip('"')


# ---------------------------------------------------------------- to theirs


@torch.no_grad()
def to_huggingface(model: GPT) -> tuple[Any, Weights]:
    """The configuration object of transformers, and the weights under its names, float32.

    Raises:
        UserError: when the model has no counterpart, or a bias of its head that has no place in GPT-2.
    """
    gpt, transformers = model.config, import_transformers()
    ours = {name: tensor.float() for name, tensor in model.state_dict().items()}
    # No token ends a text or fills it up: every id is a symbol, and nothing may stop at one.
    no_special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    with quiet_transformers():
        if architecture_of(gpt) == GPT2:
            config = transformers.GPT2Config(
                vocab_size=gpt.vocab_size,
                n_positions=gpt.block_size,
                n_embd=gpt.n_embd,
                n_layer=gpt.n_layer,
                n_head=gpt.n_head,
                n_inner=gpt.mlp_ratio * gpt.n_embd,
                activation_function=ACTIVATIONS[gpt.activation],
                resid_pdrop=gpt.dropout,
                embd_pdrop=gpt.embedding_dropout,
                attn_pdrop=gpt.attention_dropout,
                layer_norm_epsilon=LAYER_NORM_EPS,
                tie_word_embeddings=gpt.tie_weights,
                gptlit=also_said(gpt, "bias", "qkv_bias", "token_noise", "init"),
                **no_special,
            )
            return config, gpt2_weights(ours)
        config = transformers.NanoChatConfig(
            vocab_size=gpt.vocab_size,
            max_position_embeddings=gpt.block_size,
            hidden_size=gpt.n_embd,
            num_hidden_layers=gpt.n_layer,
            num_attention_heads=gpt.n_head,
            num_key_value_heads=gpt.n_head,
            intermediate_size=gpt.mlp_ratio * gpt.n_embd,
            hidden_act=ACTIVATIONS[gpt.activation],
            attention_dropout=gpt.attention_dropout,
            rms_norm_eps=RMS_NORM_EPS,
            rope_parameters={"rope_type": "default", "rope_theta": gpt.rope_base},
            final_logit_softcapping=gpt.logit_softcap,
            tie_word_embeddings=gpt.tie_weights,
            gptlit=also_said(gpt, "dropout", "embedding_dropout", "token_noise", "init"),
            **no_special,
        )
        return config, nanochat_weights(ours)


def also_said(gpt: GPTConfig, *names: str) -> dict[str, Any]:
    """What the configuration of transformers has no word for, kept beside it for `config_from_huggingface`."""
    return {name: getattr(gpt, name) for name in names}


def gpt2_weights(ours: Mapping[str, Tensor]) -> Weights:
    """Ours as GPT-2's: projections transposed to (in, out), missing biases as zeros, a bias of the head moved."""
    theirs: Weights = {}
    for name, tensor in ours.items():
        theirs[name] = tensor.t().contiguous() if is_projection(name) else tensor
        if name.endswith(".weight") and (is_projection(name) or ".ln_" in name):
            # The output axis comes first with us.
            theirs.setdefault(name.removesuffix("weight") + "bias", tensor.new_zeros(tensor.size(0)))
    head_bias = theirs.pop("lm_head.bias", None)
    if head_bias is not None:
        theirs["transformer.ln_f.bias"] = move_head_bias(
            theirs["lm_head.weight"], head_bias, theirs["transformer.ln_f.bias"]
        )
    return theirs


def is_projection(name: str) -> bool:
    """Whether a weight is one of those that GPT-2 keeps as (in, out) and we as (out, in)."""
    return name.startswith("transformer.h.") and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def move_head_bias(weight: Tensor, bias: Tensor, norm_bias: Tensor) -> Tensor:
    """β' (C,) such that W β' = W β + b, for a head W (V, C) with bias b (V,) after a LayerNorm with bias β (C,).

    GPT2LMHeadModel's head has no bias. With no more symbols than channels, W's rows are in general independent and
    the smallest δ with W δ = b, the least-squares solution, meets b exactly.

    Raises:
        UserError: when b is not in the span of W's columns.
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
            f"model.gpt.bias true with model.gpt.tie_weights false gives the head a bias, which {GPT2} has not, and "
            f"it cannot be moved into the last LayerNorm ({V} symbols, {C} channels; {error:.1e} would be left over): "
            "train with one of the two changed, or with at least as many channels as symbols"
        )
    return moved


NANOCHAT_NAMES = {
    "attn.c_proj.weight": "self_attn.o_proj.weight",
    "mlp.c_fc.weight": "mlp.fc1.weight",
    "mlp.c_proj.weight": "mlp.fc2.weight",
}  # of one block; ours: theirs


def nanochat_weights(ours: Mapping[str, Tensor]) -> Weights:
    """Ours as NanoChat's: the joint projection (3C, C) in three, everything else by another name."""
    theirs = {"model.embed_tokens.weight": ours["transformer.wte.weight"], "lm_head.weight": ours["lm_head.weight"]}
    for name, tensor in ours.items():
        if not name.startswith("transformer.h."):
            continue
        layer, part = name.removeprefix("transformer.h.").split(".", 1)
        if part == "attn.c_attn.weight":
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):  # (C, C) each
                theirs[f"model.layers.{layer}.self_attn.{letter}_proj.weight"] = third.contiguous()
        else:
            theirs[f"model.layers.{layer}.{NANOCHAT_NAMES[part]}"] = tensor
    return theirs


# ---------------------------------------------------------------- from theirs


def config_from_huggingface(config: Any) -> GPTConfig:
    """The architecture of a configuration object of transformers.

    Raises:
        UserError: when it is not GPT-2's or NanoChat's, or asks for what our model has not; names the setting.
    """
    kind = getattr(config, "model_type", None)
    if kind == "gpt2":
        width, inner = config.n_embd, config.n_inner or 4 * config.n_embd
        refuse_unless(
            config, layer_norm_epsilon=LAYER_NORM_EPS, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False,
            add_cross_attention=False,
        )  # fmt: skip
        settings: dict[str, Any] = {
            **REQUIRED[GPT2],
            "bias": True,
            "qkv_bias": True,
            "init": "scaled",
            "dropout": float(config.resid_pdrop),
            "attention_dropout": float(config.attn_pdrop),
            "embedding_dropout": float(config.embd_pdrop),
        }
        activation = config.activation_function
    elif kind == "nanochat":
        width, inner = config.hidden_size, config.intermediate_size
        heads = config.num_attention_heads
        refuse_unless(config, num_key_value_heads=heads, attention_bias=False, rms_norm_eps=RMS_NORM_EPS)
        rope = config.rope_parameters
        if rope.get("rope_type") != "default":
            raise UserError(f"its rope_parameters are {rope}; gptlit has the default kind")
        settings = {
            **REQUIRED[NANOCHAT],
            "attention_dropout": float(config.attention_dropout),
            "rope_base": float(rope["rope_theta"]),
            "logit_softcap": config.final_logit_softcapping,
        }
        activation = config.hidden_act
    else:
        raise UserError(f"its model_type is {kind!r}; gptlit reads gpt2 and nanochat")
    ours = {theirs: name for name, theirs in ACTIVATIONS.items()} | {"gelu_pytorch_tanh": "gelu_tanh"}
    if activation not in ours:
        raise UserError(f"its activation is {activation!r}; gptlit has {', '.join(ours)}")
    if inner % width:
        raise UserError(f"its MLP is {inner} wide; gptlit needs a multiple of the {width} channels")
    said = getattr(config, "gptlit", None) or {}
    return GPTConfig(
        vocab_size=config.vocab_size,
        block_size=config.max_position_embeddings,
        n_layer=config.num_hidden_layers,
        n_head=config.num_attention_heads,
        n_embd=width,
        mlp_ratio=inner // width,
        tie_weights=config.tie_word_embeddings,
        **settings | {"activation": ours[activation]} | {name: said[name] for name in SAID if name in said},
    )


def refuse_unless(config: Any, **needed: Any) -> None:
    """Raises `UserError` for the first setting of a configuration that is not what our model does."""
    for name, value in needed.items():
        if getattr(config, name) != value:
            raise UserError(f"its {name} is {getattr(config, name)}; gptlit has {value} only")


def weights_from_huggingface(gpt: GPTConfig, theirs: Mapping[str, Tensor]) -> Weights:
    """The weights under our names, of a model whose configuration became `gpt`.

    Raises:
        UserError: when `gpt` has no place for a bias that is not zero.
    """
    if gpt.position == "rope":
        return weights_from_nanochat(gpt, theirs)
    ours: Weights = {}
    for name, tensor in theirs.items():
        is_qkv = name.endswith("attn.c_attn.bias")
        if name.endswith(".bias") and not (gpt.qkv_bias if is_qkv else gpt.bias):
            if bool(tensor.any()):
                raise UserError(
                    f"its {name} is not zero, although config.json says that it has no such bias: it was trained on "
                    "after its export; take the entry `gptlit` out of config.json"
                )
            continue
        ours[name] = tensor.t().contiguous() if is_projection(name) else tensor
    if gpt.tie_weights:
        ours["lm_head.weight"] = ours["transformer.wte.weight"]
    elif gpt.bias:
        ours["lm_head.bias"] = ours["lm_head.weight"].new_zeros(ours["lm_head.weight"].size(0))
    return ours


def weights_from_nanochat(gpt: GPTConfig, theirs: Mapping[str, Tensor]) -> Weights:
    """The inverse of `nanochat_weights`."""
    table = theirs["model.embed_tokens.weight"]
    ours = {"transformer.wte.weight": table, "lm_head.weight": table if gpt.tie_weights else theirs["lm_head.weight"]}
    for layer in range(gpt.n_layer):
        of_them, of_us = f"model.layers.{layer}.", f"transformer.h.{layer}."
        thirds = [theirs[f"{of_them}self_attn.{letter}_proj.weight"] for letter in "qkv"]  # (C, C) each
        ours[f"{of_us}attn.c_attn.weight"] = torch.cat(thirds)  # (3C, C)
        ours |= {of_us + mine: theirs[of_them + name] for mine, name in NANOCHAT_NAMES.items()}
    return ours


# ---------------------------------------------------------------- the library


def import_transformers() -> Any:
    """The library, which is an extra of ours. Raises `UserError` when it is missing."""
    try:
        import safetensors  # noqa: F401
        import transformers
    except ImportError as error:
        raise UserError("Hugging Face folders need transformers and safetensors: pip install 'gptlit[hf]'") from error
    return transformers


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Neither advice, retries nor progress bars of transformers and its hub inside the block."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    level, hub_level, bars = logging.get_verbosity(), hub_logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        hub_logging.set_verbosity(hub_level)
        if bars:
            logging.enable_progress_bar()
