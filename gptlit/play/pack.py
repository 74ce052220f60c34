"""A model as JSON and base64, for the JavaScript of the page."""

import base64
from dataclasses import asdict
from typing import Any, Literal

import torch

from gptlit.errors import UserError
from gptlit.model.config import GPTConfig
from gptlit.model.gpt import GPT
from gptlit.tokenizer import BPETokenizer, Tokenizer
from gptlit.tokenizer.bpe import BYTE_OF_CHARACTER

WeightType = Literal["float32", "float16"]
LARGEST_MODEL = 64 * 2**20  # bytes of weights: 16.8 M parameters in float32
DTYPES = {"float32": torch.float32, "float16": torch.float16}
CONFIG = (
    "vocab_size", "block_size", "n_layer", "n_head", "n_embd", "position", "rope_base", "norm", "residual",
    "mlp_ratio", "activation", "token_shift", "qk_norm", "logit_softcap",
)  # fmt: skip


def pack_weights(network: GPT, dtype: WeightType) -> tuple[list[tuple[str, int]], str]:
    """Encode the weights of a model, one tensor after the other; a shared table once, under the embedding's name.

    Args:
        network: the model.
        dtype: type of a number in the page.

    Returns:
        Names with numbers of elements, and the little-endian bytes as base64.

    Raises:
        UserError: for weights that are too large for a page, non-finite, or beyond the range of float16.
    """
    weights = {name: parameter.detach() for name, parameter in network.named_parameters()}
    check_size(sum(tensor.numel() for tensor in weights.values()), dtype)
    parts = []
    for name, tensor in weights.items():
        numbers = tensor.to("cpu", DTYPES[dtype]).contiguous()
        if not bool(tensor.isfinite().all()):
            raise UserError(f"the weights of this model are not finite ({name}): take an earlier checkpoint")
        if not bool(numbers.isfinite().all()):
            raise UserError(f"the weights {name} go beyond the range of float16 (65,504): use float32")
        parts.append(numbers.numpy().astype(f"<f{numbers.element_size()}").tobytes())
    return [(name, tensor.numel()) for name, tensor in weights.items()], base64.b64encode(b"".join(parts)).decode()


def check_size(parameters: int, dtype: WeightType) -> None:
    """Raise `UserError` for a model whose weights are larger than `LARGEST_MODEL`."""
    size, limit = parameters * DTYPES[dtype].itemsize, LARGEST_MODEL
    if size <= limit:
        return
    reason = f"the model has {parameters / 1e6:.1f} M parameters, {size / 2**20:.0f} MiB in {dtype}, and a page takes "
    advice = "--dtype float16 halves it" if dtype == "float32" and size <= 2 * limit else "use a smaller model"
    raise UserError(f"{reason}{limit >> 20} MiB: {advice}")


def pack_config(config: GPTConfig) -> dict[str, Any]:
    """The settings that the forward pass depends on."""
    return {name: value for name, value in asdict(config).items() if name in CONFIG}


def pack_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """What the page needs to encode and to decode.

    Raises:
        UserError: for a BPE that splits text in another way than GPT-2's.
    """
    if not isinstance(tokenizer, BPETokenizer):
        return {"kind": "char", "symbols": "".join(tokenizer.symbols)}
    definition = tokenizer.definition
    model, added = definition["model"], {token["content"]: token["id"] for token in definition["added_tokens"]}
    pattern = definition["pre_tokenizer"] or {}
    options = ("ignore_merges", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
    if pattern.get("type") != "ByteLevel" or not pattern.get("use_regex", True):
        raise UserError("a page knows GPT-2's pattern for splitting text into words, and this tokenizer has another")
    if any(model.get(name) for name in options) or any(token["single_word"] for token in definition["added_tokens"]):
        raise UserError("this tokenizer has options that a page does not know: use a plain byte-level BPE")
    ids = {**model["vocab"], **added}
    tokens = [""] * tokenizer.vocab_size
    for token, i in ids.items():
        raw = token.encode() if token in added else bytes(BYTE_OF_CHARACTER[character] for character in token)
        tokens[i] = raw.hex()
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    merges = [[ids[left], ids[right]] for left, right in pairs]
    return {"kind": "bpe", "tokens": tokens, "merges": merges, "added": sorted(added.values())}
