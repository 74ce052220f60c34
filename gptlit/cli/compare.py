"""`gptlit compare`: several runs in one table and one picture."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptlit.checkpoint.files import find_resume_point, reason_for_nothing, runs_here, runs_in
from gptlit.checkpoint.validations import validations_of
from gptlit.cli.curves import add_legend, lowest, new_figure, read_curve, save
from gptlit.cli.messages import duration, say
from gptlit.cli.parser import PlainParser
from gptlit.convert.model_card import one_cell
from gptlit.errors import UserError, some_of
from gptlit.model.config import GPTConfig
from gptlit.model.gpt import meta_model

MARK = "*"  # of a run that was validated on a part
PNG = b"\x89PNG\r\n\x1a\n"
SOFTWARE = "gptlit compare"  # in a picture of this verb, which may be replaced
SHOWN = 5  # run folders in a message, at most
BEGINNING = 1024  # bytes of a PNG file that hold the name of its program


@dataclass(frozen=True)
class Run:
    """What a run folder tells about its run.

    Args:
        folder: the run folder.
        steps: optimizer steps made.
        parameters: parameters of the model, tied ones once.
        seconds: training time, without validation.
        corpus: identifies the text and where it is split; losses of two texts cannot be compared.
        train: training loss by step, nats per token.
        val: validation loss by step, nats per token.
        bpc: bits per character on the validation part, by step.
        last_step: step of the last validation; `val` lacks it if no logger was on.
        part: which part of the validation part the losses are the mean of; None for all of it.
        saved_step: step of `best.ckpt`, which is never 0; None if the checkpoint knows of no validation.
    """

    folder: Path
    steps: int
    parameters: int
    seconds: float
    corpus: tuple[Any, ...]
    train: dict[int, float]
    val: dict[int, float]
    bpc: dict[int, float]
    last_step: int = 0
    part: str | None = None
    saved_step: int | None = None

    @property
    def best_step(self) -> int:
        """Step of the lowest validation loss of a checkpoint."""
        return lowest(self.val) if self.saved_step is None else self.saved_step


def read_run(folder: Path) -> Run:
    """Read checkpoint and metrics of a run folder. Tensors of the checkpoint are mapped, not loaded.

    The best validation is that of the checkpoint, also where metrics.csv lacks it, since no logger was on.

    Raises:
        UserError: if the folder is not a run, or has no validation losses.
    """
    checkpoint = newest_checkpoint(folder)
    val = read_curve(folder, "val/loss")
    if not val:
        raise UserError(f"{folder}/metrics.csv has no val/loss: without it there is nothing to compare")
    bpc, found = read_curve(folder, "val/bpc"), validations_of(checkpoint)
    if found.best_loss is not None and found.best_step not in val:
        known = max(val.keys() & bpc.keys(), default=None)
        if known is not None and val[known]:  # the ratio belongs to the text and its tokens
            bpc[found.best_step] = found.best_loss * bpc[known] / val[known]
        val[found.best_step] = found.best_loss
    corpus = checkpoint.get("gptlit", {}).get("corpus") or {}
    return Run(
        folder=folder,
        steps=checkpoint["global_step"],
        parameters=count_parameters(checkpoint["hyper_parameters"]["gpt"]),
        seconds=checkpoint["callbacks"].get("MetricsLogger", {}).get("training_seconds", 0.0),
        corpus=(corpus.get("sha256"), corpus.get("train_characters")),
        train=read_curve(folder, "train/loss"),
        val=val,
        bpc=bpc,
        last_step=max(found.last_step, *val),
        part=found.best_part or found.last_part,
        saved_step=None if found.best_loss is None else found.best_step,
    )


def newest_checkpoint(folder: Path) -> dict[str, Any]:
    """Read the newest checkpoint of a run folder.

    Raises:
        UserError: if the folder has none, or a damaged one; it names run folders below.
    """
    if not any((folder / name).is_file() for name in ("best.ckpt", "last.ckpt")):
        runs = [str(run) for run in runs_in(folder)]
        found = f"name {some_of(runs, SHOWN)}" if runs else reason_for_nothing(folder)
        raise UserError(f"{folder} is not a run folder, it holds neither best.ckpt nor last.ckpt: {found}")
    try:
        return find_resume_point(str(folder)).checkpoint
    except UserError as error:
        error.setting = ""  # run folders are arguments here
        raise


def count_parameters(gpt: dict[str, Any]) -> int:
    """Count the parameters of a model, tied ones once; nothing is allocated."""
    return sum(parameter.numel() for parameter in meta_model(GPTConfig(**gpt)).parameters())


# ---------------------------------------------------------------- the command


def make_parser() -> PlainParser:
    """Return the parser of the verb."""
    parser = PlainParser(
        prog="gptlit compare",
        description="Compares runs: a table on stdout (best validation loss and its step, bits per character, "
        "parameters, training time) and a picture of the curves.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="Run folders, such as checkpoints/base.")
    parser.add_argument(
        "--output",
        help="The picture, a .png file (default: compare.png next to the first run). An earlier picture of compare is "
        "replaced; any other file is refused.",
    )
    return parser


def compare(verb: str, arguments: list[str]) -> int:
    """Print the table and write the picture; return the exit code."""
    options = make_parser().parse_args(arguments)
    folders = [Path(run) for run in options.runs]
    for folder in folders:
        if not os.path.isdir(folder):  # false, as of Path.is_dir not always, for a name that is too long
            raise UserError(f"{folder} is not a run folder: name folders of runs{runs_here()}")
    output = Path(options.output) if options.output else folders[0].parent / "compare.png"
    if output.suffix != ".png":
        raise UserError(f"--output {output}: the picture is a PNG file: give a name that ends in .png")
    refuse_to_overwrite(output)
    runs = [read_run(folder) for folder in folders]
    print(table_of(runs), end="")
    if len({run.corpus for run in runs}) > 1:
        say("these runs were validated on different texts: their losses cannot be compared", style="yellow")
    if note := part_note(runs):
        say(note, style="yellow")
    try:
        save(compare_figure(runs), output, software=SOFTWARE)
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror}: choose another place") from error
    say(f"picture: {output}")
    return 0


def refuse_to_overwrite(path: Path) -> None:
    """Check that a file may be written: it is new, or an earlier picture of this verb.

    Raises:
        UserError: if it is another file, or cannot be read.
    """
    try:
        if not path.exists():
            return
        if path.is_file():
            with path.open("rb") as file:
                if is_own_picture(file.read(BEGINNING)):
                    return
    except OSError as error:
        raise UserError(f"--output {path}: {error.strerror}: choose another place") from error
    raise UserError(f"--output {path}: the file exists and is not a picture of gptlit compare: choose another name")


def is_own_picture(beginning: bytes) -> bool:
    """Whether a PNG file begins as those that this verb writes."""
    return beginning.startswith(PNG) and b"tEXtSoftware\0" + SOFTWARE.encode() in beginning


def part_note(runs: Sequence[Run]) -> str | None:
    """Return a line about the runs that were validated on a part; None if there are none."""
    marked = [f"{run.folder}: {run.part}" for run in runs if run.part]
    if not marked:
        return None
    return f"{MARK} the metrics are those of a part of the validation part: {'; '.join(marked)}"


def table_of(runs: Sequence[Run]) -> str:
    """Return one row a run, aligned, as a Markdown table; runs that were validated on a part are marked."""
    rows = [("run", "steps", "best val loss", "at step", "last val loss", "bits/char", "parameters", "time")]
    for run in runs:
        best, last = run.best_step, max(run.last_step, *run.val)
        rows.append(
            (
                one_cell(f"{run.folder} {MARK}" if run.part else str(run.folder)),
                f"{run.steps:,}",
                f"{run.val[best]:.4f}",
                f"{best:,}",
                f"{run.val[last]:.4f}" if last in run.val else "",
                f"{run.bpc[best]:.4f}" if best in run.bpc else "",
                f"{run.parameters:,}",
                duration(run.seconds),
            )
        )
    return markdown(rows, texts=1)


def markdown(rows: Sequence[Sequence[str]], texts: int) -> str:
    """Return an aligned Markdown table of a header and rows; all but the first `texts` columns are numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * width if n < texts else "-" * (width - 1) + ":" for n, width in enumerate(widths)]
    lines = []
    for row in (rows[0], rule, *rows[1:]):
        cells = (
            cell.ljust(width) if n < texts else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append(f"| {' | '.join(cells)} |\n")
    return "".join(lines)


def compare_figure(runs: Sequence[Run]) -> Any:
    """Draw the validation curves of several runs in bits per character, which tokenizers do not change."""
    figure, axes = new_figure()
    lines = []
    for run in runs:
        curve = run.bpc or run.val
        steps = sorted(curve)
        best = run.best_step
        label = f"{run.folder.name}  {curve.get(best, run.val[best]):.4f} at {best:,}"
        (line,) = axes.plot(steps, [curve[step] for step in steps], marker="o", markersize=3, label=label)
        lines.append(line)
        if best in curve:
            axes.plot([best], [curve[best]], "*", color=line.get_color(), markersize=12)
    axes.set_ylabel("validation loss (bits per character)")
    add_legend(axes, lines, "run, best loss and step")
    return figure
