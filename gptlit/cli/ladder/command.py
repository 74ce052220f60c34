"""`gptlit ladder`: trains the configurations of the lecture one after another, and resumes where it was stopped."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from gptlit.callbacks.console import console
from gptlit.cli.fit.command import run_fit
from gptlit.cli.fit.parser import make_parser as make_fit_parser
from gptlit.cli.fit.plan import names_in_file, names_in_flags, parse_fit, read_config_options
from gptlit.cli.fit.unused import unused
from gptlit.cli.ladder.report import read_result, refuse_other_files, write_report
from gptlit.cli.ladder.rungs import Rung, all_rungs, choose
from gptlit.cli.ladder.states import COMPARED, Run, check_text, clear, same, state_of
from gptlit.cli.messages import duration, say
from gptlit.cli.parser import PlainParser, option_names
from gptlit.cli.settings import flat, leaves_of, option, without_option
from gptlit.device.memory import keep_freed_memory
from gptlit.errors import UserError, require, shell_option
from gptlit.play import read_runs, write_page
from gptlit.play.pack import check_size
from gptlit.training.metrics import at_log_interval

ONE_RUN = "use gptlit fit --config lecture/3_heads"


def make_parser() -> PlainParser:
    """Return the parser of the verb; all other flags are passed to `gptlit fit`."""
    parser = PlainParser(
        prog="gptlit ladder",
        description="Trains the configurations of configs/lecture one after another, and compares them in a table and "
        "a picture. Started again, it resumes where it was stopped. All other options are those of gptlit fit, for "
        "every configuration.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--rungs", help="Configurations to train, by number or name: 1,2,3_heads (default: all but 7_scaled)."
    )
    parser.add_argument("--seeds", type=int, default=1, help="Runs of each configuration, each with its own seed.")
    parser.add_argument("--run_dir", default="checkpoints/lecture", help="Folder of the runs and of the table.")
    return parser


def ladder(verb: str, arguments: list[str]) -> int:
    """Train what is not trained yet, print the table on stdout and write it; return the exit code."""
    options, fit_arguments = make_parser().parse_known_args(arguments)
    keep_freed_memory()
    check_options(options.seeds, fit_arguments)
    root = Path(options.run_dir)
    overrides = overrides_of(fit_arguments, all_rungs()[0].path)
    check_overrides(overrides)
    refuse_other_files(root)
    runs = plan(choose(all_rungs(overrides), options.rungs), options.seeds, root, fit_arguments, overrides)
    refuse_unused(runs, fit_arguments)
    states = {run.folder: state_of(run) for run in runs}  # all first: an error should not come after hours of training
    code, results = 0, []
    bar = make_bar()
    try:
        with bar:
            task = bar.add_task("ladder", total=len(runs), numbers="")
            for run in runs:
                if states[run.folder] != "finished":
                    code = train_rung(run, states[run.folder], bar)
                if code:
                    break
                check_text(runs[0].folder, run.folder)
                results.append(read_result(run.rung, run.seed, run.folder, run.as_in_lecture))
                text = write_report(root, results)
                bar.advance(task)
                say(f"{run.folder.name:<20} val {results[-1].val_loss:.4f} · {duration(results[-1].seconds)}")
    except SystemExit as leaving:  # a signal between two runs; or --print_config
        code = -1 if leaving.code else 0
        raise
    finally:
        if code:
            say(f"resume the ladder with: {shlex.join(['gptlit', verb, *arguments])}")
    if code:
        return code
    print(text)
    say(f"table, numbers and picture: {root}/ladder.md, ladder.csv, ladder.png")
    write_models_page(root, runs)
    say(f"curves, samples, attention: tensorboard {shell_option('--logdir', root)}")
    return 0


def check_options(seeds: int, fit_arguments: list[str]) -> None:
    """Refuse flags that the ladder cannot take.

    Raises:
        UserError: naming the option.
    """
    require(seeds >= 1, "--seeds", seeds, "1 or more")
    if option(fit_arguments, "--ckpt_path") is not None:
        raise UserError(f"gptlit ladder has no --ckpt_path: {ONE_RUN}")
    for word in fit_arguments:
        name, _, _ = word.partition("=")
        if name.startswith("--") and name.endswith("+"):
            raise UserError(
                f"gptlit ladder has no {name}=, which a resumed run would append again: give the whole list"
            )


def check_overrides(overrides: Mapping[str, Any]) -> None:
    """Refuse settings, from flags or files, that the ladder cannot obey.

    Raises:
        UserError: naming the setting.
    """
    devices = overrides.get("trainer.devices", 1)
    if str(devices) != "1":
        raise UserError(
            f"is {devices}, but gptlit ladder trains on one device: drop it, or use gptlit fit", "--trainer.devices"
        )
    for name in ("trainer.fast_dev_run", "trainer.limit_val_batches"):
        if name in overrides:
            raise UserError(f"gptlit ladder has no --{name}: {ONE_RUN}")
    for name in ("trainer.logger", "trainer.enable_checkpointing"):
        if overrides.get(name) is False:
            raise UserError(f"--{name} is false, but the table is made from what the runs write: drop it")
    if overrides.get("model.init_from") is not None:
        raise UserError("would give every configuration the same model: use gptlit fit", "model.init_from")


def refuse_unused(runs: Sequence[Run], fit_arguments: Sequence[str]) -> None:
    """Refuse flags that change nothing in any of the runs.

    Raises:
        UserError: for the first one.
    """
    flags, parser = names_in_flags(fit_arguments), make_fit_parser("fit")
    defaults = flat(parser.get_defaults().as_dict(), stop_at=leaves_of(option_names(parser)))
    found = [list(unused(flags, {**defaults, **run.wanted})) for run in runs]
    for error in found[0]:
        if all(error.setting in {other.setting for other in errors} for errors in found):
            raise error


def make_bar() -> Progress:
    """Return the bar of the ladder, on a terminal only."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}", style="dim"),
        TimeElapsedColumn(),
        console=console(),
        disable=not console().is_terminal,
        transient=True,
    )


def write_models_page(root: Path, runs: Sequence[Run]) -> None:
    """Write ladder.html, the page of `gptlit play` with one model of each rung, that of its first seed.

    Models that are too large for a page are left out, with a line that names them.
    """
    first_seeds = [run for run in runs if run.folder.name == run.rung.name]
    models = {}
    for name, model in read_runs([run.folder for run in first_seeds]).items():
        try:
            check_size(sum(weight.numel() for weight in model.network.parameters()), "float32")
        except UserError as error:
            say(f"{name} is left out of ladder.html: {error}")
        else:
            models[name] = model
    if models:
        write_page(root / "ladder.html", models)
        say(f"all models side by side: {root}/ladder.html")


# ---------------------------------------------------------------- which runs


def plan(
    rungs: Sequence[Rung], seeds: int, root: Path, fit_arguments: list[str], overrides: Mapping[str, Any]
) -> list[Run]:
    """Return all rungs with the first seed, then all with the second, so that a table can be made early."""
    rest = without_option(fit_arguments, "--seed_everything")
    runs = []
    for number in range(seeds):
        for rung in rungs:
            settings = flat(yaml.safe_load(rung.path.read_text(encoding="utf-8")))
            seed = overrides.get("seed_everything", settings["seed_everything"]) + number
            folder = root / (rung.name if number == 0 else f"{rung.name}-seed{number + 1}")
            runs.append(
                Run(
                    rung=rung,
                    seed=seed,
                    folder=folder,
                    arguments=("--seed_everything", str(seed), *rest, *more_validations(settings, overrides)),
                    wanted=settings | dict(overrides) | {"seed_everything": seed},
                    as_in_lecture=all(
                        same(settings.get(key), value)
                        for key, value in overrides.items()
                        if key.startswith(COMPARED) and key != "seed_everything"
                    ),
                )
            )
    return runs


def more_validations(settings: Mapping[str, Any], overrides: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the flag that lets a shortened run validate ten times, so that there is a curve to draw; or nothing."""
    interval = "trainer.val_check_interval"
    if "trainer.max_steps" not in overrides or interval in overrides:
        return ()
    often = max(1, overrides["trainer.max_steps"] // 10)
    return () if settings.get(interval, often) <= 2 * often else (f"--{interval}={often}",)


def overrides_of(arguments: Sequence[str], rung: Path) -> dict[str, Any]:
    """Return the settings that flags and further files give for every rung, by their full names, as fit reads them.

    Args:
        arguments: flags for `gptlit fit`.
        rung: file of one rung.

    Raises:
        UserError: as `gptlit fit`.
    """
    flags, files = read_config_options("fit", arguments)
    given = names_in_flags(flags).union(*map(names_in_file, files))
    planned = parse_fit(["--config", str(rung), *arguments], allow_unused=True)
    settings = flat(planned.settings, stop_at=leaves_of(option_names(make_fit_parser("fit"))))
    if planned.precision_chosen:
        settings["trainer.precision"] = "auto"
    return {
        name: value
        for name, value in settings.items()
        if name in given or any(part.startswith(f"{name}.") for part in given)
    }


# ---------------------------------------------------------------- one run


def train_rung(run: Run, state: str, bar: Progress) -> int:
    """Train a run from the start or from its newest checkpoint; return the exit code of `gptlit fit`."""
    if state == "begun":
        arguments = [f"--ckpt_path={run.folder}", *run.arguments]
    else:
        if run.folder.is_dir():
            clear(run.folder)
        arguments = ["--config", str(run.rung.path), f"--run_dir={run.folder}", *run.arguments]
    task = bar.add_task(run.folder.name, total=None, numbers="")
    try:
        return run_fit(parse_fit(arguments, allow_unused=True), extra_callbacks=[RungBar(bar, task)], quiet=True)
    finally:
        bar.remove_task(task)


class RungBar(ProgressBar):
    """Updates a task of the ladder's bar."""

    def __init__(self, bar: Progress, task: TaskID) -> None:
        super().__init__()
        self.bar, self.task = bar, task

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if at_log_interval(trainer, trainer.global_step):
            loss = trainer.callback_metrics.get("val/loss")
            numbers = "" if loss is None else f"val {float(loss):.4f}"
            self.bar.update(self.task, total=trainer.max_steps, completed=trainer.global_step, numbers=numbers)
