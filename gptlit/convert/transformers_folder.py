"""Export to a folder that `transformers` loads."""

import json
from pathlib import Path
from typing import Any

import torch

from gptlit.convert.compare import Check, compare
from gptlit.convert.dialects import GPT2, NANOCHAT, require_dialect
from gptlit.convert.huggingface import generation_settings, to_huggingface
from gptlit.convert.libraries import import_transformers, os_errors_of_rust, quiet_transformers
from gptlit.model.gpt import GPT
from gptlit.tokenizer import CharTokenizer, Tokenizer


def write_transformers(folder: Path, model: GPT, tokenizer: Tokenizer) -> Check:
    """Write config.json, model.safetensors, generation_config.json and the tokenizer; load and compare them.

    Raises:
        UserError: if no architecture of transformers computes this function, or transformers is missing.
        RuntimeError: if the loaded model computes something else.
    """
    transformers = import_transformers()
    config, weights = to_huggingface(model)
    architecture = getattr(transformers, require_dialect(model.config, GPT2, NANOCHAT).name)
    with quiet_transformers():
        with torch.device("meta"):  # allocates and initialises nothing
            theirs = architecture(config)
        theirs.load_state_dict(weights, assign=True)
        theirs.tie_weights()
        settings = generation_settings(model.config.block_size)
        theirs.generation_config = transformers.GenerationConfig(**settings)
        with os_errors_of_rust():
            theirs.save_pretrained(folder)
        write_tokenizer(folder, tokenizer, model.config.block_size)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
        return compare(model, lambda ids: loaded(ids).logits)


def write_tokenizer(folder: Path, tokenizer: Tokenizer, block_size: int) -> None:
    """Write tokenizer.json and tokenizer_config.json: the same ids, and no special tokens.

    The class name and the input names are those that transformers 4 and 5 both read. GPT-2 would add token type ids to
    its embeddings.
    """
    save_backend(folder, tokenizer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def save_backend(folder: Path, tokenizer: Tokenizer) -> None:
    """Write tokenizer.json.

    Raises:
        OSError: if the file cannot be written.
    """
    with os_errors_of_rust():
        backend_of(tokenizer).save(str(folder / "tokenizer.json"))


def backend_of(tokenizer: Tokenizer) -> Any:
    """Return a tokenizer as a `tokenizers.Tokenizer`. A character outside the vocabulary raises an exception there.

    Characters are a BPE without merges, in which the whole text is one word: time and memory grow linearly. Its unknown
    token is not in the vocabulary, so that the library raises instead of dropping a character.
    """
    import tokenizers
    from tokenizers import decoders, models

    if not isinstance(tokenizer, CharTokenizer):
        return tokenizers.Tokenizer.from_str(json.dumps(tokenizer.definition))
    vocabulary = {character: i for i, character in enumerate(tokenizer.symbols)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token=""))
    backend.decoder = decoders.Fuse()
    return backend
