"""Export of a run: each format is written to a folder, loaded again and compared before it gets its name."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gptlit.checkpoint.atomic import atomic_folder
from gptlit.convert.compare import Check, restore
from gptlit.convert.dialects import GPT2, NANOCHAT, require_dialect
from gptlit.convert.gguf_file import write_gguf
from gptlit.convert.model_card import model_card
from gptlit.convert.nanogpt import write_nanogpt
from gptlit.convert.onnx_file import write_onnx
from gptlit.convert.transformers_folder import write_transformers
from gptlit.errors import UserError
from gptlit.model.config import GPTConfig
from gptlit.tokenizer import from_json

Format = Literal["transformers", "onnx", "gguf", "nanogpt"]
WRITERS = {"transformers": write_transformers, "onnx": write_onnx, "gguf": write_gguf, "nanogpt": write_nanogpt}


@dataclass(frozen=True)
class Exported:
    """What `export_run` wrote."""

    folder: Path
    architecture: str
    check: Check
    """How closely the exported model computes the same."""


def export_run(
    checkpoint: Mapping[str, Any], output: Path, format: Format = "transformers", command: str = ""
) -> Exported:
    """Write the model of a checkpoint to the new folder `output`; the folder appears only when it is complete.

    Args:
        checkpoint: from `read_checkpoint`.
        output: folder to make; an empty one is accepted.
        format: `transformers` (GPT2LMHeadModel or NanoChatForCausalLM), `onnx`, `gguf` (llama.cpp), or `nanogpt`
            (ckpt.pt).
        command: how the export was requested, for the model card.

    Raises:
        UserError: if the format cannot express the model (names the setting), the weights are not finite, the folder
            is not empty or cannot be written, or a library of an extra is missing.
        RuntimeError: if the exported model computes something else.
    """
    hyper = checkpoint["hyper_parameters"]
    gpt, tokenizer = GPTConfig(**hyper["gpt"]), from_json(hyper["tokenizer"])
    architecture = require_dialect(gpt, GPT2, NANOCHAT).name if format == "transformers" else format
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"{output} exists and is not empty: choose another name, or remove it", "--output")
    model = restore(gpt, checkpoint["state_dict"])
    try:
        with atomic_folder(output) as folder:
            check = WRITERS[format](folder, model, tokenizer)
            training = checkpoint.get("gptlit", {}).get("config")
            if training:
                (folder / "gptlit.yaml").write_text(training, encoding="utf-8")
            card = model_card(checkpoint, model, tokenizer, output.name, format, architecture, check, command)
            (folder / "README.md").write_text(card, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror or error})", "--output") from error
    return Exported(output, architecture, check)
