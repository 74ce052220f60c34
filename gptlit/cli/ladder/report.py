"""What the ladder found: read from the run folders, written as a table (markdown, CSV) and a picture."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from gptlit.callbacks.pictures import rasterize
from gptlit.checkpoint.atomic import atomic_write, atomic_write_text
from gptlit.checkpoint.files import find_resume_point
from gptlit.cli.ladder.rungs import Rung
from gptlit.errors import UserError
from gptlit.model.config import GPTConfig
from gptlit.model.gpt import GPT

# Validation losses that the lecture and its repository report, before its later change of the first weights.
LECTURE = {"1": "~2.5", "2": "2.4–2.5", "3": "2.28", "4": "2.24", "5": "2.08", "6": "2.06", "7": "1.48"}
SAMPLE_CHARACTERS = 200
NOTES = """\
Losses are nats per character after the last step, over the whole validation part; the estimate is a mean over random
batches of the training part. ± is the standard deviation over seeds. Gain: by how much the loss is below that of the
rung before, seed by seed, since one seed is one order of batches; in brackets when its mean is no more than its own ±.
Seconds of training, without validation.
"""


@dataclass(frozen=True)
class Result:
    """One finished run."""

    rung: Rung
    seed: int
    parameters: int
    steps: int
    train_estimate: float | None
    val_loss: float
    bpc: float
    seconds: float
    curve: tuple[tuple[int, float], ...]
    """Steps and validation losses."""
    sample: str
    """Drawn after the last step."""

    @property
    def lecture(self) -> str:
        """The figure of the lecture, where it has one."""
        return LECTURE.get(self.rung.number, "")


def read_result(rung: Rung, seed: int, folder: Path) -> Result:
    """Reads a finished run folder.

    Raises:
        UserError: when its curves are gone.
    """
    checkpoint = find_resume_point(str(folder)).checkpoint
    steps = checkpoint["global_step"]
    curves = {name: read_curve(folder, name) for name in ("val/loss", "val/bpc", "train/loss_estimate")}
    if steps not in curves["val/loss"]:
        raise UserError(f"{folder}/metrics.csv lacks the last step, {steps}: remove the folder and run it again")
    sample = folder / "samples" / f"step-{steps:06d}.txt"
    return Result(
        rung=rung,
        seed=seed,
        parameters=count_parameters(checkpoint["hyper_parameters"]["gpt"]),
        steps=steps,
        train_estimate=curves["train/loss_estimate"].get(steps),
        val_loss=curves["val/loss"][steps],
        bpc=curves["val/bpc"][steps],
        seconds=checkpoint["callbacks"]["MetricsLogger"]["training_seconds"],
        curve=tuple(sorted(curves["val/loss"].items())),
        sample=sample.read_text(encoding="utf-8")[:SAMPLE_CHARACTERS] if sample.is_file() else "",
    )


def read_curve(folder: Path, name: str) -> dict[int, float]:
    """One column of a run's metrics.csv, by step."""
    path = folder / "metrics.csv"
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


def count_parameters(gpt: dict[str, Any]) -> int:
    """Parameters of a model, each once; nothing is allocated."""
    position = "learned" if gpt["position"] == "learned" else "none"  # no other has parameters; RoPE wants real numbers
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(GPTConfig(**{**gpt, "position": position})).parameters())


# ---------------------------------------------------------------- the table


def write_report(root: Path, results: Sequence[Result]) -> str:
    """Writes ladder.md, ladder.csv and ladder.png into `root`; returns the table."""
    table = markdown_table(results)
    samples = "\n".join(f"## {result.rung.name}\n\n{quoted(result.sample)}\n" for result in firsts(results))
    atomic_write_text(root / "ladder.md", f"# The ladder\n\n{table}\n{NOTES}\n{samples}")
    rows = io.StringIO(newline="")
    columns = ("parameters", "steps", "train_estimate", "val_loss", "bpc", "seconds", "lecture", "sample")
    writer = csv.writer(rows)
    writer.writerow(("rung", "seed", "change", *columns))
    for result in results:
        values = (getattr(result, column) for column in columns)
        writer.writerow((result.rung.name, result.seed, result.rung.change, *values))
    atomic_write_text(root / "ladder.csv", rows.getvalue())
    from matplotlib.image import imsave

    with atomic_write(root / "ladder.png") as file:
        imsave(file, rasterize(curves_figure(results)), format="png")
    return table


def by_rung(results: Iterable[Result]) -> dict[str, list[Result]]:
    """The runs of each rung by its number, in the order of the road."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.rung.number, []).append(result)
    return groups


def firsts(results: Iterable[Result]) -> list[Result]:
    """Each rung's first run."""
    return [runs[0] for runs in by_rung(results).values()]


def markdown_table(results: Sequence[Result]) -> str:
    """One row a rung, with mean and spread where there are several seeds; aligned, so that it reads well as it is."""
    rows = []
    groups = by_rung(results)
    losses = {number: {run.seed: run.val_loss for run in runs} for number, runs in groups.items()}
    for number, runs in groups.items():
        rung = runs[0].rung
        estimates = [run.train_estimate for run in runs if run.train_estimate is not None]
        rows.append(
            {
                "rung": rung.name,
                "what changed": rung.change,
                "parameters": f"{runs[0].parameters:,}",
                "steps": f"{runs[0].steps:,}",
                "train estimate": f"{mean(estimates):.3f}" if estimates else "",
                "val loss": with_spread(list(losses[number].values())),
                "gain": gain(losses.get(rung.before, {}), losses[number]),
                "bits/char": f"{mean(run.bpc for run in runs):.3f}",
                "seconds": f"{mean(run.seconds for run in runs):.0f}",
                "lecture": runs[0].lecture,
            }
        )
    head = {name: name for name in rows[0]}
    width = {name: max(len(row[name]) for row in [head, *rows]) for name in head}
    texts = ("rung", "what changed")  # the other columns are numbers
    rule = {name: "-" * width[name] if name in texts else "-" * (width[name] - 1) + ":" for name in head}
    lines = []
    for row in [head, rule, *rows]:
        cells = (c.ljust(width[name]) if name in texts else c.rjust(width[name]) for name, c in row.items())
        lines.append(f"| {' | '.join(cells)} |\n")
    return "".join(lines)


def with_spread(values: Sequence[float]) -> str:
    """`2.0601 ± 0.0031`; the plain number where there is one."""
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def gain(before: Mapping[int, float], after: Mapping[int, float]) -> str:
    """How far the losses, given by seed, fell: `0.010 ± 0.001`, over the seeds that both have.

    Seed by seed: runs of one seed see the same batches in the same order, and what those do to both is no gain. In
    brackets when the mean is no more than the spread.
    """
    falls = [before[seed] - after[seed] for seed in before if seed in after]
    if not falls:
        return ""
    spread = stdev(falls) if len(falls) > 1 else 0.0
    text = f"{mean(falls):.3f}" + (f" ± {spread:.3f}" if len(falls) > 1 else "")
    return text if mean(falls) > spread else f"({text})"


def quoted(text: str) -> str:
    """Indented by four: markdown then leaves it alone."""
    return "\n".join(f"    {line}" for line in text.splitlines())


# ---------------------------------------------------------------- the picture


def curves_figure(results: Sequence[Result]) -> Any:
    """Validation loss over steps, a curve for each rung: the mean over seeds, and their range as a band.

    The rungs beside the road, such as 9b, are dashed.
    """
    import matplotlib
    from matplotlib.figure import Figure

    groups = by_rung(results)
    figure = Figure(figsize=(10, 6), dpi=100, layout="constrained")
    axes = figure.subplots()
    colours = matplotlib.colormaps["viridis"]
    for index, (number, runs) in enumerate(groups.items()):
        steps = sorted(set.intersection(*(set(dict(run.curve)) for run in runs)))
        losses = [[dict(run.curve)[step] for run in runs] for step in steps]
        colour = colours(0.95 * index / max(len(groups) - 1, 1))
        middle = [mean(values) for values in losses]
        label = f"{runs[0].rung.name}  {middle[-1]:.3f}"
        dashes = "-" if number.isdigit() else "--"
        axes.plot(steps, middle, dashes, color=colour, marker="o", markersize=2.5, linewidth=1.4, label=label)
        axes.fill_between(steps, list(map(min, losses)), list(map(max, losses)), color=colour, alpha=0.2, linewidth=0)
    first, last = min(run.curve[0][0] for run in results), max(run.steps for run in results)
    axes.set_xscale("log")
    axes.set_xticks(
        [tick for tick in (100, 200, 300, 500, 1000, 2000, 3000, 5000) if first <= tick <= last], minor=False
    )
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("validation loss, nats per character")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure
