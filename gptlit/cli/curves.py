"""Curves of runs: read from metrics.csv, drawn with matplotlib; `curves.png` of a run."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from gptlit.callbacks.pictures import rasterize
from gptlit.checkpoint.atomic import atomic_write
from gptlit.checkpoint.metrics_file import read_metrics
from gptlit.errors import UserError

TRAIN, VAL = "tab:blue", "tab:orange"
SMOOTHED_FROM = 100  # points of a training curve from which on its mean is plotted too
POINTS_OF_A_MEAN = 21  # centred, so that the mean neither lags nor hides a rise


def read_curve(folder: Path, name: str) -> dict[int, float]:
    """Return a column of the metrics.csv in a run folder by step; empty if there is none.

    Raises:
        UserError: if the file is not a text file, or holds something else than numbers.
    """
    path = folder / "metrics.csv"
    if not path.is_file():
        return {}
    rows = [row for row in read_metrics(path)[1] if row.get(name)]
    try:
        return {int(row["step"]): float(row[name]) for row in rows}
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: {name} is not a number at every step ({error}): repair the file") from error


def lowest(val: Mapping[int, float]) -> int:
    """Return the step of the lowest loss, the first of equals; step 0, which no checkpoint has, only if it is alone."""
    return min(val, key=lambda step: (step == 0, val[step], step))


def write_curves(run_dir: Path, best: Mapping[int, float]) -> Path | None:
    """Write `curves.png` into a run folder; return its path, or None if there are no curves or no room.

    Args:
        run_dir: the run folder.
        best: loss of `best.ckpt` by its step, which metrics.csv lacks if no logger was on; empty if there is none.
    """
    train, val = read_curve(run_dir, "train/loss"), read_curve(run_dir, "val/loss")
    if not train and not val:
        return None
    val = {**best, **val}
    with suppress(OSError):
        save(curves_figure(train, val, run_dir.name, min(best, default=None)), run_dir / "curves.png")
        return run_dir / "curves.png"
    return None


def curves_figure(train: dict[int, float], val: dict[int, float], title: str, saved_step: int | None = None) -> Any:
    """Draw the losses of one run over its steps, and mark the best validation: that of `best.ckpt`, if there is one."""
    figure, axes = new_figure()
    if train:
        draw_training(axes, train, TRAIN, "train")
    if val:
        steps = sorted(val)
        axes.plot(steps, [val[step] for step in steps], color=VAL, marker="o", markersize=3, label="val")
        best = lowest(val) if saved_step is None else saved_step
        label = f"best {val[best]:.4f}, step {best:,}"
        axes.plot([best], [val[best]], "*", color="tab:red", markersize=13, label=label)
        axes.axhline(val[best], color="tab:red", linewidth=0.6, linestyle=":")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title, parse_math=False)
    add_legend(axes, [line for line in axes.lines if not line.get_label().startswith("_")])
    return figure


def add_legend(axes: Any, lines: Sequence[Any], title: str | None = None) -> None:
    """Add a legend of these lines. Names of runs are shown as they are: matplotlib hides `_a`, and typesets `$a$`."""
    legend = axes.legend(lines, [line.get_label() for line in lines], title=title, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)


def draw_training(axes: Any, curve: dict[int, float], colour: str, label: str) -> None:
    """Draw a noisy curve: every point, and where there are many a centred mean over some of them."""
    steps = sorted(curve)
    losses = [curve[step] for step in steps]
    many = len(steps) >= SMOOTHED_FROM
    axes.plot(steps, losses, color=colour, alpha=0.35 if many else 1.0, linewidth=1, label=None if many else label)
    if many:
        halves = [min(POINTS_OF_A_MEAN // 2, n, len(losses) - 1 - n) for n in range(len(losses))]  # shorter at the ends
        windows = [losses[n - half : n + half + 1] for n, half in enumerate(halves)]
        means = [sum(window) / len(window) for window in windows]
        axes.plot(steps, means, color=colour, label=f"{label} (mean of {POINTS_OF_A_MEAN} points)")


def new_figure(inches: tuple[float, float] = (8, 5)) -> tuple[Any, Any]:
    """Return a figure and its axes, with steps from left to right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel("optimizer steps")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.25)
    return figure, axes


def save(figure: Any, path: Path, software: str | None = None) -> None:
    """Write a figure as PNG.

    Args:
        figure: to write.
        path: of the file.
        software: name of the program in the file; None for matplotlib's.
    """
    from matplotlib.image import imsave

    with atomic_write(path) as file:
        imsave(file, rasterize(figure), format="png", metadata=None if software is None else {"Software": software})
