"""A training step compared with nanoGPT's, with the matmul peak of the machine, and inside the Trainer.

    python tests/benchmarks/bench_training.py --text input.txt --peer path/to/nanoGPT [--threads 2] [--json FILE]

Steps of `nanogpt_cpu`, `base` and `scaled` in a plain loop run in turn with nanoGPT's own model, optimizer and batch
function at the same sizes, each as a fraction of the matmul peak measured in the same call. The last lines give the
overhead of `gptlit fit` over the plain loop. --compile adds compiled steps. Without --peer, only gptlit runs.
"""

import argparse
import contextlib
import io
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from measuring import begin, finish, in_turn, parser, spread, table
from subjects import Step, build, encode, matmul_peak, matmul_precision_as, peer_step, plain_step, read_config, timed

from gptlit.callbacks.metrics import MetricsLogger, clock_stopped
from gptlit.cli.fit.command import run_fit
from gptlit.cli.fit.plan import parse_fit
from gptlit.device.memory import keep_freed_memory
from gptlit.training.compiling import flops_per_token

HEADER = ("step", "median, ms", "min", "max", "characters/s", "of peak", "nanoGPT's time / this")
STEPS_OF_FIT = 400
FULL = ("highest", torch.float32)


def clock_of(one: Step, precision: str, each: int) -> Callable[[], float]:
    """Return a clock for one step: the mean of `each` steps at a matmul precision."""

    def clock() -> float:
        with matmul_precision_as(precision):
            return timed(one, "cpu", each)

    return clock


@dataclass(frozen=True)
class Measured:
    """A step and its references."""

    label: str
    seconds: list[float]
    flops: float
    """FLOP of a step."""
    characters: int
    precision: str
    dtype: torch.dtype
    peer_seconds: float | None
    """Median of nanoGPT's step."""

    def row(self, peaks: Mapping[tuple[str, torch.dtype], float]) -> tuple[str, ...]:
        """Return a row of the table."""
        median = statistics.median(self.seconds)
        share = self.flops / median / peaks[self.precision, self.dtype]
        ratio = "" if self.peer_seconds is None else f"{self.peer_seconds / median:.2f}"
        return (self.label, *spread(self.seconds, 1e3), f"{self.characters / median:,.0f}", f"{share:.0%}", ratio)


def measure(name: str, options: argparse.Namespace, each: int, rounds: int) -> list[Measured]:
    """Measure one configuration: as configured, in full float32, compiled; and nanoGPT at its size."""
    config = read_config(name)
    module, data = build(config, options.text)
    bf16 = config["trainer"].get("precision") == "bf16-mixed"
    configured = (module.matmul_precision, torch.bfloat16 if bf16 else torch.float32)
    steps: dict[str, tuple[Step, tuple[str, torch.dtype]]] = {
        f"gptlit `{name}`": (plain_step(config, module, data), configured)
    }
    if module.matmul_precision != "highest" or bf16:
        again, _ = build(config, options.text)
        full = {**config, "trainer": {**config["trainer"], "precision": "32-true"}}
        steps[f"gptlit `{name}`, full float32"] = plain_step(full, again, data), FULL
    if options.compile:
        again, _ = build(config, options.text)
        steps[f"gptlit `{name}`, compiled"] = plain_step(config, again, data, "parts"), configured
    peer = f"nanoGPT at the size of `{name}`"
    if options.peer:
        tokens, _, numbers = encode(options.text)
        steps[peer] = peer_step(options.peer, tokens, len(numbers), config), FULL
    times = in_turn({label: clock_of(one, how[0], each) for label, (one, how) in steps.items()}, rounds)
    characters = data.batch_size * data.block_size
    flops = flops_per_token(module.network) * characters
    reference = statistics.median(times[peer]) if options.peer else None
    return [
        Measured(label, seconds, flops, characters, *steps[label][1], reference) for label, seconds in times.items()
    ]


def higher_peaks(peaks: dict[tuple[str, torch.dtype], float]) -> None:
    """Measure the matmul peaks again and keep the higher ones."""
    for precision, dtype in (FULL, ("medium", torch.float32), ("highest", torch.bfloat16)):
        with matmul_precision_as(precision):
            peak = matmul_peak(dtype=dtype)
        peaks[precision, dtype] = max(peak, peaks.get((precision, dtype), 0.0))
    peaks["medium", torch.bfloat16] = peaks["highest", torch.bfloat16]


class PlainLoopBetween(pl.Callback):
    """Runs steps of a plain loop between the steps of a fit, with its clock stopped: both see the same machine.

    Args:
        name: of the configuration.
        text: path of the corpus.
        each: steps of each side in a row.
    """

    def __init__(self, name: str, text: str, each: int) -> None:
        config = read_config(name)
        module, data = build(config, Path(text))
        self.one, self.precision, self.each = plain_step(config, module, data), module.matmul_precision, each
        self.plain: list[float] = []
        self.inside: list[float] = []
        self._clock = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Run the plain loop every `each` steps."""
        if batch_idx % self.each:
            return
        curves = next(callback for callback in trainer.callbacks if isinstance(callback, MetricsLogger))
        with clock_stopped(trainer), matmul_precision_as(self.precision):
            self.inside.append((curves.training_seconds - self._clock) / self.each)
            self._clock = curves.training_seconds
            self.plain.append(timed(self.one, "cpu", self.each))


def overhead(name: str, text: Path, each: int = 10) -> tuple[list[float], list[float]]:
    """Return the seconds of steps inside `gptlit fit` and of steps of a plain loop between them."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--config", name, "--data.corpus", str(text), "--run_dir", f"{folder}/run"]
        arguments += ["--trainer.max_steps", str(STEPS_OF_FIT), "--trainer.val_check_interval", str(STEPS_OF_FIT)]
        arguments += ["--trainer.limit_val_batches", "1", "--trainer.accelerator", "cpu", "--model.compile", "false"]
        turns = PlainLoopBetween(name, str(text), each)
        with contextlib.redirect_stderr(io.StringIO()):
            run_fit(parse_fit(arguments), extra_callbacks=[turns])
    return turns.inside[2:], turns.plain[2:]  # the first turns warm up


def main() -> None:
    """Print the tables."""
    options_of = parser(__doc__, rounds=7)
    options_of.add_argument("--peer", type=Path, help="a checkout of nanoGPT")
    options_of.add_argument("--each", type=int, default=20, help="steps per measurement, for the small models")
    options_of.add_argument("--only", nargs="*", default=["nanogpt_cpu", "base", "scaled"], help="configurations")
    options_of.add_argument("--compile", action="store_true", help="also compiled")
    options = options_of.parse_args()
    begin(options)
    keep_freed_memory()
    peaks: dict[tuple[str, torch.dtype], float] = {}
    measured: list[Measured] = []
    for name in options.only:
        large = name == "scaled"  # seconds a step
        higher_peaks(peaks)
        measured += measure(name, options, 1 if large else options.each, 3 if large else options.rounds)
    higher_peaks(peaks)
    named = [f"{peak / 1e9:.0f} GFLOP/s {dtype} {how}".replace("torch.", "") for (how, dtype), peak in peaks.items()]
    print(f"matmul peaks: {', '.join(named[:3])}\n")
    print(table(HEADER, [one.row(peaks) for one in measured]))
    inside, plain = overhead("base", options.text)
    added = statistics.median(inside) / statistics.median(plain) - 1
    print(f"\nA step of `base`, ms (median, min, max): in `gptlit fit` {' '.join(spread(inside, 1e3, 2))},")
    print(f"in a plain loop in turn {' '.join(spread(plain, 1e3, 2))}: the command adds {added:.1%}")
    finish(options, seconds={one.label: one.seconds for one in measured}, peaks=named, inside=inside, plain=plain)


if __name__ == "__main__":
    main()
