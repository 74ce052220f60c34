"""A model as JSON and base64, for the JavaScript of the page."""

import base64
import re
from dataclasses import asdict
from typing import Any, Literal

import torch

from gptlit.errors import UserError
from gptlit.model.config import GPTConfig
from gptlit.model.gpt import GPT
from gptlit.tokenizer import BPETokenizer, Tokenizer
from gptlit.tokenizer.bpe import BYTE_OF_CHARACTER, WORDS

WeightType = Literal["float32", "float16"]
LARGEST_MODEL = 64 * 2**20  # bytes of weights: 16.8 M parameters in float32
DTYPES = {"float32": torch.float32, "float16": torch.float16}
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
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
        UserError: for a BPE that splits text into words in another way than GPT-2 or gptlit.
    """
    if not isinstance(tokenizer, BPETokenizer):
        return {"kind": "char", "symbols": "".join(tokenizer.symbols)}
    definition = tokenizer.definition
    model, added = definition["model"], {token["content"]: token["id"] for token in definition["added_tokens"]}
    options = ("ignore_merges", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
    if any(model.get(name) for name in options) or any(token["single_word"] for token in definition["added_tokens"]):
        raise UserError("this tokenizer has options that a page does not know: use a plain byte-level BPE")
    ids = {**model["vocab"], **added}
    tokens = [""] * tokenizer.vocab_size
    for token, i in ids.items():
        raw = token.encode() if token in added else bytes(BYTE_OF_CHARACTER[character] for character in token)
        tokens[i] = raw.hex()
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    return {
        "kind": "bpe",
        "words": word_pattern(definition["pre_tokenizer"] or {}),
        "tokens": tokens,
        "merges": [[ids[left], ids[right]] for left, right in pairs],
        "added": sorted(added.values()),
    }


def word_pattern(pre_tokenizer: dict[str, Any]) -> str:
    """Return the regular expression of a pre-tokenizer's words, in JavaScript's syntax.

    Raises:
        UserError: for a pre-tokenizer other than GPT-2's and gptlit's.
    """
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    splits = [part for part in parts if part.get("type") == "Split"]
    by_bytes = [part.get("use_regex", True) for part in parts if part.get("type") == "ByteLevel"]
    patterns = [GPT2_WORDS] * sum(by_bytes) + [part["pattern"].get("Regex", "") for part in splits]
    plain = all(part["behavior"] == "Isolated" and not part["invert"] for part in splits)
    if len(splits) + len(by_bytes) != len(parts) or not plain or patterns not in ([GPT2_WORDS], [WORDS]):
        raise UserError(
            "a page knows how GPT-2 and gptlit split text into words, and this tokenizer splits it otherwise"
        )
    pattern = re.sub(r"\\x\{(\w+)\}", r"\\u{\1}", patterns[0])
    return pattern.replace(r"\s", r"\p{White_Space}").replace(r"\S", r"\P{White_Space}")
