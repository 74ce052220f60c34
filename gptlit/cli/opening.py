"""The line that every training begins with: what a step reads, and how large the model is."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from gptlit.config import GPTConfig
from gptlit.data import TextDataModule
from gptlit.model import GPT
from gptlit.module import LitGPT
from gptlit.optim import OptimizerConfig, parameter_groups

STATES = {"matrix": 1, "decay": 2, "no_decay": 2}  # numbers of a weight that Muon and AdamW keep
UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def opening_line(module: LitGPT, data: TextDataModule, trainer: pl.Trainer) -> str:
    """`12 sequences × 1 accumulation × 1 device × 64 tokens = 768 tokens per step · 803,072 parameters · …`."""
    assert data.tokenizer is not None
    config = replace(module.gpt, vocab_size=data.tokenizer.vocab_size)
    sharded = isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy)
    size = 2 if str(trainer.precision).endswith("16-true") else 4  # bytes of a number
    parameters, numbers = count_numbers(config, module.optimizer_config)
    memory = numbers * size / (trainer.world_size if sharded else 1)
    devices = trainer.world_size
    return (
        f"{data.batch_size // (trainer.accumulate_grad_batches * devices)} sequences × "
        f"{trainer.accumulate_grad_batches} accumulation × {devices} device{'s' * (devices > 1)} × "
        f"{data.block_size} tokens = {data.batch_size * data.block_size:,} tokens per step · "
        f"{parameters:,} parameters · {in_bytes(memory)} for weights, gradients and optimizer"
        f"{' on each device' * (devices > 1)}"
    )


def count_numbers(config: GPTConfig, optimizer: OptimizerConfig) -> tuple[int, int]:
    """Parameters of a model, and with their gradients and the optimizer's state, all the numbers kept between steps.

    The model is built without memory; tables of angles, which are no parameters, are left out.
    """
    with torch.device("meta"):
        model = GPT(replace(config, position="none" if config.position == "rope" else config.position))
    groups: Sequence[dict[str, Any]] = parameter_groups(model, optimizer)
    sizes = {group["role"]: sum(p.numel() for p in group["params"]) for group in groups}
    return sum(sizes.values()), sum((2 + STATES[role]) * size for role, size in sizes.items())


def in_bytes(count: float) -> str:
    """`12.8 MB`."""
    for unit, name in UNITS:
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:.0f} bytes"
