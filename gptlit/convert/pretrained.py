"""Weights to start from: a Hugging Face folder or hub id, nanoGPT's `ckpt.pt`, or a run of our own.

Nothing pickled is executed: files of torch are read with `weights_only=True`, folders of transformers only as
safetensors. nanoGPT keeps its vocabulary in `meta.pkl`, a pickle, which is therefore never read: the vocabulary comes
from the data. Both sort their characters, so the same text gives the same ids.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptlit.checkpoint.torch_file import read_torch_file
from gptlit.convert.huggingface import (
    GPT2,
    NANOCHAT,
    Weights,
    config_from_huggingface,
    import_transformers,
    quiet_transformers,
    weights_from_huggingface,
)
from gptlit.errors import UserError
from gptlit.model.config import GPTConfig
from gptlit.model.gpt import GPT
from gptlit.tokenizer import BPETokenizer, CharTokenizer, Tokenizer, from_json

FREE = {"dropout", "attention_dropout", "embedding_dropout", "token_noise", "init"}  # leave the weights as they are
ADAPTABLE = FREE | {"block_size", "vocab_size", "tie_weights"}


@dataclass(frozen=True)
class Pretrained:
    """A model to start from. Cheap: the weights are read when `state_dict()` is called."""

    gpt: GPTConfig
    """Its architecture."""
    tokenizer: Tokenizer | None
    """Its vocabulary; None where the source keeps none, and the data must bring one of `gpt.vocab_size` symbols."""
    source: str
    """What it is, in words."""
    state_dict: Callable[[], Weights]
    """Reads the weights, under the names of `GPT(gpt).state_dict()`."""


def load_pretrained(source: str) -> Pretrained:
    """The model that `model.init_from` names, in the first of these forms that fits.

    1. a checkpoint file of gptlit, or nanoGPT's `ckpt.pt`;
    2. a folder with `config.json` (GPT2LMHeadModel or NanoChatForCausalLM, as safetensors), with `best.ckpt` or
       `last.ckpt` (a run of ours), or with `ckpt.pt` (nanoGPT's out_dir);
    3. a model on the Hugging Face hub, such as `gpt2`, through transformers and its cache.

    Raises:
        UserError: when nothing is there, the file carries more than tensors and plain types, the architecture is
            another one, or the hub is out of reach.
    """
    place = Path(source)
    if place.is_dir():
        if (place / "config.json").is_file():
            return from_huggingface(source)
        files = [place / name for name in ("best.ckpt", "last.ckpt", "ckpt.pt")]
        found = next((file for file in files if file.is_file()), None)
        if found is None:
            raise UserError(
                f"model.init_from {source}: the folder holds no model (config.json with model.safetensors, best.ckpt, "
                "last.ckpt, or ckpt.pt)"
            )
        return from_torch_file(found)
    if place.is_file():
        return from_torch_file(place)
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source) and place.suffix not in (".ckpt", ".pt", ".pth")
    if not is_hub_id:
        raise UserError(f"model.init_from {source}: there is no such file or folder, and no hub id is written so")
    return from_huggingface(source)


def fit_to(pretrained: Pretrained, **wanted: Any) -> Pretrained:
    """The same model under other settings of `GPTConfig`, where that is possible; stays cheap.

    - `block_size`: a smaller one crops the table of positions; a larger one needs `position` rope or none.
    - `vocab_size`: the source's, or the one that it is the padding of, to a multiple of 64; the padding is cropped.
    - `tie_weights` false gives the head a copy of the table of a tied source.
    - dropout, `token_noise` and `init` are free; everything else must be as it is.

    Raises:
        UserError: when a setting contradicts the weights; names it.
    """
    have, source = pretrained.gpt, pretrained.source
    gpt = replace(have, **wanted)
    for name in sorted(wanted.keys() - ADAPTABLE):
        if getattr(gpt, name) != getattr(have, name):
            raise UserError(
                f"model.gpt.{name} is {getattr(gpt, name)}, but {source} has {getattr(have, name)}: leave it out"
            )
    if gpt.block_size > have.block_size and have.position == "learned":
        raise UserError(
            f"model.gpt.block_size is {gpt.block_size}, but {source} has learned positions for {have.block_size} "
            "tokens only: choose that or less"
        )
    if gpt.vocab_size not in (0, have.vocab_size) and padded(gpt.vocab_size) != have.vocab_size:
        raise UserError(
            f"the tokenizer has {gpt.vocab_size} symbols, but {source} was trained with {have.vocab_size}: "
            "use the tokenizer that it was trained with"
        )
    if gpt.tie_weights and not have.tie_weights:
        raise UserError(f"model.gpt.tie_weights is true, but {source} has a head of its own: set it to false")
    gpt = replace(gpt, vocab_size=gpt.vocab_size or have.vocab_size)

    def state_dict() -> Weights:
        weights = crop_vocabulary(pretrained.state_dict(), gpt.vocab_size)
        if gpt.position == "learned":
            weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][: gpt.block_size].clone()
        if have.tie_weights and not gpt.tie_weights:
            weights["lm_head.weight"] = weights["lm_head.weight"].clone()
            if gpt.bias:
                weights["lm_head.bias"] = weights["lm_head.weight"].new_zeros(gpt.vocab_size)
        return weights

    return replace(pretrained, gpt=gpt, state_dict=state_dict)


def padded(vocab_size: int) -> int:
    """The next multiple of 64, to which nanoGPT and others pad a vocabulary for speed."""
    return -(-vocab_size // 64) * 64


def crop_vocabulary(weights: Weights, vocab_size: int) -> Weights:
    """The first `vocab_size` symbols of the table and the head."""
    names = ("transformer.wte.weight", "lm_head.weight", "lm_head.bias")
    if weights[names[0]].size(0) == vocab_size:
        return dict(weights)
    return {name: tensor[:vocab_size].clone() if name in names else tensor for name, tensor in weights.items()}


# ---------------------------------------------------------------- files of torch


def from_torch_file(path: Path) -> Pretrained:
    """A checkpoint of ours or of nanoGPT's, by what it holds."""
    content = read_torch_file(path, setting="model.init_from")
    try:
        if {"state_dict", "hyper_parameters"} <= content.keys():
            return from_run(content, path)
        if {"model", "model_args"} <= content.keys():
            return from_nanogpt(content, path)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"model.init_from {path}: the checkpoint is of another kind ({error!r})") from error
    raise UserError(
        f"model.init_from {path}: neither a checkpoint of gptlit nor of nanoGPT (it holds "
        f"{', '.join(map(str, list(content)[:4]))})"
    )


def network_weights(state_dict: Mapping[str, Tensor]) -> Weights:
    """The GPT's part of the state of a `LitGPT`, under the GPT's own names."""
    return {name.removeprefix("net."): tensor for name, tensor in state_dict.items() if name.startswith("net.")}


def from_run(checkpoint: Mapping[str, Any], path: Path) -> Pretrained:
    """The weights of a run of ours, without its optimizer."""
    hyper = checkpoint["hyper_parameters"]
    gpt, tokenizer = GPTConfig(**hyper["gpt"]), from_json(hyper["tokenizer"])
    return Pretrained(gpt, tokenizer, str(path), lambda: complete(network_weights(checkpoint["state_dict"]), gpt, path))


def from_nanogpt(checkpoint: Mapping[str, Any], path: Path) -> Pretrained:
    """The model of a nanoGPT checkpoint: GPT-2 with exact GELU, and with or without biases. It brings no tokenizer."""
    arguments = checkpoint["model_args"]
    names = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias")
    dropout = arguments.get("dropout", 0.0)
    gpt = GPTConfig(
        **{name: arguments[name] for name in names},
        dropout=dropout,
        attention_dropout=dropout,
        embedding_dropout=dropout,
        qkv_bias=arguments["bias"],
        position="learned",
        norm="layernorm",
        activation="gelu",
        qk_norm=False,
        tie_weights=True,
        init="scaled",
    )

    def state_dict() -> Weights:
        # A compiled model's names begin with _orig_mod., and models from before torch 2 keep their masks.
        renamed = {name.removeprefix("_orig_mod."): tensor for name, tensor in checkpoint["model"].items()}
        return complete(
            {n: t for n, t in renamed.items() if not n.endswith((".attn.bias", ".attn.masked_bias"))}, gpt, path
        )

    return Pretrained(gpt, None, f"nanoGPT's {path}", state_dict)


def complete(weights: Weights, gpt: GPTConfig, source: object) -> Weights:
    """The weights as they are, when they are those of the architecture.

    Raises:
        UserError: names one that is missing, unknown, or of another shape.
    """
    # Rotary embedding has no weights, and its tables cannot be made on the meta device, where no weight is drawn.
    position = "none" if gpt.position == "rope" else gpt.position
    with torch.device("meta"):
        model = GPT(replace(gpt, position=position))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"model.init_from {source}: {name} has the shape {found.get(name)} where its configuration says "
                f"{expected.get(name)}: the file is damaged, or of another architecture"
            )
    return weights


# ---------------------------------------------------------------- transformers


def from_huggingface(source: str) -> Pretrained:
    """A folder or hub id of transformers, whose configuration and tokenizer are read at once."""
    transformers = import_transformers()
    from transformers.utils import cached_file

    with quiet_transformers():
        try:
            config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
            file = cached_file(source, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(unreachable(source, error)) from error
    try:
        whole = config_from_huggingface(config)
        tokenizer = None if file is None else read_tokenizer(Path(file), source)
    except UserError as error:
        raise UserError(f"model.init_from {source}: {error}") from error
    gpt = whole
    if tokenizer is not None:
        if tokenizer.vocab_size > whole.vocab_size:
            raise UserError(
                f"model.init_from {source}: its tokenizer has {tokenizer.vocab_size} symbols, but its weights only "
                f"{whole.vocab_size}"
            )
        gpt = replace(whole, vocab_size=tokenizer.vocab_size)  # the weights may be padded beyond the vocabulary

    def state_dict() -> Weights:
        theirs = huggingface_weights(source, NANOCHAT if gpt.position == "rope" else GPT2, gpt.tie_weights)
        try:
            ours = weights_from_huggingface(whole, theirs)
        except UserError as error:
            raise UserError(f"model.init_from {source}: {error}") from error
        return complete(crop_vocabulary(ours, gpt.vocab_size), gpt, source)

    return Pretrained(gpt, tokenizer, source, state_dict)


def huggingface_weights(source: str, architecture: str, tied: bool) -> Weights:
    """All weights of a folder or hub id, under transformers' names, in float32; from safetensors only."""
    transformers = import_transformers()
    from safetensors import SafetensorError

    try:
        with quiet_transformers():
            model, report = getattr(transformers, architecture).from_pretrained(
                source, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise UserError(
            f"model.init_from {source}: there are no weights in safetensors that fit its configuration: {brief(error)}"
        ) from error
    missing = sorted(set(report["missing_keys"]) - ({"lm_head.weight"} if tied else set()))
    if missing:
        # transformers would go on with weights drawn at random
        raise UserError(f"model.init_from {source}: its weights are not complete: {missing[0]} is missing")
    return model.state_dict()


def read_tokenizer(file: Path, source: str) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`: characters where it is one that we exported, else byte-level BPE."""
    definition = json.loads(file.read_text(encoding="utf-8"))
    model = definition.get("model") or {}
    if model.get("type") == "WordLevel" and definition.get("normalizer") is None:
        vocabulary: dict[str, int] = model["vocab"]
        symbols = sorted(vocabulary, key=vocabulary.__getitem__)
        if sorted(vocabulary.values()) == list(range(len(symbols))) and all(len(symbol) == 1 for symbol in symbols):
            return CharTokenizer(symbols, source)
    return BPETokenizer(definition, source)


def unreachable(source: str, error: Exception) -> str:
    """What to say when transformers found no configuration."""
    if Path(source).is_dir():
        return f"model.init_from {source}: its config.json cannot be read: {brief(error)}"
    return (
        f"model.init_from {source}: there is no such file or folder here, and the Hugging Face hub is out of reach or "
        "has no such model: check the name and the network, or download it first and give its folder"
    )


def brief(error: Exception) -> str:
    """The beginning of a library's message, on one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= 160 else text[:159] + "…"
