"""Results of the ladder: read from the run folders, written as a table (Markdown, CSV) and a picture."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from gptlit.checkpoint.atomic import atomic_write_text
from gptlit.checkpoint.files import find_resume_point
from gptlit.cli.compare import count_parameters, markdown
from gptlit.cli.curves import new_figure, read_curve, save
from gptlit.cli.ladder.rungs import Rung
from gptlit.errors import UserError
from gptlit.play.page_file import MARK as PAGE_MARK

# Validation losses that the lecture and its repository report, before the later change of the initial weights.
LECTURE = {"1": "~2.5", "2": "2.4–2.5", "3": "2.28", "4": "2.24", "5": "2.08", "6": "2.06", "7": "1.48"}
SAMPLE_CHARACTERS = 200
TITLE = "# The ladder\n"
HEADER = ("rung", "seed", "change")
LOG_SCALE_FROM = 1_000  # steps: shorter runs are drawn on a linear axis, from step 0 on
NOTES = """\
val loss: nats per token after the last step, over the whole validation part. train estimate: mean over random batches
of the training part. ±: standard deviation over seeds. gain: how much lower the loss is than that of the step before,
seed by seed, since runs of one seed see the same batches; in brackets if the mean is not above its own ±. seconds:
training time without validation. lecture: the lecture's figure, where text and settings are the lecture's.
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
    """Text sampled after the last step."""
    lecture: str = ""
    """The lecture's figure; empty where it has none or the settings differ."""


def read_result(rung: Rung, seed: int, folder: Path, as_in_lecture: bool) -> Result:
    """Read a finished run folder.

    Args:
        rung: its configuration.
        seed: its seed.
        folder: the run folder.
        as_in_lecture: whether it was trained with the settings of its configuration file, unchanged.

    Raises:
        UserError: if its metrics are missing.
    """
    checkpoint = find_resume_point(str(folder)).checkpoint
    steps = checkpoint["global_step"]
    curves = {name: read_curve(folder, name) for name in ("val/loss", "val/bpc", "train/loss_estimate")}
    if steps not in curves["val/loss"]:
        raise UserError(f"{folder}/metrics.csv lacks the last step, {steps}: remove the folder and run it again")
    sample = folder / "samples" / f"step-{steps:06d}.txt"
    text = (checkpoint.get("gptlit", {}).get("corpus") or {}).get("name")
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
        lecture=LECTURE.get(rung.number, "") if as_in_lecture and text == "tinyshakespeare" else "",
    )


# ---------------------------------------------------------------- the table


def refuse_other_files(root: Path) -> None:
    """Refuse to replace files of the user by the table, its numbers and the page of all models.

    Raises:
        UserError: naming the file.
    """
    for name, beginning in (("ladder.md", TITLE), ("ladder.csv", ",".join(HEADER)), ("ladder.html", PAGE_MARK)):
        path = root / name
        if path.is_file():
            with path.open("rb") as file:
                if file.read(len(beginning)) == beginning.encode():
                    continue
        elif not path.exists():
            continue
        raise UserError(f"{path} was not written by gptlit ladder: rename it, or choose another folder", "--run_dir")


def write_report(root: Path, results: Sequence[Result]) -> str:
    """Write ladder.md, ladder.csv and ladder.png into `root`; return the table."""
    table = markdown_table(results)
    samples = "\n".join(f"## {result.rung.name}\n\n{quoted(result.sample)}\n" for result in firsts(results))
    atomic_write_text(root / "ladder.md", f"{TITLE}\n{table}\n{NOTES}\n{samples}")
    rows = io.StringIO(newline="")
    columns = ("parameters", "steps", "train_estimate", "val_loss", "bpc", "seconds", "lecture", "sample")
    writer = csv.writer(rows)
    writer.writerow((*HEADER, *columns))
    for result in results:
        values = (getattr(result, column) for column in columns)
        writer.writerow((result.rung.name, result.seed, result.rung.change, *values))
    atomic_write_text(root / "ladder.csv", rows.getvalue())
    save(curves_figure(results), root / "ladder.png")
    return table


def by_rung(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Group the runs by the number of their rung, in the order of the ladder."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.rung.number, []).append(result)
    return groups


def firsts(results: Iterable[Result]) -> list[Result]:
    """Return the first run of each rung."""
    return [runs[0] for runs in by_rung(results).values()]


def markdown_table(results: Sequence[Result]) -> str:
    """Return one row a rung, with mean and spread over several seeds; columns without values are left out."""
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
    names = [name for name in rows[0] if name == "gain" or any(row[name] for row in rows)]
    return markdown([names, *([row[name] for name in names] for row in rows)], texts=2)


def with_spread(values: Sequence[float]) -> str:
    """Return `2.0601 ± 0.0031`; the plain number where there is one."""
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def gain(before: Mapping[int, float], after: Mapping[int, float]) -> str:
    """Return how far the losses, given by seed, fell: `0.010 ± 0.001`, over the seeds that both have.

    Runs of one seed see the same batches in the same order, so they are compared with each other. In brackets if the
    mean is not above the spread.
    """
    falls = [before[seed] - after[seed] for seed in before if seed in after]
    if not falls:
        return ""
    spread = stdev(falls) if len(falls) > 1 else 0.0
    text = f"{mean(falls):.3f}" + (f" ± {spread:.3f}" if len(falls) > 1 else "")
    return text if mean(falls) > spread else f"({text})"


def quoted(text: str) -> str:
    """Indent by four, which Markdown shows as it is."""
    return "\n".join(f"    {line}" for line in text.splitlines())


# ---------------------------------------------------------------- the picture


def curves_figure(results: Sequence[Result]) -> Any:
    """Draw the validation loss over steps, a curve for each rung: the mean over seeds, and their range as a band.

    Rungs that are detours, such as 9b, are dashed.
    """
    import matplotlib

    groups = by_rung(results)
    figure, axes = new_figure((10, 6))
    last = max(run.steps for run in results)
    colours = matplotlib.colormaps["viridis"]
    for index, (number, runs) in enumerate(groups.items()):
        steps = sorted(set.intersection(*(set(dict(run.curve)) for run in runs)))
        if last >= LOG_SCALE_FROM:
            steps = [step for step in steps if step]
        losses = [[dict(run.curve)[step] for run in runs] for step in steps]
        colour = colours(0.95 * index / max(len(groups) - 1, 1))
        middle = [mean(values) for values in losses]
        label = f"{runs[0].rung.name}  {middle[-1]:.3f}"
        dashes = "-" if number.isdigit() else "--"
        axes.plot(steps, middle, dashes, color=colour, marker="o", markersize=2.5, linewidth=1.4, label=label)
        axes.fill_between(steps, list(map(min, losses)), list(map(max, losses)), color=colour, alpha=0.2, linewidth=0)
    if last >= LOG_SCALE_FROM:
        axes.set_xscale("log")
        first = min(step for run in results for step, _ in run.curve if step)
        ticks = (100, 200, 300, 500, 1_000, 2_000, 3_000, 5_000, 10_000, 20_000, 50_000)
        axes.set_xticks([tick for tick in ticks if first <= tick <= last], minor=False)
        axes.set_xticks([], minor=True)
        axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylabel("validation loss (nats per token)")
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure
