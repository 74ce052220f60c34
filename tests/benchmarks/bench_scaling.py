"""How costs grow: a training step with batch, block, width and layers; reading with the size of the text.

    python tests/benchmarks/bench_scaling.py --text input.txt --png scaling.png [--threads 2] [--json FILE]

One setting of `configs/base.yaml` is changed at a time; steps run in a plain loop, not compiled. Texts are Tiny
Shakespeare repeated; "first" includes encoding, "again" uses the cached token file.
"""

import json
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from measuring import begin, finish, parser, run_process, table
from subjects import build, matmul_precision_as, plain_step, read_config, timed

AXES: Mapping[str, tuple[int, ...]] = {
    "batch (sequences)": (1, 3, 12, 48, 192),
    "block (characters)": (16, 32, 64, 128, 256, 512),
    "width (channels)": (32, 64, 128, 256, 512),
    "layers": (1, 2, 4, 8, 16),
}
SETTINGS = {"block (characters)": "block_size", "width (channels)": "n_embd", "layers": "n_layer"}
MEGABYTES = (1, 10, 100, 1000)
INK, GRID, COLORS = "#333333", "#dddddd", ("#3060a0", "#c05020", "#508040")
PREPARE = """
import json, sys, time
from gptlit import RandomChunks, TextDataModule

started = time.perf_counter()
data = TextDataModule(sys.argv[1])
data.setup()
ready = time.perf_counter() - started
chunks = RandomChunks(data.train_tokens, 64, 12, 1)
started = time.perf_counter()
for step in range(1000):
    chunks[step]
print(json.dumps([ready, (time.perf_counter() - started) / 1000]))
"""


@dataclass(frozen=True)
class Reading:
    """The cost of reading a text."""

    megabytes: int
    first: float
    """Seconds until the first batch can be taken, with encoding."""
    again: float
    batch: float
    """Seconds to take a batch of 12 × 64."""
    peak_megabytes: float
    """Peak resident memory of the first start."""


def step_seconds(axis: str, value: int, text: Path, rounds: int) -> float:
    """Return the seconds of a step of `base` with one setting changed, the fastest of the rounds."""
    config = read_config("base", {SETTINGS[axis]: value} if axis in SETTINGS else None)
    if axis not in SETTINGS:
        config["data"]["batch_size"] = value
    module, data = build(config, text)
    one = plain_step(config, module, data)
    with matmul_precision_as(module.matmul_precision):
        once = min(timed(one, "cpu") for _ in range(2))
        calls = max(1, math.ceil(0.15 / once))
        return min(timed(one, "cpu", calls) for _ in range(rounds))


def reading(megabytes: int, text: Path, folder: Path) -> Reading:
    """Encode a text of this size twice, each time in a new process; remove text and cache afterwards."""
    play = text.read_bytes()
    long = folder / f"{megabytes}.txt"
    with long.open("wb") as file:
        for _ in range(max(1, round(megabytes * 1e6 / len(play)))):
            file.write(play)
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        command = [sys.executable, "-c", PREPARE, long]
        first = run_process(command, {"XDG_CACHE_HOME": cache})
        again = run_process(command, {"XDG_CACHE_HOME": cache})
    long.unlink()
    (ready, _), (ready_again, batch) = json.loads(first.out), json.loads(again.out)
    return Reading(megabytes, ready, ready_again, batch, first.peak_bytes / 1e6)


def draw(steps: Mapping[str, Mapping[int, float]], readings: Sequence[Reading]) -> Figure:
    """Draw six panels with logarithmic axes; the dotted line is proportional growth."""
    figure = Figure(figsize=(9.6, 5.2), layout="constrained")
    panels = list(figure.subplots(2, 3).flat)
    for axes, (axis, points) in zip(panels, steps.items(), strict=False):
        curve(axes, list(points), {"a step": [1e3 * seconds for seconds in points.values()]}, axis, "ms a step")
    sizes = [r.megabytes for r in readings]
    waiting = {"first": [r.first for r in readings], "again": [r.again for r in readings]}
    curve(panels[4], sizes, waiting, "text (MB)", "s until training can begin")
    curve(panels[5], sizes, {"peak": [r.peak_megabytes for r in readings]}, "text (MB)", "peak memory (MB)")
    return figure


def curve(axes: Any, values: Sequence[float], lines: Mapping[str, Sequence[float]], x: str, y: str) -> None:
    """Draw one panel."""
    for color, (label, line) in zip(COLORS, lines.items(), strict=False):
        axes.plot(values, line, "o-", color=color, label=label, linewidth=1.6, markersize=4)
    reference = next(iter(lines.values()))
    axes.plot(values, [reference[-1] * value / values[-1] for value in values], ":", color=INK, linewidth=0.9)
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
    axes.set_xticks(values, [f"{round(value):,}" for value in values])
    axes.minorticks_off()
    axes.set_ylim(bottom=min(min(line) for line in lines.values()) / 1.6)
    axes.grid(color=GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=8)


def main() -> None:
    """Measure, print tables, draw."""
    options_of = parser(__doc__, rounds=5)
    options_of.add_argument("--png", type=Path, help="the picture to write")
    options_of.add_argument("--megabytes", type=int, nargs="*", default=MEGABYTES, help="sizes of the texts")
    options = options_of.parse_args()
    begin(options)
    steps = {
        axis: {value: step_seconds(axis, value, options.text, options.rounds) for value in values}
        for axis, values in AXES.items()
    }
    for axis, points in steps.items():
        print(table((axis, *points), [("ms a step", *(f"{1e3 * seconds:.1f}" for seconds in points.values()))]), "\n")
    with tempfile.TemporaryDirectory() as folder:
        readings = [reading(size, options.text, Path(folder)) for size in options.megabytes]
    header = ("text, MB", "first, s", "again, s", "a batch of 12 × 64, ms", "peak memory, MB")
    rows = [
        (f"{r.megabytes:,}", f"{r.first:.2f}", f"{r.again:.2f}", f"{1e3 * r.batch:.3f}", f"{r.peak_megabytes:,.0f}")
        for r in readings
    ]
    print(table(header, rows))
    finish(options, steps=steps, readings=[vars(r) for r in readings])
    if options.png:
        draw(steps, readings).savefig(options.png, dpi=110, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    main()
