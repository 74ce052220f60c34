"""Shared parts of the benchmarks: clocks, medians, tables, processes, the name of the machine."""

import argparse
import contextlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

REPOSITORY = Path(__file__).parent.parent.parent
Value = TypeVar("Value")


def in_turn(clocks: Mapping[str, Callable[[], Value]], rounds: int, warm_up: int = 1) -> dict[str, list[Value]]:
    """Call A B C A B C …, so that changes of the machine affect all alike.

    Args:
        clocks: functions that do their work once and return seconds, or several figures.
        rounds: number of values kept for each.
        warm_up: discarded rounds before them.
    """
    values: dict[str, list[Value]] = {name: [] for name in clocks}
    for number in range(warm_up + rounds):
        for name, clock in clocks.items():
            value = clock()
            if number >= warm_up:
                values[name].append(value)
    return values


def spread(values: Sequence[float], scale: float = 1.0, digits: int = 1) -> tuple[str, str, str]:
    """Return median, smallest and largest value, times `scale`, as cells of a table."""
    ordered = (statistics.median(values), min(values), max(values))
    return tuple(f"{value * scale:,.{digits}f}" for value in ordered)  # type: ignore[return-value]


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table: first column left-aligned, the others right-aligned."""
    marks = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(map(row, (header, marks, *rows)))


def row(cells: Iterable[object]) -> str:
    """Return one row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


@dataclass(frozen=True)
class Finished:
    """A finished process."""

    seconds: float
    """From start to end."""
    first_byte: float | None
    """Seconds to the first byte on stdout."""
    first_byte_user: float
    """User CPU seconds to the first byte on stdout, or to the end without one."""
    user: float
    """User CPU seconds from start to end."""
    peak_bytes: int
    """Peak resident memory."""
    out: str
    err: str


def run_process(
    command: Sequence[object],
    environment: Mapping[str, str] | None = None,
    cwd: Any = None,
    limit: float | None = None,
) -> Finished:
    """Run a command to its end, or for `limit` seconds; gptlit is imported from this checkout.

    Raises:
        RuntimeError: if it fails, with the end of its output.
    """
    paths = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    variables = {**os.environ, "PYTHONPATH": paths, **(environment or {})}
    with tempfile.TemporaryFile() as errors:
        user_before, started = user_seconds_of_children(), time.perf_counter()
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
        first_byte, first_byte_user = time.perf_counter() - started if first else None, user_seconds(process.pid)
        out = first + process.stdout.read()
        process.wait()
        seconds, user = time.perf_counter() - started, user_seconds_of_children() - user_before
        was_cut = cut.finished.is_set()
        cut.cancel()
        errors.seek(0)
        err = errors.read().decode(errors="replace")
    if process.returncode and not was_cut:
        raise RuntimeError(
            f"{' '.join(map(str, command))} failed ({process.returncode}):\n{out[-2000:].decode()}{err[-2000:]}"
        )
    first_byte_user = first_byte_user if first else user
    text = out.decode(errors="replace")
    return Finished(seconds, first_byte, first_byte_user, user, watch.peak, text, err)


def user_seconds(pid: int) -> float:
    """Return the user CPU seconds of a running process so far, in steps of 0.01, from /proc (Linux); NaN elsewhere."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return float("nan")
    return int(fields[11]) / os.sysconf("SC_CLK_TCK")


def user_seconds_of_children() -> float:
    """Return the user CPU seconds of all child processes that have ended."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime


class PeakMemory(threading.Thread):
    """Polls the peak resident memory of a process from /proc (Linux) until it ends; 0 on other systems.

    getrusage is no substitute: it counts the memory of the parent, of which the process starts as a copy.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.status, self.peak = Path(f"/proc/{pid}/status"), 0
        self.start()

    def run(self) -> None:
        """Poll until the process ends."""
        with contextlib.suppress(OSError, StopIteration):
            while True:
                lines = self.status.read_text(encoding="utf-8").splitlines()
                self.peak = int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
                time.sleep(0.01)


def gptlit(*arguments: object) -> list[object]:
    """Return the command line of `gptlit ARGUMENTS` with this Python."""
    return [sys.executable, "-m", "gptlit", *arguments]


def machine() -> str:
    """Return threads, CPU and PyTorch version: `2 threads, AMD EPYC, PyTorch 2.13.0`."""
    name = platform.processor() or platform.machine()
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        lines = listing.read_text(encoding="utf-8").splitlines()
        name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), name)
    return f"{torch.get_num_threads()} threads, {name}, PyTorch {torch.__version__.partition('+')[0]}"


def parser(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """Return a parser with the common options: --text, --threads, --rounds, --json."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--text", type=Path, required=True, help="Tiny Shakespeare, or another text")
    made.add_argument("--threads", type=int, default=2, help="threads of torch, on both sides")
    made.add_argument("--rounds", type=int, default=rounds, help="measurements of each side")
    made.add_argument("--json", type=Path, help="file for all numbers")
    return made


def begin(options: argparse.Namespace) -> None:
    """Set the threads here and for child processes, and print the machine."""
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    print(machine())


def finish(options: argparse.Namespace, **result: Any) -> None:
    """Write all numbers to the file of --json, if given."""
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), **result}, indent=1), encoding="utf-8")
