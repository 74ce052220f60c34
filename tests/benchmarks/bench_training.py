"""The training step beside nanoGPT's, against the machine's limit, and inside the Trainer: medians and ratios.

    python tests/benchmarks/bench_training.py --text input.txt --peer path/to/nanoGPT [--threads 2] [--json FILE]

The step of `nanogpt_cpu`, of `base` and of `scaled` in a bare loop, in turn with nanoGPT's own model, optimizer and
batch function at the same sizes; what part of the machine's matrix-multiply peak, measured in the same run, they
reach; and what `gptlit fit` adds to the bare loop. Nothing is compiled, unless --compile asks for it.
Without --peer, ours alone. Nothing of the peer is kept.
"""

import argparse
import contextlib
import io
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from measuring import begin, finish, in_turn, parser, spread, table
from subjects import Step, bare_step, build, encode, matmul_peak, peer_step, products_as, read_config, timed

from gptlit.callbacks.curves import Curves, clock_stopped
from gptlit.cli.training import GptlitCLI, keep_freed_memory
from gptlit.compiling import flops_per_token

HEADER = ("step", "median, ms", "min", "max", "characters/s", "of peak", "nanoGPT's time / this")
STEPS_OF_FIT = 400


def clock_of(one: Step, precision: str, each: int) -> Callable[[], float]:
    """Seconds of one step, over `each` of them, at a precision of products."""

    def clock() -> float:
        with products_as(precision):
            return timed(one, "cpu", each)

    return clock


def measure(name: str, options: argparse.Namespace, each: int, rounds: int) -> list[tuple[Any, ...]]:
    """Rows for one configuration: nanoGPT where it can be compared, ours as configured, ours in full float32."""
    config = read_config(name)
    module, data = build(config, options.text)
    as_configured = module.matmul_precision
    one = bare_step(config, module, data, "blocks" if options.compile else "no")
    clocks = {f"gptlit `{name}`": clock_of(one, as_configured, each)}
    precisions = {f"gptlit `{name}`": as_configured}
    if as_configured != "highest":
        again, _ = build(config, options.text)
        label = f"gptlit `{name}`, full float32"
        clocks[label], precisions[label] = clock_of(bare_step(config, again, data), "highest", each), "highest"
    peer = f"nanoGPT at the size of `{name}`"
    if options.peer:
        tokens, _, numbers = encode(options.text)
        clocks[peer] = clock_of(peer_step(options.peer, tokens, len(numbers), config), "highest", each)
        precisions[peer] = "highest"
    times = in_turn(clocks, rounds)
    bf16 = config["trainer"].get("precision") == "bf16-mixed"
    shape = data.batch_size * data.block_size
    rows = []
    for label, seconds in times.items():
        median = statistics.median(seconds)
        with products_as(precisions[label]):
            peak = matmul_peak(dtype=torch.bfloat16 if bf16 else torch.float32)
        share = flops_per_token(module.network) * shape / median / peak
        ratio = f"{statistics.median(times[peer]) / median:.2f}" if options.peer else ""
        rows.append((label, *spread(seconds, 1e3), f"{shape / median:,.0f}", f"{share:.0%}", ratio))
    return rows


class BareBetween(pl.Callback):
    """Between the steps of a fit, off its clock, as many of a bare loop: both meet the same machine.

    Args:
        name: of the configuration.
        text: path of the corpus.
        each: steps of either in a row.
    """

    def __init__(self, name: str, text: str, each: int) -> None:
        config = read_config(name)
        module, data = build(config, Path(text))
        self.one, self.precision, self.each = bare_step(config, module, data), module.matmul_precision, each
        self.bare: list[float] = []
        self.inside: list[float] = []
        self._clock = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Takes its turn every `each` steps."""
        if batch_idx % self.each:
            return
        curves = next(callback for callback in trainer.callbacks if isinstance(callback, Curves))
        with clock_stopped(trainer), products_as(self.precision):
            self.inside.append((curves.training_seconds - self._clock) / self.each)
            self._clock = curves.training_seconds
            self.bare.append(timed(self.one, "cpu", self.each))


def overhead(name: str, text: Path, each: int = 10) -> tuple[list[float], list[float]]:
    """Seconds of a step inside `gptlit fit`, with all that the command brings, and in a bare loop between them."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--config", name, "--data.corpus", str(text), "--run_dir", f"{folder}/run"]
        arguments += ["--trainer.max_steps", str(STEPS_OF_FIT), "--trainer.val_check_interval", str(STEPS_OF_FIT)]
        arguments += ["--trainer.limit_val_batches", "1", "--trainer.accelerator", "cpu", "--model.compile", "false"]
        between = {
            "class_path": "bench_training.BareBetween",
            "init_args": {"name": name, "text": str(text), "each": each},
        }
        with contextlib.redirect_stderr(io.StringIO()):
            command = GptlitCLI("fit", [*arguments, "--trainer.callbacks", str([between])])
    turns = next(c for c in command.trainer.callbacks if type(c).__name__ == "BareBetween")
    return turns.inside[2:], turns.bare[2:]  # the first turns warm up


def main() -> None:
    """Prints the tables."""
    options_of = parser(__doc__, rounds=7)
    options_of.add_argument("--peer", type=Path, help="a checkout of nanoGPT")
    options_of.add_argument("--each", type=int, default=20, help="steps measured as one, for the small models")
    options_of.add_argument("--only", nargs="*", default=["nanogpt_cpu", "base", "scaled"], help="configurations")
    options_of.add_argument("--compile", action="store_true", help="compile ours")
    options = options_of.parse_args()
    begin(options)
    keep_freed_memory()
    with products_as("highest"):
        full = matmul_peak()
    with products_as("medium"):
        medium = matmul_peak()
    low = matmul_peak(dtype=torch.bfloat16)
    print(f"products: float32 {full / 1e9:.0f}, medium {medium / 1e9:.0f}, bfloat16 {low / 1e9:.0f} GFLOP/s\n")
    rows = []
    for name in options.only:
        large = name == "scaled"  # seconds a step
        rows += measure(name, options, 1 if large else options.each, 3 if large else options.rounds)
    print(table(HEADER, rows))
    inside, bare = overhead("base", options.text)
    added = statistics.median(inside) / statistics.median(bare) - 1
    print(
        f"\nA step of `base`, ms (median, min, max): in `gptlit fit` {' '.join(spread(inside, 1e3, 2))}, in a bare loop"
    )
    print(f"in turn with it {' '.join(spread(bare, 1e3, 2))}: the command adds {added:.1%}")
    finish(options, rows=rows, peaks=[full, medium, low], inside=inside, bare=bare)


if __name__ == "__main__":
    main()
