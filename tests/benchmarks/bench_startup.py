"""Start and end of whole processes, in wall-clock time and user CPU time, of one or of two builds in turn.

    python tests/benchmarks/bench_startup.py --text input.txt [--against ../older-checkout] [--threads 2] [--rounds 5]
                                             [--measured_threads] [--json FILE]

`gptlit --help` and `--version` to their end; `gptlit predict` to the first sampled character on stdout; `gptlit fit` to
the row of the first training step in metrics.csv, and from there to its end; next to Python alone, and the imports of
torch and Lightning without the end of the process. --against does the same with another checkout, which is imported
from its own folder.

A fit makes one step of `base` on a CPU and validates. With --measured_threads it plans all steps of `base` and is
killed after the first one, and OMP_NUM_THREADS is not set: the number of threads is measured where the build does so.

The first round, which brings the libraries into the file system's cache, does not count.
"""

import argparse
import csv
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from measuring import REPOSITORY, Finished, begin, finish, gptlit, in_turn, parser, run_process, table, user_seconds

IMPORT_TORCH = "import torch"
IMPORTS = (IMPORT_TORCH, "import torch, lightning.pytorch")
PREDICT = "gptlit predict, first character"
FIT = "gptlit fit, first training step"
END = "gptlit fit of one step, from there to the end"
OLDER = "older build: "
PATIENCE = 120.0  # seconds
TEXT_ONLY = ("--repeat_prompt", "false")  # the prompt is written before anything is sampled
BASE = ("fit", "--config", "base", "--trainer.log_every_n_steps", 1, "--trainer.accelerator", "cpu")
ONE_STEP = ("--trainer.max_steps", 1, "--sample_text.max_new_tokens", 0)
HEADER = ("process", "wall, s", "min", "max", "user CPU, s", "min", "max")


class Spent(NamedTuple):
    """Seconds of a process."""

    wall: float
    user: float


def run_in(tree: Path, command: Sequence[object]) -> Finished:
    """Run a command that imports gptlit from a checkout: not in a folder with another, which Python would prefer."""
    return run_process(command, {"PYTHONPATH": str(tree)}, cwd=tempfile.gettempdir())


def whole(*command: object, tree: Path = REPOSITORY) -> Callable[[], list[Spent]]:
    """Return a function that runs a process to its end."""

    def run() -> list[Spent]:
        done = run_in(tree, command)
        return [Spent(done.seconds, done.user)]

    return run


def to_first_byte(*command: object, tree: Path = REPOSITORY) -> Callable[[], list[Spent]]:
    """Return a function that runs a process to its first byte on stdout."""

    def run() -> list[Spent]:
        done = run_in(tree, command)
        return [Spent(done.first_byte or float("nan"), done.first_byte_user)]

    return run


def to_first_step(tree: Path, text: Path, folder: Path, measured_threads: bool) -> Callable[[], list[Spent]]:
    """Return a function that runs a fit of `base` to its first step in metrics.csv, and then to its end.

    With `measured_threads` it is killed after the first step. A RuntimeError if it makes none.
    """
    run = folder / "first"
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    if measured_threads:
        del environment["OMP_NUM_THREADS"]
    length = () if measured_threads else ONE_STEP
    command = [*map(str, gptlit(*BASE, *length, "--data.corpus", text.resolve(), "--run_dir", run))]

    def fit() -> list[Spent]:
        shutil.rmtree(run, ignore_errors=True)
        started = time.perf_counter()
        process = subprocess.Popen(command, env=environment, cwd=folder, stderr=subprocess.DEVNULL)
        while not has_step(run / "metrics.csv"):
            if process.poll() is not None or time.perf_counter() - started > PATIENCE:
                process.kill()
                raise RuntimeError(f"{' '.join(command)} made no step")
            time.sleep(0.002)
        first = Spent(time.perf_counter() - started, user_seconds(process.pid))
        if measured_threads:
            process.kill()
        _, _, usage = os.wait4(process.pid, 0)
        process.returncode = 0
        rest = Spent(time.perf_counter() - started - first.wall, usage.ru_utime - first.user)
        return [first] if measured_threads else [first, rest]

    return fit


def has_step(metrics: Path) -> bool:
    """Return whether metrics.csv has a row of step 1. Step 0 is a validation of the initial weights."""
    if not metrics.is_file():
        return False
    with metrics.open(newline="", encoding="utf-8") as file:
        return any(row["step"] == "1" for row in csv.DictReader(file))


def clocks_of(tree: Path, options: argparse.Namespace, folder: Path) -> dict[str, Callable[[], list[Spent]]]:
    """Return what is measured of one build.

    Raises:
        RuntimeError: gptlit is not imported from that checkout.
    """
    folder.mkdir()
    found = run_in(tree, [sys.executable, "-c", "import gptlit; print(gptlit.__file__)"])
    if not Path(found.out.strip()).is_relative_to(tree):
        raise RuntimeError(f"gptlit is imported from {found.out.strip()}, not from {tree}")
    trained = folder / "trained"
    run_in(tree, gptlit(*BASE, *ONE_STEP, "--data.corpus", options.text.resolve(), "--run_dir", trained))
    predict = gptlit("predict", "--ckpt_path", trained, "--prompt", "\n", "--max_new_tokens", 1, *TEXT_ONLY)
    return {
        "gptlit --version": whole(*gptlit("--version"), tree=tree),
        "gptlit --help": whole(*gptlit("--help"), tree=tree),
        PREDICT: to_first_byte(*predict, tree=tree),
        FIT: to_first_step(tree, options.text, folder, options.measured_threads),
    }


def ratios(spent: Mapping[str, list[Spent]]) -> list[tuple[str, str, str]]:
    """Return rows of medians of the ratios of both times, round by round."""
    pairs = {"predict / import torch": (PREDICT, IMPORT_TORCH)}
    pairs |= {f"{name}, this / older build": (name, OLDER + name) for name in spent if OLDER + name in spent}
    rows = []
    for label, (one, other) in pairs.items():
        both = list(zip(spent[one], spent[other], strict=True))
        walls, users = (statistics.median(a[n] / max(b[n], 1e-3) for a, b in both) for n in (0, 1))
        rows.append((label, f"{walls:.2f}", f"{users:.2f}"))
    return rows


def main() -> None:
    """Print the tables."""
    made = parser(__doc__, rounds=5)
    made.add_argument("--against", type=Path, help="an older checkout")
    made.add_argument("--measured_threads", action="store_true", help="a fit as planned by base, killed after a step")
    options = made.parse_args()
    begin(options)
    with tempfile.TemporaryDirectory() as name:
        clocks: dict[str, Callable[[], list[Spent]]] = {
            "python -c pass": whole(sys.executable, "-c", "pass"),
            **{name: to_first_byte(sys.executable, "-c", f"{name}; print(0, flush=True)") for name in IMPORTS},
        }
        if options.against:
            older = clocks_of(options.against.resolve(), options, Path(name) / "older")
            clocks |= {OLDER + label: clock for label, clock in older.items()}
        clocks |= clocks_of(REPOSITORY, options, Path(name) / "this")
        found = in_turn(clocks, options.rounds)
    spent = {label: [times[0] for times in rounds] for label, rounds in found.items()}
    spent |= {
        label.replace(FIT, END): [times[1] for times in rounds]
        for label, rounds in found.items()
        if FIT in label and not options.measured_threads
    }
    rows = []
    for label, times in spent.items():
        columns = [(statistics.median(values), min(values), max(values)) for values in zip(*times, strict=True)]
        rows.append((label, *(f"{value:.2f}" for column in columns for value in column)))
    print(table(HEADER, rows))
    print()
    print(table(("median of the ratios", "wall", "user CPU"), ratios(spent)))
    finish(options, seconds=spent)


if __name__ == "__main__":
    main()
