"""Formats that are recognised in order to refuse them with advice."""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptlit.convert.source import SETTING
from gptlit.errors import UserError

LLM_C = {20240326: "a model file of llm.c", 20240520: "a token file of llm.c", 20240801: "a token file of llm.c"}
NANOCHAT_OF_TODAY = ("value_embeds.", "smear_gate.", "smear_lambda", "resid_lambdas", "x0_lambdas", "backout_lambda")


def refuse_folder(folder: Path) -> None:
    """Raise `UserError` for a folder that holds no model of its own.

    Raises:
        UserError: for an adapter, and for a checkpoint folder of nanochat.
    """
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{folder}: an adapter (PEFT) without its base model: merge it first (merge_and_unload, then "
            "save_pretrained) and give that folder",
            SETTING,
        )
    if any(folder.glob("model_*.pt")) and any(folder.glob("meta_*.json")):
        raise UserError(f"{folder}: {nanochat_advice()}", SETTING)


def refuse_file(path: Path) -> None:
    """Raise `UserError` for a file of a known format that is not a checkpoint of torch."""
    with path.open("rb") as file:
        start = file.read(4)
    magic = struct.unpack("<i", start)[0] if len(start) == 4 else 0
    if magic in LLM_C:
        raise UserError(f"{path}: {LLM_C[magic]}: convert it to a Hugging Face folder first", SETTING)
    if start == b"GGUF":
        raise UserError(f"{path}: a GGUF file: give the folder or checkpoint that it was made from", SETTING)
    if path.suffix == ".safetensors":
        raise UserError(f"{path}: weights without an architecture: give the folder with config.json", SETTING)


def refuse_weights(content: Mapping[str, Any], path: Path) -> None:
    """Raise `UserError` for the weights of a nanochat model with parts that gptlit does not have."""
    if any(name.removeprefix("_orig_mod.").startswith(NANOCHAT_OF_TODAY) for name in map(str, content)):
        raise UserError(f"{path}: {nanochat_advice()}", SETTING)


def nanochat_advice() -> str:
    return (
        "a checkpoint of nanochat: today's has value embeddings, smear and per-layer scalars, which gptlit does not "
        "have; a Hugging Face folder of NanoChatForCausalLM can be read"
    )
