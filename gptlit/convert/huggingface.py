"""`GPTConfig` and weights as transformers' GPT2LMHeadModel or NanoChatForCausalLM, both ways.

Weights keep their values; names and layout differ, and for GPT-2 the biases that are zero or moved.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gptlit.convert.dialects import GPT2, NANOCHAT, require_dialect
from gptlit.convert.gpt2_weights import Weights, is_projection, with_all_biases
from gptlit.convert.libraries import import_transformers, quiet_transformers
from gptlit.errors import UserError
from gptlit.model.block import RMS_NORM_EPS
from gptlit.model.config import GPTConfig
from gptlit.model.gpt import GPT

ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_new", "relu2": "relu2"}  # ours: theirs
LAYER_NORM_EPS = 1e-5  # default of torch and of GPT-2
# Fields kept under `gptlit` in config.json, because the configuration of transformers has no field for them.
KEPT = {
    GPT2: ("bias", "qkv_bias", "token_noise", "init"),
    NANOCHAT: ("dropout", "embedding_dropout", "token_noise", "init"),
}


# ---------------------------------------------------------------- to transformers


@torch.no_grad()
def to_huggingface(model: GPT) -> tuple[Any, Weights]:
    """Return the configuration object of transformers, and the weights under its names in float32.

    Raises:
        UserError: if the model has no counterpart, or the bias of its head has no place in GPT-2.
    """
    gpt = model.config
    dialect = require_dialect(gpt, GPT2, NANOCHAT)
    weights = {name: tensor.float() for name, tensor in model.state_dict().items()}
    shared = {
        # No token starts, ends or pads a text: generation must not stop at one of them.
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
        "tie_word_embeddings": gpt.tie_weights,
        "gptlit": {name: getattr(gpt, name) for name in KEPT[dialect]},
    }
    with quiet_transformers():
        if dialect is GPT2:
            return gpt2_config(gpt, shared), gpt2_weights(weights)
        return nanochat_config(gpt, shared), nanochat_weights(weights)


def gpt2_config(gpt: GPTConfig, shared: Mapping[str, Any]) -> Any:
    """Return a `transformers.GPT2Config`."""
    return import_transformers().GPT2Config(
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
        # The text-generation pipeline of transformers 4.57 uses its own temperature of 0.7 without this.
        task_specific_params={"text-generation": generation_settings(gpt.block_size)},
        **shared,
    )


def nanochat_config(gpt: GPTConfig, shared: Mapping[str, Any]) -> Any:
    """Return a `transformers.NanoChatConfig`."""
    return import_transformers().NanoChatConfig(
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
        **shared,
    )


def generation_settings(block_size: int) -> dict[str, Any]:
    """Return settings with which `generate` samples from the model's own distribution, up to a full context."""
    return {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_length": block_size}


def gpt2_weights(ours: Mapping[str, Tensor]) -> Weights:
    """Return our weights as GPT-2's: projections transposed to (in, out), and every bias present."""
    return {
        name: tensor.t().contiguous() if is_projection(name) else tensor
        for name, tensor in with_all_biases(ours).items()
    }


NANOCHAT_NAMES = {
    "attn.c_proj.weight": "self_attn.o_proj.weight",
    "mlp.c_fc.weight": "mlp.fc1.weight",
    "mlp.c_proj.weight": "mlp.fc2.weight",
}  # of one block; ours: theirs


def nanochat_weights(ours: Mapping[str, Tensor]) -> Weights:
    """Return our weights as NanoChat's: the joint projection (3C, C) as three, the rest under other names."""
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


# ---------------------------------------------------------------- from transformers


def config_from_huggingface(config: Any) -> GPTConfig:
    """Return the architecture of a configuration object of transformers.

    Raises:
        UserError: if it is not GPT-2 or NanoChat, or asks for something that our model cannot compute; names the
            setting.
    """
    kind = getattr(config, "model_type", None)
    if kind == "gpt2":
        width, inner = config.n_embd, config.n_inner or 4 * config.n_embd
        refuse_unless(
            config, layer_norm_epsilon=LAYER_NORM_EPS, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False,
            add_cross_attention=False,
        )  # fmt: skip
        settings: dict[str, Any] = {
            **GPT2.fixed,
            "bias": True,
            "qkv_bias": True,
            "init": "scaled",
            "dropout": float(config.resid_pdrop),
            "attention_dropout": float(config.attn_pdrop),
            "embedding_dropout": float(config.embd_pdrop),
        }
        dialect, activation = GPT2, config.activation_function
    elif kind == "nanochat":
        width, inner = config.hidden_size, config.intermediate_size
        heads = config.num_attention_heads
        refuse_unless(config, num_key_value_heads=heads, attention_bias=False, rms_norm_eps=RMS_NORM_EPS)
        rope = config.rope_parameters
        if rope.get("rope_type") != "default":
            raise UserError(f"its rope_parameters are {rope}; gptlit has rope_type default only")
        settings = {
            **NANOCHAT.fixed,
            "attention_dropout": float(config.attention_dropout),
            "rope_base": float(rope["rope_theta"]),
            "logit_softcap": config.final_logit_softcapping,
        }
        dialect, activation = NANOCHAT, config.hidden_act
    else:
        raise UserError(f"its model_type is {kind!r}; gptlit reads gpt2 and nanochat")
    ours = {theirs: name for name, theirs in ACTIVATIONS.items()} | {"gelu_pytorch_tanh": "gelu_tanh"}
    if activation not in ours:
        raise UserError(f"its activation is {activation!r}; gptlit has {', '.join(ours)}")
    if inner % width:
        raise UserError(f"its MLP is {inner} wide; gptlit needs a multiple of the {width} channels")
    kept = getattr(config, "gptlit", None) or {}
    return GPTConfig(
        vocab_size=config.vocab_size,
        block_size=config.max_position_embeddings,
        n_layer=config.num_hidden_layers,
        n_head=config.num_attention_heads,
        n_embd=width,
        mlp_ratio=inner // width,
        tie_weights=config.tie_word_embeddings,
        **settings | {"activation": ours[activation]} | {name: kept[name] for name in KEPT[dialect] if name in kept},
    )


def refuse_unless(config: Any, **needed: Any) -> None:
    """Raise `UserError` for the first setting of a configuration that our model does not have."""
    for name, value in needed.items():
        if getattr(config, name) != value:
            raise UserError(f"its {name} is {getattr(config, name)}; gptlit has {value} only")


def weights_from_huggingface(gpt: GPTConfig, theirs: Mapping[str, Tensor]) -> Weights:
    """Return the weights of transformers under our names.

    Args:
        gpt: from `config_from_huggingface`.
        theirs: weights under transformers' names.

    Raises:
        UserError: if `gpt` has no place for a bias that is not zero.
    """
    if gpt.position == "rope":
        return weights_from_nanochat(gpt, theirs)
    ours: Weights = {}
    for name, tensor in theirs.items():
        is_qkv = name.endswith("attn.c_attn.bias")
        if name.endswith(".bias") and not (gpt.qkv_bias if is_qkv else gpt.bias):
            if bool(tensor.any()):
                raise UserError(
                    f"its {name} is not zero, although config.json says that it has no such bias: the model was "
                    "trained after its export; remove the entry `gptlit` from config.json"
                )
            continue
        ours[name] = tensor.t().contiguous() if is_projection(name) else tensor
    if gpt.tie_weights:
        ours["lm_head.weight"] = ours["transformer.wte.weight"]
    elif gpt.bias:
        ours["lm_head.bias"] = ours["lm_head.weight"].new_zeros(ours["lm_head.weight"].size(0))
    return ours


def weights_from_nanochat(gpt: GPTConfig, theirs: Mapping[str, Tensor]) -> Weights:
    """Invert `nanochat_weights`."""
    table = theirs["model.embed_tokens.weight"]
    ours = {"transformer.wte.weight": table, "lm_head.weight": table if gpt.tie_weights else theirs["lm_head.weight"]}
    for layer in range(gpt.n_layer):
        of_them, of_us = f"model.layers.{layer}.", f"transformer.h.{layer}."
        thirds = [theirs[f"{of_them}self_attn.{letter}_proj.weight"] for letter in "qkv"]  # (C, C) each
        ours[f"{of_us}attn.c_attn.weight"] = torch.cat(thirds)  # (3C, C)
        ours |= {of_us + mine: theirs[of_them + name] for mine, name in NANOCHAT_NAMES.items()}
    return ours
