"""The model card of an exported model: what it is, what it was trained on, how well it does, how to make it again."""

import math
from collections.abc import Mapping
from typing import Any

import yaml

from gptlit.model.gpt import GPT
from gptlit.tokenizer import Tokenizer
from gptlit.version import __version__

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- gptlit
---

# {name}

A GPT of {parameters:,} parameters over {symbols}, trained with gptlit {version}.
Transformers knows the architecture as `{architecture}`.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this file lies
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
prompt = tokenizer({prompt!r}, return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens={new_tokens})[0]))
```

Prompt and new text together fit {block_size:,} tokens. No token ends a text: `max_new_tokens` does.
By default `generate` draws from the model's own distribution; `do_sample=False` takes the most probable token always.

| | |
|---|---|
{table}
"""


def model_card(
    checkpoint: Mapping[str, Any],
    model: GPT,
    tokenizer: Tokenizer,
    name: str,
    architecture: str,
    check: tuple[int, float],
    command: str = "",
) -> str:
    """Markdown with front matter, from what the checkpoint itself says.

    Args:
        checkpoint: of the run.
        model: its network.
        tokenizer: its tokenizer.
        name: title of the card.
        architecture: class of transformers.
        check: positions at which the exported model was compared with ours, and the largest difference of a logit.
        command: how it was exported.
    """
    gpt = model.config
    stored = checkpoint.get("gptlit", {})
    config = yaml.safe_load(stored["config"]) if stored.get("config") else {}
    data = config.get("data") or {}
    rows = {"Text": text_line(tokenizer, data, stored.get("corpus") or {})}
    if data:
        rows["Split"] = split_line(data)
    rows["Protocol"] = (
        f"the whole validation part in windows of {gpt.block_size:,} tokens that do not overlap, each token but the "
        "first predicted once; mean cross-entropy"
    )
    rows["Loss"] = loss_line(checkpoint, tokenizer)
    rows["Steps"] = f"{checkpoint.get('global_step', 0):,}"
    if data.get("batch_size"):
        rows["Steps"] += f" of {data['batch_size'] * gpt.block_size:,} tokens"
    rows["Seed"] = str(checkpoint["hyper_parameters"].get("seed", "unknown"))
    if config:
        rows["Trained by"] = "`gptlit fit --config gptlit.yaml` (the file is in this folder)"
    if command:
        rows["Exported by"] = f"`{command}`"
    rows["Check"] = f"logits equal gptlit's at {check[0]:,} random positions; largest difference {check[1]:.1e}"
    return CARD.format(
        name=name,
        parameters=sum(p.numel() for p in model.parameters()),
        symbols=f"{gpt.vocab_size:,} {'characters' if tokenizer.kind == 'char' else 'byte-pair tokens'}",
        version=stored.get("version", __version__),
        architecture=architecture,
        prompt=tokenizer.decode([0]),
        new_tokens=gpt.block_size - 1,
        block_size=gpt.block_size,
        table="\n".join(f"| {title} | {cell(text)} |" for title, text in rows.items()),
    )


def cell(text: str) -> str:
    """A text that does not break a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def text_line(tokenizer: Tokenizer, data: Mapping[str, Any], corpus: Mapping[str, Any]) -> str:
    """The text trained on: as the run kept it, else by the name that the tokenizer took from it."""
    if corpus.get("name"):
        return f"{corpus['name']} (sha256 {corpus['sha256']})" if corpus.get("sha256") else str(corpus["name"])
    return tokenizer.source or str(data.get("corpus", "unknown"))


def split_line(data: Mapping[str, Any]) -> str:
    """Which part of the text was held out."""
    if data.get("val_corpus"):
        return "trained on all of the text, validated on another one"
    fraction = data.get("val_fraction", 0.1)
    return f"the last {fraction:.4g} of the text, in order, is the validation part; the rest is trained on"


def loss_line(checkpoint: Mapping[str, Any], tokenizer: Tokenizer) -> str:
    """The validation loss of these weights, or of the run's best ones when these are others."""
    states = checkpoint.get("callbacks", {}).values()
    state = next((state for state in states if isinstance(state, dict) and state.get("best_score") is not None), None)
    if state is None:
        return "not measured in the run"
    loss = f"{state['best_score']:.4f} nats per token"
    if tokenizer.kind == "char":
        loss += f" = {state['best_score'] / math.log(2):.4f} bits per character"
    if state.get("best_step") == checkpoint.get("global_step"):
        return loss
    return f"not measured for these weights; the best of the run, at step {state['best_step']:,}: {loss}"
