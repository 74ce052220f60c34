"""Weights to start from: a Hugging Face folder or hub id, nanoGPT's `ckpt.pt`, or another run.

Nothing is executed: files of torch hold tensors and plain types only, folders of transformers are read as safetensors.
nanoGPT's `meta.pkl` is never read: the vocabulary comes from the data. Both projects sort the characters, so the same
text gives the same ids.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gptlit.checkpoint.files import runs_here, way_out
from gptlit.checkpoint.run_dir import RUNS
from gptlit.checkpoint.torch_file import DamagedCheckpointError, read_torch_file
from gptlit.convert.compare import network_weights
from gptlit.convert.dialects import TRAINING_ONLY
from gptlit.convert.foreign import refuse_file, refuse_folder, refuse_weights
from gptlit.convert.gpt2_weights import Weights
from gptlit.convert.nanogpt import config_from_nanogpt, weights_of_nanogpt, with_head_bias
from gptlit.convert.source import SETTING, Pretrained, check_complete, crop_vocabulary
from gptlit.convert.transformers_source import from_transformers
from gptlit.errors import UserError
from gptlit.model.config import GPTConfig
from gptlit.tokenizer import from_json

ADAPTABLE = TRAINING_ONLY | {"block_size", "vocab_size", "tie_weights"}
PADDED = {50_257: 50_304}  # GPT-2's vocabulary, which nanoGPT and others pad to a multiple of 64 for speed


def load_pretrained(source: str) -> Pretrained:
    """Return the model that `init_from` names, in the first of these forms that fits.

    1. A checkpoint file of gptlit, or nanoGPT's `ckpt.pt`.
    2. A folder with `config.json` (GPT2LMHeadModel or NanoChatForCausalLM, as safetensors), with `best.ckpt` or
       `last.ckpt` (a run), or with `ckpt.pt` (nanoGPT's out_dir).
    3. A model on the Hugging Face hub, such as `gpt2`, through transformers and its cache. What begins with
       `checkpoints/` is never looked up there.

    Raises:
        UserError: if there is nothing, the file holds more than tensors and plain types, the architecture is another
            one, or the hub is out of reach.
    """
    place = Path(source)
    if place.is_dir():
        if (place / "config.json").is_file():
            return from_transformers(source)
        refuse_folder(place)
        files = [place / name for name in ("best.ckpt", "last.ckpt", "ckpt.pt")]
        found = next((file for file in files if file.is_file()), None)
        if found is None:
            raise UserError(
                f"{source}: the folder holds no model (config.json with model.safetensors, best.ckpt, last.ckpt, or "
                "ckpt.pt)",
                SETTING,
            )
        return from_torch_file(found)
    if place.is_file():
        return from_torch_file(place)
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source) and place.suffix not in (".ckpt", ".pt", ".pth")
    if not is_hub_id:
        raise UserError(f"{source}: no such file or folder, and not the form of a hub id", SETTING)
    if len(place.parts) > 1 and place.parts[0] == str(RUNS):  # also has the form of a hub id
        raise UserError(f"{source}: no such run: train it first, or name another{runs_here()}", SETTING)
    return from_transformers(source)


def fit_to(pretrained: Pretrained, **wanted: Any) -> Pretrained:
    """Return the same model under other settings of `GPTConfig`, where that is possible. Reads no weights.

    - `block_size`: a smaller one crops the position table; a larger one needs `position` rope or none.
    - `vocab_size`: that of the source; GPT-2's 50,257 crops a table padded to 50,304.
    - `tie_weights` false gives the head a copy of the embedding of a tied source.
    - Dropout, `token_noise` and `init` are free; everything else must be as it is.

    Raises:
        UserError: if a setting contradicts the weights; names it.
    """
    have, source = pretrained.gpt, pretrained.source
    gpt = replace(have, **wanted)
    for name in sorted(wanted.keys() - ADAPTABLE):
        if getattr(gpt, name) != getattr(have, name):
            raise UserError(
                f"is {getattr(gpt, name)}, but {source} has {getattr(have, name)}: leave it out", f"model.gpt.{name}"
            )
    if gpt.block_size > have.block_size and have.position == "learned":
        raise UserError(
            f"is {gpt.block_size}, but {source} has learned positions for {have.block_size} tokens only: choose that "
            "or less",
            "model.gpt.block_size",
        )
    if gpt.vocab_size not in (0, have.vocab_size) and PADDED.get(gpt.vocab_size) != have.vocab_size:
        raise UserError(
            f"the tokenizer has {gpt.vocab_size} tokens, but {source} was trained with {have.vocab_size}: use the "
            "tokenizer that it was trained with"
        )
    if gpt.tie_weights and not have.tie_weights:
        raise UserError(f"is true, but {source} has a head of its own: set it to false", "model.gpt.tie_weights")
    gpt = replace(gpt, vocab_size=gpt.vocab_size or have.vocab_size)

    def state_dict() -> Weights:
        weights = crop_vocabulary(pretrained.state_dict(), gpt.vocab_size)
        if gpt.position == "learned":
            weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][: gpt.block_size].clone()
        if have.tie_weights and not gpt.tie_weights:
            weights["lm_head.weight"] = weights["lm_head.weight"].clone()
            weights = with_head_bias(weights, gpt)
        return weights

    return replace(pretrained, gpt=gpt, state_dict=state_dict)


def from_torch_file(path: Path) -> Pretrained:
    """Return the model of a checkpoint of gptlit or of nanoGPT, distinguished by its keys."""
    refuse_file(path)
    try:
        content = read_torch_file(path, setting=SETTING)
    except DamagedCheckpointError as error:
        error.message += f"; {way_out(path)}"
        raise
    try:
        if {"state_dict", "hyper_parameters"} <= content.keys():
            return from_run(content, path)
        if {"model", "model_args"} <= content.keys():
            return from_nanogpt(content, path)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: a checkpoint of another kind ({error!r})", SETTING) from error
    refuse_weights(content, path)
    keys = ", ".join(map(str, list(content)[:4]))
    raise UserError(f"{path}: neither a checkpoint of gptlit nor of nanoGPT (it holds {keys})", SETTING)


def from_run(checkpoint: Mapping[str, Any], path: Path) -> Pretrained:
    """Return the model of a run, without its optimizer."""
    hyper = checkpoint["hyper_parameters"]
    gpt, tokenizer = GPTConfig(**hyper["gpt"]), from_json(hyper["tokenizer"])

    def state_dict() -> Weights:
        return check_complete(network_weights(checkpoint["state_dict"]), gpt, path)

    return Pretrained(gpt, tokenizer, str(path), state_dict, checkpoint)


def from_nanogpt(checkpoint: Mapping[str, Any], path: Path) -> Pretrained:
    """Return the model of a nanoGPT checkpoint, which brings no tokenizer."""
    gpt = config_from_nanogpt(checkpoint)

    def state_dict() -> Weights:
        return check_complete(with_head_bias(weights_of_nanogpt(checkpoint), gpt), gpt, path)

    return Pretrained(gpt, None, f"nanoGPT's {path}", state_dict)
