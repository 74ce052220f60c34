"""Steps on one device: ours beside nanoGPT's, characters per second, and what part of the device's peak they reach."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from measuring import spread, table
from subjects import bare_step, build, encode, peer_step, read_config, step_of, timed

from gptlit import GPT, GPTConfig, OptimizerConfig, RandomChunks
from gptlit.compiling import flops_per_token

HEADER = ("step", "median, ms", "min", "max", "tokens/s", "of peak", "nanoGPT's time / this")
GPT2_VOCABULARY = 50_304  # nanoGPT's, 50,257 rounded up to a multiple of 64
TINY = {"block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 32}


@dataclass(frozen=True)
class Plan:
    """What is measured, and how thoroughly."""

    device: str
    text: Path
    peer: Path | None
    small: bool
    """Tiny sizes, to try the script on a CPU."""
    graphs: bool = False
    """Our steps are recorded as CUDA graphs."""

    @property
    def compiled(self) -> Literal["no", "parts"]:
        """Nothing is compiled when it is only tried."""
        return "no" if self.small else "parts"

    def config(self, name: str) -> dict[str, Any]:
        """A packaged configuration at the size that is measured."""
        config = read_config(name, TINY if self.small else None)
        if self.small:
            config["data"]["batch_size"] = 2
        return config

    def seconds(self, one: Any) -> list[float]:
        """Of a step, five times over twenty steps, after ten that warm up."""
        calls = 2 if self.small else 20
        timed(one, self.device, 2 if self.small else 10)
        return [timed(one, self.device, calls) for _ in range(5)]


def characters(plan: Plan, peak: float) -> dict[str, list[float]]:
    """Steps of `nanogpt` (its architecture), `scaled` and `best`, beside nanoGPT's own; prints a table."""
    seconds: dict[str, list[float]] = {}
    rows: list[tuple[Any, ...]] = []
    config = plan.config("nanogpt")
    tokens, _, numbers = encode(plan.text)
    shape = config["data"]["batch_size"] * config["model"]["gpt"]["block_size"]
    reference = None
    if plan.peer:
        one = peer_step(plan.peer, tokens, len(numbers), config, plan.device, compiled=not plan.small)
        seconds["nanoGPT"] = plan.seconds(one)
        reference = sorted(seconds["nanoGPT"])[2] / shape
    for name in ("nanogpt", "scaled", "best"):
        config = plan.config(name)
        module, data = build(config, plan.text, plan.device)
        label = f"gptlit `{name}`"
        seconds[label] = plan.seconds(bare_step(config, module, data, plan.compiled, plan.graphs))
        shape = data.batch_size * data.block_size
        rows.append(row_of(label, seconds[label], shape, flops_per_token(module.network), peak, reference))
        if name == "nanogpt" and reference:
            flops = flops_per_token(module.network)
            rows.insert(0, row_of("nanoGPT", seconds["nanoGPT"], shape, flops, peak, reference))
    print(table(HEADER, rows))
    return seconds


def gpt2(plan: Plan, peak: float) -> dict[str, list[float]]:
    """A micro-batch of GPT-2's smallest size, 124M at block 1024, with its update; prints a table."""
    config = plan.config("gpt2")
    config["data"]["batch_size"] = 2 if plan.small else 16
    vocabulary = 300 if plan.small else GPT2_VOCABULARY
    settings = GPTConfig(**{**config["model"]["gpt"], "vocab_size": vocabulary})
    batch, shape = config["data"]["batch_size"], config["data"]["batch_size"] * settings.block_size
    ids = np.random.default_rng(1).integers(vocabulary, size=1_000_000, dtype=np.uint16)
    chunks = RandomChunks(torch.from_numpy(ids.astype(np.int32)).to(plan.device), settings.block_size, batch, 1)
    optimizer = OptimizerConfig(**config["model"]["optimizer"])
    seconds: dict[str, list[float]] = {}
    flops = flops_per_token(GPT(settings))
    reference = None
    if plan.peer:
        seconds["nanoGPT"] = plan.seconds(
            peer_step(plan.peer, ids, vocabulary, config, plan.device, compiled=not plan.small)
        )
        reference = sorted(seconds["nanoGPT"])[2] / shape
    ways: Mapping[str, Any] = {"gptlit": plan.compiled, "gptlit, compiled as a whole": "no" if plan.small else "whole"}
    for how, compiled in ways.items():
        network = GPT(settings).to(plan.device)
        seconds[how] = plan.seconds(step_of(network, chunks, optimizer, config["trainer"], compiled, plan.graphs))
    rows = [row_of(name, values, shape, flops, peak, reference) for name, values in seconds.items()]
    print(table(HEADER, rows))
    return seconds


def row_of(
    label: str, seconds: list[float], tokens: int, flops: float, peak: float, reference: float | None
) -> tuple[Any, ...]:
    """A row of the table; `reference` is nanoGPT's time for one token."""
    median = sorted(seconds)[len(seconds) // 2]
    ratio = "" if reference is None else f"{reference * tokens / median:.2f}"
    return (label, *spread(seconds, 1e3, 2), f"{tokens / median:,.0f}", f"{flops * tokens / median / peak:.1%}", ratio)
