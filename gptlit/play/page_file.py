"""Builds the page: models, styles and scripts in one HTML file that needs no network."""

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

from gptlit.checkpoint.atomic import atomic_write_text
from gptlit.checkpoint.files import SETTING, find_checkpoint, read_checkpoint
from gptlit.convert.compare import network_weights
from gptlit.errors import UserError
from gptlit.model.config import GPTConfig
from gptlit.model.gpt import GPT
from gptlit.play.pack import WeightType, pack_config, pack_tokenizer, pack_weights
from gptlit.tokenizer import Tokenizer, from_json

SCRIPTS = (
    "model.js",
    "reading.js",
    "sampling.js",
    "tokenizer.js",
    "bars.js",
    "text_view.js",
    "attention.js",
    "page.js",
)
OPENING = "First Citizen:\nBefore we proceed any further, hear me speak."
SAMPLE_CHARACTERS = 160  # of a run's own sample, where the vocabulary lacks the opening
MARK = "<!doctype html>\n<!-- gptlit play -->\n"  # a file that begins so may be replaced


class Playable(Protocol):
    """A trained model with its tokenizer, such as `LitGPT`."""

    @property
    def network(self) -> GPT:
        """The network."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Its tokenizer."""


@dataclass(frozen=True)
class Run:
    """A model read from a run folder, for `page`."""

    network: GPT
    tokenizer: Tokenizer
    sample: str = ""
    """Text that the run sampled while it trained."""
    note: str = ""
    """Step and loss of the checkpoint."""


def page(models: Mapping[str, Playable], text: str | None = None, dtype: WeightType = "float32") -> str:
    """Build the interactive page of one or more models: an HTML document without external resources.

    The page computes the model in JavaScript: next-token probabilities, the surprise of each token of a text,
    attention weights, and samples that equal those of `gptlit predict --context rolling` for the same seed.

    Args:
        models: models by the name that the page shows, such as `{"base": LitGPT.load_from_checkpoint(path)}`; the
            tokenizer of each is part of it. `read_runs` reads them from run folders.
        text: the text that the page opens with. By default a line of Shakespeare, or a sample of the first run if
            its vocabulary lacks that line.
        dtype: type of the weights in the page. `float16` halves its size and rounds the weights.

    Returns:
        The HTML document.

    Raises:
        UserError: if a model has no tokenizer, non-finite weights or a tokenizer that the page cannot apply, or is
            larger than 64 MiB of weights (16.8 M parameters in float32, 33.6 M in float16).
    """
    if not models:
        raise UserError("a page needs at least one model")
    packed = [pack(name, model, dtype) for name, model in models.items()]
    opening = opening_text(list(models.values())) if text is None else text
    content = {"text": opening, "models": [spec for spec, _ in packed]}
    script = script_text()
    names = " · ".join(models)
    return fill(
        read_asset("page.html"),
        title=html.escape(f"{names} · gptlit play"),
        policy=html.escape(f"default-src 'none'; script-src 'sha256-{sha256(script)}'; style-src 'unsafe-inline'"),
        style=read_asset("style.css"),
        content=json.dumps(content, separators=(",", ":")).replace("<", "\\u003c"),
        weights="\n".join(
            f'<script type="text/plain" id="weights-{i}">{data}</script>' for i, (_, data) in enumerate(packed)
        ),
        script=script,
    )


def pack(name: str, model: Playable, dtype: WeightType) -> tuple[dict[str, Any], str]:
    """Describe a model for the page, and encode its weights as base64."""
    network, tokenizer = model.network, model.tokenizer
    if tokenizer is None:
        raise UserError(f"the model {name} has no tokenizer: give it one, or fit it on a text first")
    try:
        tensors, data = pack_weights(network, dtype)
        vocabulary = pack_tokenizer(tokenizer)
    except UserError as error:
        raise UserError(f"{name}: {error.message}") from error
    spec = {
        "name": name,
        "note": getattr(model, "note", ""),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "config": pack_config(network.config),
        "dtype": dtype,
        "tensors": tensors,
        "tokenizer": vocabulary,
    }
    return spec, data


def opening_text(models: Sequence[Playable]) -> str:
    """Choose the text that the page opens with: one that the first vocabulary holds completely, if possible."""
    tokenizer = models[0].tokenizer
    assert tokenizer is not None
    with suppress(UserError):
        tokenizer.encode(OPENING)
        return OPENING
    return getattr(models[0], "sample", "") or tokenizer.decode(tokenizer.encode(OPENING, unknown="skip"))


def read_runs(paths: Sequence[str | Path]) -> dict[str, Run]:
    """Read models for `page` from run folders (their best.ckpt) or checkpoint files.

    Nothing in a checkpoint is executed, and its checksums are verified.

    Args:
        paths: run folders or checkpoint files.

    Returns:
        The models by the names of their folders; by their whole paths where two folders have the same name.

    Raises:
        UserError: if there is no checkpoint, or it is damaged.
    """
    found = [find_checkpoint(str(path), "best") for path in paths]
    short = [name_of(path) for path in found]
    names = [name if short.count(name) == 1 else str(path) for name, path in zip(short, found, strict=True)]
    return {name: read_run(path) for name, path in zip(names, found, strict=True)}


def name_of(checkpoint: Path) -> str:
    """Name a checkpoint by its run folder; other files than best.ckpt also by their own name."""
    folder = checkpoint.absolute().parent.name
    return folder if checkpoint.name == "best.ckpt" else f"{folder}/{checkpoint.stem}"


def read_run(path: Path) -> Run:
    """Read the model of one checkpoint file, in float32."""
    checkpoint = read_checkpoint(path)
    hyper = checkpoint["hyper_parameters"]
    if not hyper["tokenizer"]:
        raise UserError(f"{path}: the checkpoint has no tokenizer", SETTING)
    network = GPT(GPTConfig(**hyper["gpt"]))
    try:
        network.load_state_dict(network_weights(checkpoint["state_dict"]))
    except RuntimeError as error:
        raise UserError(f"{path}: the weights do not fit the checkpoint's own settings", SETTING) from error
    steps = checkpoint["global_step"]
    return Run(network.float().eval(), from_json(hyper["tokenizer"]), newest_sample(path.parent), f"step {steps:,}")


def newest_sample(folder: Path) -> str:
    """Return the beginning of the last text that a run sampled while it trained, or an empty text."""
    files = sorted((folder / "samples").glob("step-*.txt"))
    with suppress(OSError, UnicodeDecodeError):
        return files[-1].read_text(encoding="utf-8")[:SAMPLE_CHARACTERS].strip() if files else ""
    return ""


def write_page(
    path: Path, models: Mapping[str, Playable], text: str | None = None, dtype: WeightType = "float32"
) -> None:
    """Write `page(models, text, dtype)` to a file, atomically. An earlier page is replaced.

    Raises:
        UserError: as `page`; if the file exists and is not a page of this function, or cannot be written.
    """
    document = page(models, text, dtype)
    try:
        if path.exists():
            with path.open("rb") as file:
                if file.read(len(MARK)) != MARK.encode():
                    raise UserError(
                        f"{path}: the file exists and is not a page of gptlit: choose another name", "output"
                    )
        atomic_write_text(path, document)
    except OSError as error:
        raise UserError(f"{path}: the page cannot be written: {error.strerror}", "output") from error


# ---------------------------------------------------------------- parts of the document


def read_asset(name: str) -> str:
    """Return the text of a file of this package."""
    return (files("gptlit.play") / name).read_text(encoding="utf-8")


def script_text() -> str:
    """Return the page's script: one closure over all files, so that it defines no global names."""
    body = "\n".join(read_asset(name) for name in SCRIPTS)
    return f"'use strict';\n(() => {{\n{body}\n}})();\n"


def sha256(script: str) -> str:
    """Return the base64 SHA-256 of an inline script, for a content security policy."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def fill(template: str, **parts: str) -> str:
    """Replace each `{{name}}` of a template once; what is put in is not searched again."""
    pieces: list[str] = []
    for piece in template.split("{{"):
        name, closed, rest = piece.partition("}}")
        pieces.append(parts[name] + rest if closed and pieces else piece)
    return "".join(pieces)
