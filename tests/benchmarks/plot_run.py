"""Draw the loss curves of runs from their metrics.csv into one PNG.

    python tests/benchmarks/plot_run.py curves.png checkpoints/base checkpoints/nanogpt_cpu=nanoGPT

A label may follow "="; the default is the name of the folder.
"""

import argparse
import csv
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

INK, GRID = "#333333", "#dddddd"


def curve(run: Path, name: str) -> tuple[list[int], list[float]]:
    """Return steps and values of one column of a run's metrics.csv; empty lists if it has no such column."""
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        points = [(int(row["step"]), float(row[name])) for row in csv.DictReader(file) if row.get(name)]
    return [step for step, _ in points], [value for _, value in points]


def smooth(values: list[float], points: int = 15) -> list[float]:
    """Return the centred moving average over `points` values, fewer at the ends."""
    half = points // 2
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def draw(runs: dict[str, Path], title: str = "") -> Figure:
    """Draw training loss (thin; smoothed, or its estimates) and validation loss (thick) of each run."""
    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axes: Any = figure.subplots()
    seen: list[float] = []
    for number, (label, run) in enumerate(runs.items()):
        color = mpl.colormaps["tab10"](number)
        steps, losses = curve(run, "train/loss_estimate")
        if not steps:
            steps, losses = curve(run, "train/loss")
            losses = smooth(losses)
        axes.plot(steps, losses, color=color, linewidth=1.0, linestyle=(0, (3, 1.5)), label=f"{label}, train")
        val_steps, val_losses = curve(run, "val/loss")
        axes.plot(val_steps, val_losses, color=color, linewidth=2.0, label=f"{label}, val")
        if val_losses:
            best = min(val_losses)
            where = val_steps[val_losses.index(best)]
            axes.annotate(
                f"{best:.3f}", (where, best), (0, 6), textcoords="offset points", ha="right", color=color, fontsize=9
            )
            axes.plot([where], [best], "o", color=color, markersize=4)
        seen += losses + val_losses
    if seen:
        seen.sort()
        low, high = seen[0], seen[int(0.97 * (len(seen) - 1))]  # the first steps would fill half of the picture
        axes.set_ylim(low - 0.05 * (high - low), high + 0.15 * (high - low))
    axes.set_xlim(left=0)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title, fontsize=11, color=INK)
    axes.grid(color=GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("png", type=Path, help="the picture to write")
    parser.add_argument("runs", nargs="+", help="run folders: FOLDER or FOLDER=LABEL")
    parser.add_argument("--title", default="")
    arguments = parser.parse_args()
    runs = {}
    for given in arguments.runs:
        folder, _, label = given.partition("=")
        runs[label or Path(folder).name] = Path(folder)
    draw(runs, arguments.title).savefig(arguments.png, dpi=125, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    main()
