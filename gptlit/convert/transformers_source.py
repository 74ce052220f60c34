"""A folder of transformers, or a model on the Hugging Face hub, to start from."""

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptlit.convert.dialects import GPT2, NANOCHAT
from gptlit.convert.gpt2_weights import Weights
from gptlit.convert.huggingface import config_from_huggingface, weights_from_huggingface
from gptlit.convert.libraries import import_transformers, quiet_transformers
from gptlit.convert.source import SETTING, Pretrained, check_complete, crop_vocabulary
from gptlit.errors import UserError
from gptlit.model.config import GPTConfig
from gptlit.tokenizer import BPETokenizer, CharTokenizer, Tokenizer

EMBEDDINGS = ("transformer.wte.weight", "wte.weight", "model.embed_tokens.weight")
MASKS = (".attn.bias", ".attn.masked_bias")  # saved by transformers of before 2023


def from_transformers(source: str) -> Pretrained:
    """Return the model of a folder or hub id. Its configuration and tokenizer are read at once.

    Raises:
        UserError: if there is none, its architecture is not GPT-2 or NanoChat as gptlit computes them, or its tokenizer
            does not fit its weights.
    """
    transformers = import_transformers()
    with quiet_transformers():
        try:
            config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
            tokenizer_file = file_of(source, "tokenizer.json")
            gpt = untie_if_heads_differ(config_from_huggingface(config), source)
            tokenizer = None if tokenizer_file is None else read_tokenizer(tokenizer_file, source)
        except UserError as error:
            raise UserError(f"{source}: {error}", SETTING) from error
        except (OSError, ValueError, KeyError) as error:
            raise UserError(unreachable(source, error), SETTING) from error
    vocab_size = gpt.vocab_size if tokenizer is None else tokenizer.vocab_size
    padded = vocab_size < gpt.vocab_size and isinstance(tokenizer, BPETokenizer)  # rows beyond the vocabulary
    if vocab_size != gpt.vocab_size and not padded:
        raise UserError(
            f"{source}: its tokenizer has {vocab_size} tokens, but its weights have {gpt.vocab_size}", SETTING
        )

    def state_dict() -> Weights:
        theirs = weights_of(source, gpt)
        try:
            ours = weights_from_huggingface(gpt, theirs)
        except UserError as error:
            raise UserError(f"{source}: {error}", SETTING) from error
        return check_complete(crop_vocabulary(ours, vocab_size), replace(gpt, vocab_size=vocab_size), source)

    return Pretrained(replace(gpt, vocab_size=vocab_size), tokenizer, source, state_dict)


def file_of(source: str, name: str) -> Path | None:
    """Return a file of a folder or hub id; None if it has no such file."""
    from transformers.utils import cached_file

    file = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    return None if file is None else Path(file)


def untie_if_heads_differ(gpt: GPTConfig, source: str) -> GPTConfig:
    """Return the architecture with an untied head if the weights hold one that differs from the embedding.

    Some programs write `tie_word_embeddings: true` next to a head that was trained on its own.
    """
    if not gpt.tie_weights:
        return gpt
    tensors = stored_tensors(source, ("lm_head.weight", *EMBEDDINGS))
    head, *embeddings = (tensors.get(name) for name in ("lm_head.weight", *EMBEDDINGS))
    embedding = next((tensor for tensor in embeddings if tensor is not None), None)
    if head is None or embedding is None or torch.equal(head, embedding):
        return gpt
    return replace(gpt, tie_weights=False)


def stored_tensors(source: str, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Return some tensors of the safetensors files of a folder or hub id; those that are missing are left out."""
    from safetensors import SafetensorError, safe_open

    single, index = file_of(source, "model.safetensors"), None
    if single is None:
        index = file_of(source, "model.safetensors.index.json")
    if single is not None:
        files = [single]
    elif index is not None:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        found = (file_of(source, shards[name]) for name in names if name in shards)
        files = [file for file in found if file is not None]
    else:
        return {}
    tensors: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for file in dict.fromkeys(files):
            try:
                opened = stack.enter_context(safe_open(file, "pt"))
                tensors |= {name: opened.get_tensor(name) for name in names if name in opened.keys()}  # noqa: SIM118
            except SafetensorError as error:
                raise UserError(f"{file.name} cannot be read: {brief(error)}") from error
    return tensors


def weights_of(source: str, gpt: GPTConfig) -> dict[str, Tensor]:
    """Return all weights of a folder or hub id under transformers' names, in float32; from safetensors only.

    Raises:
        UserError: if there are none, or one is missing or unknown.
    """
    transformers = import_transformers()
    from safetensors import SafetensorError

    architecture = NANOCHAT if gpt.position == "rope" else GPT2
    try:
        with quiet_transformers():
            model, report = getattr(transformers, architecture.name).from_pretrained(
                source, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{source}: there are no weights in safetensors that fit its configuration: {brief(error)}", SETTING
        ) from error
    missing = sorted(set(report["missing_keys"]) - ({"lm_head.weight"} if gpt.tie_weights else set()))
    if missing:  # transformers would initialise them at random
        raise UserError(f"{source}: its weights are not complete: {missing[0]} is missing", SETTING)
    unknown = sorted(name for name in report["unexpected_keys"] if not name.endswith(MASKS))
    if unknown:  # transformers would drop them
        raise UserError(f"{source}: its weights hold {unknown[0]}, which {architecture.name} does not have", SETTING)
    return model.state_dict()


def read_tokenizer(file: Path, source: str) -> Tokenizer:
    """Return the tokenizer of a `tokenizer.json`: characters, as gptlit exports them, or else byte-level BPE."""
    definition: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    model = definition.get("model") or {}
    splits_characters = definition.get("pre_tokenizer") is None or model.get("type") == "WordLevel"
    if splits_characters and not model.get("merges") and definition.get("normalizer") is None:
        vocabulary: dict[str, int] = model["vocab"]
        characters = sorted(vocabulary, key=vocabulary.__getitem__)
        if sorted(vocabulary.values()) == list(range(len(characters))) and all(len(c) == 1 for c in characters):
            return CharTokenizer(characters, source)
    return BPETokenizer(definition, source)


def unreachable(source: str, error: Exception) -> str:
    """Return the message for a source whose configuration transformers did not find."""
    if Path(source).is_dir():
        return f"{source}: its config.json cannot be read: {brief(error)}"
    return (
        f"{source}: there is no such file or folder here, and the Hugging Face hub is out of reach or has no such "
        "model: check the name and the network, or download it first and give its folder"
    )


def brief(error: Exception) -> str:
    """Return the first 160 characters of a library's message, on one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= 160 else text[:159] + "…"
