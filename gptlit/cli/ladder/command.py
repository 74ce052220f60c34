"""`gptlit ladder`: the road of the lecture, one run after another, that may be stopped and goes on where it was."""

import argparse
import os
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import lightning.pytorch as pl
import yaml
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from gptlit.checkpoint.files import find_resume_point
from gptlit.checkpoint.run_dir import lock_folder
from gptlit.cli.fit.command import run_fit
from gptlit.cli.fit.plan import parse_fit
from gptlit.cli.fit.resume import is_finished
from gptlit.cli.ladder.report import Result, read_result, write_report
from gptlit.cli.ladder.rungs import Rung, all_rungs, choose
from gptlit.cli.messages import duration, say
from gptlit.cli.settings import find_config, flat, option, stored_config, without_option
from gptlit.device.memory import keep_freed_memory
from gptlit.errors import UserError
from gptlit.training.lightning_internals import log_interval

# What makes two runs comparable; where and how they ran does not.
COMPARED = ("model.", "data.", "seed_everything", "trainer.max_steps", "trainer.gradient_clip_val", "trainer.precision")


@dataclass(frozen=True)
class Run:
    """A rung with one of its seeds."""

    rung: Rung
    seed: int
    folder: Path
    arguments: tuple[str, ...]
    """Flags for `gptlit fit`, beside the file of the rung."""


class Parser(argparse.ArgumentParser):
    """Whose mistakes become one line."""

    def error(self, message: str) -> NoReturn:
        """Raises instead of exiting."""
        raise UserError(f"gptlit ladder: {message}")


def make_parser() -> Parser:
    """The options of the verb; every other flag is handed on to `gptlit fit`."""
    parser = Parser(
        prog="gptlit ladder",
        description="Trains the rungs of configs/lecture one after another, compares them in a table and a picture and "
        "goes on where it was stopped. Any other option is one of gptlit fit, and meant for every rung.",
        allow_abbrev=False,
    )
    parser.add_argument("--rungs", help="Comma-separated numbers or names (default: all that a CPU does in minutes).")
    parser.add_argument("--seeds", type=int, default=1, help="Runs of each rung, each with a seed of its own.")
    parser.add_argument("--run_dir", default="checkpoints/lecture", help="Folder of the runs and of the table.")
    return parser


def ladder(verb: str, arguments: list[str]) -> int:  # noqa: C901
    """Trains what is not trained yet, prints the table on stdout, and writes it; returns the exit code."""
    options, fit_arguments = make_parser().parse_known_args(arguments)
    keep_freed_memory()
    if options.seeds < 1:
        raise UserError(f"--seeds is {options.seeds}: it must be 1 or more")
    if option(fit_arguments, "--trainer.devices") not in (None, "1"):
        raise UserError("gptlit ladder trains on one device: drop --trainer.devices, or use gptlit fit for one rung")
    for name in ("--ckpt_path", "--trainer.fast_dev_run", "--trainer.limit_val_batches"):
        if option(fit_arguments, name) is not None:
            raise UserError(f"gptlit ladder has no {name}: use gptlit fit --config configs/lecture/3_heads.yaml")
    for name in ("--trainer.logger", "--trainer.enable_checkpointing"):
        if option(fit_arguments, name) == "false":
            raise UserError(f"{name} is false, but the table is made from what the runs leave behind: drop it")
    root = Path(options.run_dir)
    runs = plan(choose(all_rungs(), options.rungs), options.seeds, root, fit_arguments)
    states = {run.folder: state_of(run) for run in runs}  # all of them first: a mistake should not come after hours
    results: list[Result] = []
    console = Console(stderr=True, highlight=False)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}", style="dim"),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    code = 0
    try:
        with bar:
            rungs_task = bar.add_task("rungs", total=len(runs), numbers="")
            for run in runs:
                if states[run.folder] != "finished":
                    code = train_rung(run, states[run.folder], bar)
                if code:
                    break
                result = read_result(run.rung, run.seed, run.folder)
                results.append(result)
                text = write_report(root, results)
                bar.advance(rungs_task)
                console.print(f"{run.folder.name:<20} val {result.val_loss:.4f} · {duration(result.seconds)}")
    except SystemExit as leaving:  # a signal between two runs, where no training listens; or --print_config
        code = -1 if leaving.code else 0
        raise
    finally:
        if code:
            say(f"the ladder goes on with: {shlex.join(['gptlit', verb, *arguments])}")
    if code:
        return code
    print(text)
    say(f"table, numbers and picture: {root}/ladder.md, ladder.csv, ladder.png")
    say(f"curves, samples, attention: tensorboard --logdir {shlex.quote(str(root))}")
    return 0


# ---------------------------------------------------------------- which runs


def plan(rungs: Sequence[Rung], seeds: int, root: Path, fit_arguments: list[str]) -> list[Run]:
    """All rungs with the first seed, then all with the second: a ladder stopped early is a whole one."""
    first = option(fit_arguments, "--seed_everything")
    rest = without_option(fit_arguments, "--seed_everything")
    runs = []
    for number in range(seeds):
        for rung in rungs:
            settings = flat(yaml.safe_load(rung.path.read_text(encoding="utf-8")))
            try:
                seed = int(settings["seed_everything"] if first is None else first) + number
            except ValueError as error:
                raise UserError(f"--seed_everything {first}: it must be a whole number") from error
            folder = root / (rung.name if number == 0 else f"{rung.name}-seed{number + 1}")
            runs.append(Run(rung, seed, folder, ("--seed_everything", str(seed), *rest)))
    return runs


def wanted_settings(run: Run) -> dict[str, Any]:
    """The settings that a run asks for by its file, its overlays and its flags."""
    settings = flat(yaml.safe_load(run.rung.path.read_text(encoding="utf-8")))
    words = iter(run.arguments)
    for word in words:
        name, equals, rest = word.partition("=")
        value = rest if equals else next(words, None)
        if value is None:
            if name.startswith("--print_config"):
                continue
            raise UserError(f"{name} needs a value")
        if name in ("--config", "-c"):
            settings.update(flat(yaml.safe_load(Path(find_config(value)).read_text(encoding="utf-8"))))
        else:
            settings.update(flat(yaml.safe_load(value), name.removeprefix("--")))
    return settings


def same(stored: Any, wanted: Any) -> bool:
    """Whether a setting of a run is the one that is wanted, which YAML alone has read: to it, 1e-3 is a text."""
    if isinstance(stored, list) and isinstance(wanted, list):
        return len(stored) == len(wanted) and all(map(same, stored, wanted))
    try:
        return bool(stored == wanted) or float(str(stored)) == float(str(wanted))
    except ValueError:
        return str(stored) == str(wanted)


def state_of(run: Run) -> Literal["new", "begun", "finished"]:
    """How far a run is.

    Raises:
        UserError: when its folder holds a run with other settings.
    """
    if not any(run.folder.glob("*.ckpt")):
        return "new"
    start = find_resume_point(str(run.folder))
    stored, wanted = flat(stored_config(start.checkpoint)), wanted_settings(run)
    for key, value in wanted.items():
        if key.startswith(COMPARED) and key in stored and not same(stored[key], value):
            raise UserError(f"{run.folder} holds a run with {key} {stored[key]}, not {value}: choose another --run_dir")
    return "finished" if is_finished(start, int(float(wanted["trainer.max_steps"]))) else "begun"


# ---------------------------------------------------------------- one run


def train_rung(run: Run, state: str, bar: Progress) -> int:
    """Trains a run from the start, or from its newest checkpoint on; returns the exit code of `gptlit fit`."""
    if state == "begun":
        arguments = ["--ckpt_path", str(run.folder), *run.arguments]
    else:
        if run.folder.is_dir():
            clear(run.folder)
        arguments = ["--config", str(run.rung.path), "--run_dir", str(run.folder), *run.arguments]
    task = bar.add_task(run.folder.name, total=None, numbers="")
    try:
        return run_fit(parse_fit(arguments), extra_callbacks=[RungBar(bar, task)], quiet=True)
    finally:
        bar.remove_task(task)


def clear(folder: Path) -> None:
    """Removes the folder of a run that was cut off before it saved anything.

    Raises:
        UserError: when that run is just beginning, in another process.
    """
    lock = lock_folder(folder)
    if lock is None:
        raise UserError(f"{folder} is being trained by another process: stop it first, or choose another --run_dir")
    os.close(lock)
    shutil.rmtree(folder)


class RungBar(ProgressBar):
    """Moves a task of the ladder's bar."""

    def __init__(self, bar: Progress, task: TaskID) -> None:
        super().__init__()
        self.bar, self.task = bar, task

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves on when new numbers were logged."""
        if trainer.global_step % log_interval(trainer) == 0:
            loss = trainer.callback_metrics.get("val/loss")
            numbers = "" if loss is None else f"val {float(loss):.4f}"
            self.bar.update(self.task, total=trainer.max_steps, completed=trainer.global_step, numbers=numbers)
