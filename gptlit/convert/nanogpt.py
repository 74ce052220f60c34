"""nanoGPT's `ckpt.pt`, both ways.

The vocabulary of a character model is in `meta.pkl`. It is written for nanoGPT's sample.py and never read: it is a
pickle, and reading one executes what is in it.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gptlit.checkpoint.torch_file import read_torch_file, write_torch_file
from gptlit.convert.compare import Check, compare
from gptlit.convert.dialects import NANOGPT, require_dialect
from gptlit.convert.gpt2_weights import Weights, with_all_biases
from gptlit.errors import UserError
from gptlit.model.config import GPTConfig
from gptlit.model.gpt import GPT
from gptlit.tokenizer import CharTokenizer, Tokenizer

SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
GPT2_VOCABULARY = 50_257
DATASET = "gptlit"  # folder of nanoGPT's `data` that meta.pkl is copied to
MASKS = (".attn.bias", ".attn.masked_bias")  # saved before torch 2


def config_from_nanogpt(checkpoint: Mapping[str, Any]) -> GPTConfig:
    """Return the architecture of a nanoGPT checkpoint of any age.

    | nanoGPT | change | recognised by |
    |---|---|---|
    | 2023-01-14 | the head shares the table of the embedding | the weights |
    | 2023-01-27 | `bias` is an option; before, every layer had one | `model_args` |
    | 2023-05-17 | exact GELU; before, its tanh approximation | no `bias` option, or embeddings without weight decay |

    The last one cannot be seen in the weights. Embeddings are decayed since 2023-05-06, which shows in the optimizer
    state; a checkpoint of the days in between, or without optimizer, is taken for one of today.

    Raises:
        KeyError, TypeError: if it is of another kind.
    """
    arguments = checkpoint["model_args"]
    bias, dropout = arguments.get("bias", True), arguments.get("dropout", 0.0)
    weights = weights_of_nanogpt(checkpoint)
    return GPTConfig(
        **{name: arguments[name] for name in SIZES},
        bias=bias,
        qkv_bias=bias,
        dropout=dropout,
        attention_dropout=dropout,
        embedding_dropout=dropout,
        activation="gelu_tanh" if is_from_before_exact_gelu(checkpoint) else "gelu",
        tie_weights=torch.equal(weights["lm_head.weight"], weights["transformer.wte.weight"]),
        position="learned",
        norm="layernorm",
        qk_norm=False,
        init="scaled",
    )


def is_from_before_exact_gelu(checkpoint: Mapping[str, Any]) -> bool:
    """Whether the model was trained with the tanh approximation of GELU, as far as the checkpoint shows."""
    if "bias" not in checkpoint["model_args"]:
        return True
    groups = (checkpoint.get("optimizer") or {}).get("param_groups") or []
    decayed = [len(group["params"]) for group in groups if group.get("weight_decay")]
    # The matrices of the blocks; since 2023-05-06 the two embeddings as well.
    return decayed == [4 * checkpoint["model_args"]["n_layer"]]


def weights_of_nanogpt(checkpoint: Mapping[str, Any]) -> Weights:
    """Return the weights under our names, which are nanoGPT's, without prefixes of torch.compile and without masks."""
    renamed = {name.removeprefix("_orig_mod."): tensor for name, tensor in checkpoint["model"].items()}
    return {name: tensor for name, tensor in renamed.items() if not name.endswith(MASKS)}


def with_head_bias(weights: Weights, gpt: GPTConfig) -> Weights:
    """Add the bias, at zero, that the head of a `GPT` has when it is untied and there are biases; nanoGPT has none."""
    if gpt.tie_weights or not gpt.bias:
        return weights
    return {**weights, "lm_head.bias": torch.zeros(gpt.vocab_size)}


def vocabulary_of(folder: Path) -> Path:
    """Return the folder with meta.pkl in an export; only one of a model of characters has it."""
    return folder / "data" / DATASET


def write_nanogpt(folder: Path, model: GPT, tokenizer: Tokenizer) -> Check:
    """Write ckpt.pt and, for characters, data/gptlit/meta.pkl; read ckpt.pt again and compare.

    The checkpoint has no optimizer state: nanoGPT's train.py cannot resume from it.

    Raises:
        UserError: if nanoGPT cannot express the model.
        RuntimeError: if the file holds something else than the model.
    """
    gpt = model.config
    require_dialect(gpt, NANOGPT)
    if not isinstance(tokenizer, CharTokenizer) and tokenizer.vocab_size != GPT2_VOCABULARY:
        raise UserError("data.tokenizer bpe cannot be exported to nanoGPT, which has characters and GPT-2's vocabulary")
    uniform = gpt.bias == gpt.qkv_bias
    weights = dict(model.state_dict()) if uniform else with_all_biases(model.state_dict())
    arguments = {name: getattr(gpt, name) for name in SIZES}
    arguments |= {"bias": gpt.bias if uniform else True, "dropout": gpt.dropout}
    content = {"model": weights, "model_args": arguments, "config": {"dataset": DATASET}}
    with (folder / "ckpt.pt").open("wb") as file:
        write_torch_file(content, file)
    if isinstance(tokenizer, CharTokenizer):
        ids = {character: i for i, character in enumerate(tokenizer.symbols)}
        meta = {"vocab_size": len(ids), "stoi": ids, "itos": dict(enumerate(tokenizer.symbols))}
        path = vocabulary_of(folder) / "meta.pkl"
        path.parent.mkdir(parents=True)
        path.write_bytes(pickle.dumps(meta))
    found = read_torch_file(folder / "ckpt.pt")
    loaded = GPT(config_from_nanogpt(found))
    loaded.load_state_dict(weights_of_nanogpt(found))
    return compare(model, loaded.eval())
