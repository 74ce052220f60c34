"""What the benchmarks share: clocks, medians, tables, and a word on the machine."""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).parent.parent.parent


def in_turn(clocks: Mapping[str, Callable[[], float]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Calls A B C A B C …, so that whatever the machine does meanwhile meets all alike.

    Args:
        clocks: each does its work once and returns seconds.
        rounds: how many of its values are kept.
        warm_up: rounds before them, that do not count.
    """
    values: dict[str, list[float]] = {name: [] for name in clocks}
    for number in range(warm_up + rounds):
        for name, clock in clocks.items():
            value = clock()
            if number >= warm_up:
                values[name].append(value)
    return values


def spread(values: Sequence[float], scale: float = 1.0, digits: int = 1) -> tuple[str, str, str]:
    """Median, smallest and largest, times `scale`, as cells of a table."""
    ordered = (statistics.median(values), min(values), max(values))
    return tuple(f"{value * scale:,.{digits}f}" for value in ordered)  # type: ignore[return-value]


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table, the first column to the left and the others to the right."""
    marks = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(map(row, (header, marks, *rows)))


def row(cells: Iterable[object]) -> str:
    """One row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


@dataclass(frozen=True)
class Finished:
    """A process that has come to its end."""

    seconds: float
    """From its start to its end."""
    first_byte: float | None
    """Seconds to the first byte on stdout."""
    peak_bytes: int
    """Largest resident memory."""
    out: str
    err: str


def run_process(
    command: Sequence[object],
    environment: Mapping[str, str] | None = None,
    cwd: Any = None,
    limit: float | None = None,
) -> Finished:
    """Runs a command to its end, or for `limit` seconds; ours run from this checkout.

    Raises:
        RuntimeError: with the end of what it wrote, when it fails.
    """
    paths = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    variables = {**os.environ, "PYTHONPATH": paths, **(environment or {})}
    with tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=cwd,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
        assert process.stdout is not None
        cut = threading.Timer(limit or threading.TIMEOUT_MAX, process.kill)
        cut.daemon = True
        cut.start()
        watch = PeakMemory(process.pid)
        first = process.stdout.read(1)
        first_byte = time.perf_counter() - started if first else None
        out = first + process.stdout.read()
        process.wait()
        seconds = time.perf_counter() - started
        was_cut = cut.finished.is_set()
        cut.cancel()
        errors.seek(0)
        err = errors.read().decode(errors="replace")
    if process.returncode and not was_cut:
        raise RuntimeError(
            f"{' '.join(map(str, command))} failed ({process.returncode}):\n{out[-2000:].decode()}{err[-2000:]}"
        )
    return Finished(seconds, first_byte, watch.peak, out.decode(errors="replace"), err)


class PeakMemory(threading.Thread):
    """Reads a process's largest resident memory from Linux until it ends; 0 elsewhere.

    What the system reports at the end would do, but counts the memory of the parent too, of which it began as a copy.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.status, self.peak = Path(f"/proc/{pid}/status"), 0
        self.start()

    def run(self) -> None:
        """Until the process is gone."""
        with contextlib.suppress(OSError, StopIteration):
            while True:
                lines = self.status.read_text(encoding="utf-8").splitlines()
                self.peak = int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
                time.sleep(0.01)


def gptlit(*arguments: object) -> list[object]:
    """The command line of `gptlit ARGUMENTS` with this Python."""
    return [sys.executable, "-m", "gptlit", *arguments]


def machine() -> str:
    """`2 threads, AMD EPYC, PyTorch 2.13.0`."""
    name = platform.processor() or platform.machine()
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        lines = listing.read_text(encoding="utf-8").splitlines()
        name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), name)
    return f"{torch.get_num_threads()} threads, {name}, PyTorch {torch.__version__.partition('+')[0]}"


def parser(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """The options that every benchmark has: --text, --threads, --rounds, --json."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--text", type=Path, required=True, help="Tiny Shakespeare, or another text")
    made.add_argument("--threads", type=int, default=2, help="of torch, for both sides")
    made.add_argument("--rounds", type=int, default=rounds, help="how often each thing is measured")
    made.add_argument("--json", type=Path, help="file for all numbers")
    return made


def begin(options: argparse.Namespace) -> None:
    """Sets the threads, here and for processes that will be started, and says where this runs."""
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    print(machine())


def finish(options: argparse.Namespace, **result: Any) -> None:
    """Writes the numbers, when a file was named for them."""
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), **result}, indent=1), encoding="utf-8")
