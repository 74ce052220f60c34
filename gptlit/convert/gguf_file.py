"""Export to GGUF, the format of llama.cpp, for models of the GPT-2 dialect with a character vocabulary."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptlit.convert.compare import Check, compare
from gptlit.convert.dialects import GGUF, require_dialect
from gptlit.convert.gpt2_weights import Weights, model_with_all_biases, with_all_biases
from gptlit.convert.libraries import import_optional
from gptlit.errors import UserError
from gptlit.model.config import GPTConfig
from gptlit.model.gpt import GPT
from gptlit.tokenizer import CharTokenizer, Tokenizer

LAYER_NORM_EPS = 1e-5
PADDING = 256  # llama.cpp rounds context sizes up to multiples of this
LOW = -1000.0  # logit of tokens that are never sampled
LEAST_COSINE = 1e-3  # below it, rounding would be felt
NAMES = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "lm_head": "output",
}
BLOCK_NAMES = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def write_gguf(folder: Path, model: GPT, tokenizer: Tokenizer) -> Check:
    """Write model.gguf in float32; read the file again with the `gguf` library, rebuild the model and compare.

    Raises:
        UserError: if the architecture or the tokenizer has no counterpart in GGUF, or `gguf` is missing.
        RuntimeError: if the file holds something else than the model.
    """
    gpt = model.config
    require_dialect(gpt, GGUF)
    if not isinstance(tokenizer, CharTokenizer):
        raise UserError("data.tokenizer bpe cannot be exported to GGUF, only char")
    gguf = import_optional("gguf", "gguf")[0]
    weights = with_all_biases(model.state_dict())
    prefixes = utf8_prefixes(tokenizer.symbols)
    row = None
    if prefixes and (low := low_row(weights)) is not None:
        row, weights["transformer.ln_f.bias"] = low
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_name(f"gptlit {gpt.n_layer}x{gpt.n_embd}")
    writer.add_description(context_note(gpt.block_size))
    writer.add_context_length(gpt.block_size)
    writer.add_embedding_length(gpt.n_embd)
    writer.add_block_count(gpt.n_layer)
    writer.add_feed_forward_length(gpt.mlp_ratio * gpt.n_embd)
    writer.add_head_count(gpt.n_head)
    writer.add_layer_norm_eps(LAYER_NORM_EPS)
    # Of llama.cpp's tokenizers this one alone encodes characters exactly and ends no text at a token of its own.
    writer.add_tokenizer_model("rwkv")
    encodings = [character.encode() for character in tokenizer.symbols]
    writer.add_token_list(list(map(escaped, encodings + prefixes)))
    if prefixes:
        writer.add_array("tokenizer.ggml.suppress_tokens", list(range(gpt.vocab_size, gpt.vocab_size + len(prefixes))))
    for name, array in gguf_tensors(weights, len(prefixes), gpt.tie_weights, row).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return check_gguf(path, gguf, model, tokenizer)


def low_row(weights: Weights) -> tuple[Tensor, Tensor] | None:
    """Return a row (C,) of the head whose logit is `LOW` in every context, with the last norm's bias (C,) for it.

    The norm gives γ x + β with Σ x = 0, so that the row 1/γ has the constant logit Σ β/γ. Where that is 0, as without
    biases, β gets a part that the head maps to 0, if there is one: with fewer tokens than channels. None otherwise.
    """
    scale, bias = (weights[f"transformer.ln_f.{name}"].double() for name in ("weight", "bias"))
    if not bool(scale.all()):
        return None
    row, head = 1 / scale, weights["lm_head.weight"].double()
    V, C = head.shape
    if not is_oblique(bias, row) and V < C:
        unseen = torch.linalg.svd(head)[2][V:]  # (C - V, C), an orthonormal basis of what the head maps to 0
        part = unseen.T @ (unseen @ row)
        bias = bias + part / part.norm()
    return ((LOW / (bias @ row) * row).float(), bias.float()) if is_oblique(bias, row) else None


def is_oblique(a: Tensor, b: Tensor) -> bool:
    """Whether two vectors are not perpendicular, nor nearly so."""
    return bool((a @ b).abs() > LEAST_COSINE * a.norm() * b.norm())


def gguf_tensors(weights: Weights, padding: int, tied: bool, row: Tensor | None) -> dict[str, np.ndarray]:
    """Return float32 arrays under GGUF's names, with `padding` rows after the vocabulary.

    They are `row` in the head, and zeros in the embedding if that is another matrix; without `row` zeros in both.
    """
    arrays = {}
    output = "transformer.wte.weight" if tied else "lm_head.weight"
    for name, tensor in weights.items():
        if name == "lm_head.weight" and tied:
            continue
        array = tensor.float().contiguous().numpy()
        if name in ("transformer.wte.weight", "lm_head.weight") and padding:
            array = np.pad(array, ((0, padding), (0, 0)))
            if row is not None and name == output:
                array[-padding:] = row.numpy()
        arrays[gguf_name(name)] = array
    return arrays


def gguf_name(name: str) -> str:
    """Return GGUF's name of a weight: `blk.0.attn_qkv.weight` for `transformer.h.0.attn.c_attn.weight`."""
    stem, _, kind = name.rpartition(".")
    if stem in NAMES:
        return f"{NAMES[stem]}.{kind}"
    layer, _, part = stem.removeprefix("transformer.h.").partition(".")
    return f"blk.{layer}.{BLOCK_NAMES[part]}.{kind}"


def escaped(token: bytes) -> str:
    """Return a token as llama.cpp's `rwkv` tokenizer writes it: text with backslashes and partial UTF-8 escaped."""
    try:
        return token.decode().replace("\\", "\\\\")
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" for byte in token)


def utf8_prefixes(characters: Sequence[str]) -> list[bytes]:
    """Return the proper prefixes of the UTF-8 encodings of the characters outside ASCII, sorted.

    As tokens that are never sampled they make llama.cpp refuse unknown characters; without them it was seen to hang on
    an unknown character that begins like a known one.
    """
    encodings = [character.encode() for character in characters]
    return sorted({encoding[:length] for encoding in encodings for length in range(1, len(encoding))})


def context_note(block_size: int) -> str:
    """Say how many tokens a prompt and its continuation may have in llama.cpp."""
    note = f"Prompt and continuation together: at most {block_size} tokens (characters)."
    if block_size % PADDING:
        note += f" llama.cpp rounds the context up to a multiple of {PADDING}: limit the number of new tokens yourself."
    return note + " Switch context shift off: the positions are learned."


def check_gguf(path: Path, gguf: Any, model: GPT, tokenizer: CharTokenizer) -> Check:
    """Rebuild the model from a GGUF file and compare its logits and its vocabulary with the original's.

    Raises:
        RuntimeError: if they differ.
    """
    reader = gguf.GGUFReader(path)
    found = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    gpt = model.config
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()[: gpt.vocab_size]
    if [unescaped(token) for token in tokens] != list(tokenizer.symbols):
        raise RuntimeError("the GGUF file holds another vocabulary")
    expected = with_all_biases(model.state_dict())
    names = {name: gguf_name(name) for name in expected if not (name == "lm_head.weight" and gpt.tie_weights)}
    rebuilt = {name: found[theirs].reshape(-1, *expected[name].shape[1:]) for name, theirs in names.items()}
    if rebuilt["transformer.wte.weight"].size(0) > gpt.vocab_size and low_row(expected) is not None:
        check_padding(gpt, rebuilt)
    rebuilt = {name: tensor[: expected[name].size(0)] for name, tensor in rebuilt.items()}
    if gpt.tie_weights:
        rebuilt["lm_head.weight"] = rebuilt["transformer.wte.weight"]
    return compare(model, model_with_all_biases(gpt, rebuilt))


@torch.no_grad()
def check_padding(gpt: GPTConfig, weights: Weights) -> None:
    """Check that tokens after the vocabulary have a logit of about `LOW` in random contexts.

    Args:
        gpt: configuration of the model.
        weights: of the file, with the rows of those tokens.

    Raises:
        RuntimeError: if the logit is another one.
    """
    tokens = weights["transformer.wte.weight"].size(0)
    head = {"lm_head.weight": weights["transformer.wte.weight"]} if gpt.tie_weights else {}
    padded = model_with_all_biases(replace(gpt, vocab_size=tokens), {**weights, **head})
    ids = torch.randint(gpt.vocab_size, (8, gpt.block_size), generator=torch.Generator().manual_seed(0))
    logits = padded(ids)[..., gpt.vocab_size :]
    if not bool(((logits - LOW).abs() < 1).all()):
        raise RuntimeError(f"tokens that are never sampled have logits up to {float(logits.max()):.1f}, not {LOW}")


def unescaped(token: str) -> str:
    """Invert `escaped` for a complete character."""
    return token.replace("\\\\", "\\")
