"""Training steps on one device, compared with nanoGPT's: time, tokens per second and fraction of the matmul peak."""

import statistics
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from measuring import row, spread, table
from subjects import Compiled, Step, build, encode, peer_step, plain_step, read_config, step_of, timed

from gptlit import GPT, GPTConfig, OptimizerConfig, RandomChunks
from gptlit.training.compiling import Mode, flops_per_token

HEADER = ("step", "median, ms", "min", "max", "tokens/s", "of peak", "nanoGPT's time / this")
PEER = "nanoGPT"
GPT2_VOCABULARY = 50_304  # nanoGPT's, 50,257 rounded up to a multiple of 64
TINY = {"block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 32}


@dataclass(frozen=True)
class Plan:
    """What is measured, and at which size."""

    device: str
    text: Path
    peer: Path | None
    small: bool
    """Tiny sizes, to try the script on a CPU."""
    mode: Mode = "default"
    """Mode of torch.compile for gptlit."""

    @property
    def compiled(self) -> Literal["no", "parts"]:
        """Return `no` with --small, else `parts`."""
        return "no" if self.small else "parts"

    def config(self, name: str) -> dict[str, Any]:
        """Return a packaged configuration at the size to measure."""
        config = read_config(name, TINY if self.small else None)
        if self.small:
            config["data"]["batch_size"] = 2
        return config

    def seconds(self, one: Any) -> list[float]:
        """Return the seconds of a step, five times over twenty steps, after ten warm-up steps."""
        calls = 2 if self.small else 20
        timed(one, self.device, 2 if self.small else 10)
        return [timed(one, self.device, calls) for _ in range(5)]


@dataclass(frozen=True)
class Subject:
    """A step to be measured."""

    label: str
    config: Mapping[str, Any]
    vocab_size: int
    build: Callable[[], Step]

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.config["data"]["batch_size"] * self.config["model"]["gpt"]["block_size"]

    @property
    def flops(self) -> float:
        """FLOP of a token; nanoGPT has the matmuls of our model at the same settings."""
        return flops_per_token(GPT(GPTConfig(**{**self.config["model"]["gpt"], "vocab_size": self.vocab_size})))


def measure(plan: Plan, peak: float, subjects: Iterable[Subject]) -> dict[str, list[float]]:
    """Return the seconds of steps by label, and print each row as soon as it is known.

    A step that fails is reported, and the next one is measured. nanoGPT's step, if any, comes first.
    """
    found: dict[str, list[float]] = {}
    reference = None  # nanoGPT's seconds for one token
    print(table(HEADER, []))
    for subject in subjects:
        torch.compiler.reset()  # or a second size would compile dynamic shapes, which are slower
        try:
            seconds = plan.seconds(subject.build())
        except Exception:
            traceback.print_exc()
            continue
        found[subject.label], median = seconds, statistics.median(seconds)
        if subject.label == PEER:
            reference = median / subject.tokens
        ratio = "" if reference is None else f"{reference * subject.tokens / median:.2f}"
        of_peak = f"{subject.flops * subject.tokens / median / peak:.1%}"
        print(row((subject.label, *spread(seconds, 1e3, 2), f"{subject.tokens / median:,.0f}", of_peak, ratio)))
    return found


def characters(plan: Plan, peak: float) -> dict[str, list[float]]:
    """Measure steps of `nanogpt`, `scaled` and `best`, and nanoGPT's own."""
    tokens, _, numbers = encode(plan.text)
    subjects = []
    if plan.peer:
        config = plan.config("nanogpt")
        peer = partial(peer_step, plan.peer, tokens, len(numbers), config, plan.device, compiled=plan.compiled != "no")
        subjects.append(Subject(PEER, config, len(numbers), peer))

    def ours(config: Mapping[str, Any]) -> Step:
        return plain_step(config, *build(config, plan.text, plan.device), plan.compiled, plan.mode)

    for name in ("nanogpt", "scaled", "best"):
        config = plan.config(name)
        subjects.append(Subject(f"gptlit `{name}`", config, len(numbers), partial(ours, config)))
    return measure(plan, peak, subjects)


def gpt2(plan: Plan, peak: float) -> dict[str, list[float]]:
    """Measure a step of GPT-2 124M at block 1024 on one micro-batch."""
    config = plan.config("gpt2")
    config["data"]["batch_size"] = 2 if plan.small else 16
    vocabulary = 300 if plan.small else GPT2_VOCABULARY
    settings = GPTConfig(**{**config["model"]["gpt"], "vocab_size": vocabulary})
    batch = config["data"]["batch_size"]
    ids = np.random.default_rng(1).integers(vocabulary, size=1_000_000, dtype=np.uint16)
    chunks = RandomChunks(torch.from_numpy(ids.astype(np.int32)).to(plan.device), settings.block_size, batch, 1)
    optimizer = OptimizerConfig(**config["model"]["optimizer"])
    subjects = []
    if plan.peer:
        peer = partial(peer_step, plan.peer, ids, vocabulary, config, plan.device, compiled=plan.compiled != "no")
        subjects.append(Subject(PEER, config, vocabulary, peer))

    def ours(compiled: Compiled) -> Step:
        network = GPT(settings).to(plan.device)
        return step_of(network, chunks, optimizer, config["trainer"], compiled, plan.mode)

    ways: Mapping[str, Compiled] = {
        "gptlit": plan.compiled,
        "gptlit, compiled as a whole": "no" if plan.small else "whole",
    }
    for label, compiled in ways.items():
        subjects.append(Subject(label, config, vocabulary, partial(ours, compiled)))
    return measure(plan, peak, subjects)
