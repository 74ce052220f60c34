"""The model card of an exported model: what it is, its text, its loss, how to load it, and what it was tried with."""

import math
from collections.abc import Mapping
from typing import Any

import yaml

from gptlit.checkpoint.validations import validations_of
from gptlit.convert.compare import Check
from gptlit.convert.gguf_file import low_row, utf8_prefixes
from gptlit.convert.gpt2_weights import with_all_biases
from gptlit.convert.tools import LIMITS, PADDED, TIED, TRIED, USAGE
from gptlit.errors import shell_option
from gptlit.model.gpt import GPT
from gptlit.tokenizer import CharTokenizer, Tokenizer
from gptlit.version import __version__

CARD = """---
{{ card_data }}
---

# {{ name }}

A GPT of {{ parameters }} parameters over {{ tokens }}, trained with gptlit {{ version }}.

{{ usage }}

## Limits

{{ limits }}

## Tried with

{{ tried }}

## Training

{{ table }}
"""


def model_card(
    checkpoint: Mapping[str, Any],
    model: GPT,
    tokenizer: Tokenizer,
    name: str,
    format: str,
    architecture: str,
    check: Check,
    command: str = "",
) -> str:
    """Return the Markdown of the card, with the metadata that the Hugging Face hub reads.

    Args:
        checkpoint: of the run.
        model: its network.
        tokenizer: its tokenizer.
        name: title.
        format: of the export.
        architecture: class of transformers, or the format.
        check: of the export.
        command: how it was exported.
    """
    from huggingface_hub import ModelCard, ModelCardData

    gpt, stored = model.config, checkpoint.get("gptlit", {})
    library = "transformers" if format == "transformers" else format
    rows = training_rows(checkpoint, model, tokenizer)
    if command:
        rows["Exported by"] = f"`{command}`"
    rows["Check"] = (
        f"logits of the exported model equal gptlit's at {check.positions:,} random positions; largest difference "
        f"{check.largest_difference:.1e}"
    )
    values = {
        "block_size": gpt.block_size,
        "new": gpt.block_size - 1,
        "prompt": tokenizer.decode([0]),
        "copy": "cp -r EXPORT/data/gptlit data/\n" if tokenizer.kind == "char" else "",
    }
    # With a context of one token, `generate` has no room for another one.
    usage = USAGE["transformers, one token" if format == "transformers" and gpt.block_size == 1 else format]
    limits = limits_of(model, tokenizer, format, architecture, values)
    card = ModelCard.from_template(
        ModelCardData(library_name=library, pipeline_tag="text-generation", tags=["gptlit"]),
        template_str=CARD,
        name=name,
        parameters=f"{sum(p.numel() for p in model.parameters()):,}",
        tokens=f"{gpt.vocab_size:,} {'characters' if tokenizer.kind == 'char' else 'byte-pair tokens'}",
        version=stored.get("version", __version__),
        usage=usage.format(**values),
        limits="\n".join(f"- {line}" for line in limits),
        tried=markdown_table(("tool", "what agreed", "what it needs"), TRIED[architecture]),
        table=markdown_table(("", ""), rows.items()),
    )
    return str(card).rstrip() + "\n"


def limits_of(model: GPT, tokenizer: Tokenizer, format: str, architecture: str, values: Mapping[str, Any]) -> list[str]:
    """Return what an export cannot do, a sentence or two each; `values` fill the fields of the texts."""
    limits = [line.format(**values) for line in LIMITS["all"] + LIMITS[architecture]]
    padding = len(utf8_prefixes(tokenizer.symbols)) if isinstance(tokenizer, CharTokenizer) else 0
    if format == "gguf" and padding and low_row(with_all_biases(model.state_dict())) is None:
        limits.append(PADDED.format(padding=padding))
    if architecture == "GPT2LMHeadModel" and model.config.tie_weights:
        limits.append(TIED)
    if tokenizer.kind == "char":
        limits.append("A character outside the vocabulary is refused: the tokenizer raises an exception.")
    return limits


def training_rows(checkpoint: Mapping[str, Any], model: GPT, tokenizer: Tokenizer) -> dict[str, str]:
    """Return what the checkpoint says about its training, by title."""
    gpt, stored = model.config, checkpoint.get("gptlit", {})
    config = yaml.safe_load(stored["config"]) if stored.get("config") else {}
    data = config.get("data") or {}
    rows = {"Text": text_line(tokenizer, data, stored.get("corpus") or {})}
    if data:
        rows["Split"] = split_line(data, config.get("seed_everything"))
    found = validations_of(checkpoint)
    part = f"{found.best_part} of the" if found.best_part else "the whole"
    rows["Protocol"] = (
        f"{part} validation part in windows of {gpt.block_size:,} tokens that do not overlap, each token but the first "
        "predicted once; mean cross-entropy"
    )
    rows["Loss"] = loss_line(checkpoint, tokenizer)
    rows["Steps"] = f"{checkpoint.get('global_step', 0):,}"
    if data.get("batch_size"):
        rows["Steps"] += f" of {data['batch_size'] * gpt.block_size:,} tokens"
    rows["Seed"] = str(checkpoint["hyper_parameters"].get("seed", "unknown"))
    if stored.get("init_from"):
        rows["Initial weights"] = f"those of {stored['init_from']}"
    if stored.get("teachers"):
        rows["Teachers"] = teachers_line(stored, config)
    if config:
        rows["Trained by"] = command_line(stored)
    return rows


def teachers_line(stored: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Name the teachers and their weight; versions that stored no weight kept it in the configuration only."""
    weight = stored.get("teacher_weight", (config.get("model") or {}).get("teacher_weight"))
    line = ", ".join(stored["teachers"])
    return line if weight is None else f"{line}; weight {weight:g}: {weight:.0%} of the training loss is theirs"


def command_line(stored: Mapping[str, Any]) -> str:
    """Return the command that trains such a model again. The configuration of a run never holds `init_from`."""
    command, note = "gptlit fit --config gptlit.yaml", "the file is in this folder"
    if stored.get("init_from"):
        command += f" {shell_option('--model.init_from', stored['init_from'])}"
    elif "init_from" not in stored:
        note += "; the checkpoint does not say whether training began with the weights of another model"
    return f"`{command}` ({note})"


def markdown_table(header: tuple[str, ...], rows: Any) -> str:
    """Return a table; cells keep their text on one line, with vertical bars escaped."""
    lines = []
    for row in [header, ("---",) * len(header), *rows]:
        lines.append(f"| {' | '.join(map(one_cell, row))} |")
    return "\n".join(lines)


def one_cell(text: str) -> str:
    """Return a text as a cell of a Markdown table: on one line, with vertical bars escaped."""
    return " ".join(text.split()).replace("|", "\\|")


def text_line(tokenizer: Tokenizer, data: Mapping[str, Any], corpus: Mapping[str, Any]) -> str:
    """Name the text trained on: as the run recorded it, else as the tokenizer did."""
    if corpus.get("name"):
        return f"{corpus['name']} (sha256 {corpus['sha256']})" if corpus.get("sha256") else str(corpus["name"])
    return tokenizer.source or str(data.get("corpus", "unknown"))


def split_line(data: Mapping[str, Any], run_seed: int | None) -> str:
    """Describe which part of the text was held out; without data.split_seed, the seed of the run chose documents."""
    if data.get("val_corpus"):
        return "trained on all of the text, validated on another one"
    fraction = data.get("val_fraction", 0.1)
    if data.get("split") == "documents":
        seed = data.get("split_seed", run_seed)
        return f"{fraction:.4g} of the documents, chosen at random (seed {seed}), are the validation part"
    return f"the last {fraction:.4g} of the text, in order, is the validation part; the rest is trained on"


def loss_line(checkpoint: Mapping[str, Any], tokenizer: Tokenizer) -> str:
    """Return the validation loss of these weights, or of the run's best ones if these are others."""
    found = validations_of(checkpoint)
    if found.best_loss is None:
        return "not measured in the run"
    loss = f"{found.best_loss:.4f} nats per token"
    if tokenizer.kind == "char":
        loss += f" = {found.best_loss / math.log(2):.4f} bits per character"
    if found.best_step == checkpoint.get("global_step"):
        return loss
    return f"not measured for these weights; the best of the run, at step {found.best_step:,}: {loss}"
