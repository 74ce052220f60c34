"""Whole runs of `gptlit fit`: time and steps to a loss, and the best loss, from their metrics.csv."""

import csv
import re
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from measuring import Finished, gptlit, run_process


@dataclass(frozen=True)
class Reached:
    """A run up to its first validation at or below the target, or to its end, and its best loss."""

    loss: float
    steps: int
    seconds: float
    """Training time up to there, without compilation, validation, samples and files."""
    met: bool
    best: float
    training: float
    """Training time of the whole run, in seconds."""
    whole: float
    """Total seconds of the process."""
    characters_per_second: float
    """Median over the run."""
    compiling: float | None
    """Seconds of compilation, if any."""


def train(config: str, text: Path, target: float, flags: Sequence[object] = (), accelerator: str = "cpu") -> Reached:
    """Run `gptlit fit` with a packaged configuration or a file, in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        settings = ("--config", config, "--data.corpus", text, "--run_dir", run, "--trainer.accelerator", accelerator)
        done = run_process(gptlit("fit", *settings, *flags))
        with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
            return read(list(csv.DictReader(file)), target, done)


def read(rows: Sequence[Mapping[str, str]], target: float, done: Finished) -> Reached:
    """Read the rows of metrics.csv; time is summed from one logged step to the next.

    Raises:
        RuntimeError: if the run was never validated.
    """
    seconds, step, there = 0.0, 0, None
    losses, speeds = [], []
    for row in rows:
        if row.get("perf/step_milliseconds"):
            seconds += float(row["perf/step_milliseconds"]) / 1e3 * (int(row["step"]) - step)
            step = int(row["step"])
            speeds.append(float(row["perf/characters_per_second"]))
        if row.get("val/loss"):
            losses.append(float(row["val/loss"]))
            if there is None and losses[-1] <= target:
                there = losses[-1], step, seconds
    if not losses:
        raise RuntimeError("the run was never validated")
    said = re.search(r"^compiled in (\d+) s", done.err, re.MULTILINE)
    loss, steps, until = there or (losses[-1], step, seconds)
    speed, compiling = statistics.median(speeds), float(said.group(1)) if said else None
    return Reached(loss, steps, until, there is not None, min(losses), seconds, done.seconds, speed, compiling)
