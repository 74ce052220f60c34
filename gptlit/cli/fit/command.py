"""`gptlit fit`, `validate` and `test`: parse the arguments into a plan, then run the plan."""

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from gptlit.checkpoint.run_dir import RunDir, process_rank, started_by_first_process
from gptlit.cli.curves import write_curves
from gptlit.cli.fit.build import instantiate, make_trainer, open_run_dir, prepare
from gptlit.cli.fit.evaluation import part_note, run_evaluation
from gptlit.cli.fit.fallback import shorten_run
from gptlit.cli.fit.messages import (
    Ending,
    closing_rows,
    ending_of,
    interval_note,
    opening_rows,
    rate_note,
    resume_lines,
)
from gptlit.cli.fit.other_runs import leaks, unfinished
from gptlit.cli.fit.parts import RunParts
from gptlit.cli.fit.plan import Plan, parse_evaluation, parse_fit
from gptlit.cli.fit.precision import slow_precision
from gptlit.cli.fit.resume import readable
from gptlit.cli.fit.threads import Threads, choose_threads
from gptlit.cli.fit.trainer_settings import check_trainer_settings
from gptlit.cli.messages import say_once, table
from gptlit.cli.settings import edited_copies
from gptlit.data import TextDataModule
from gptlit.device.memory import keep_freed_memory
from gptlit.device.processes import leave_process_group, restored_environment
from gptlit.errors import UserError, counted, shell_option
from gptlit.training.module import LitGPT
from gptlit.training.strategies import holds_whole_model
from gptlit.version import __version__

SPREAD = "no samples and pictures: the weights are spread over the devices"


def train(verb: str, arguments: list[str], extra_callbacks: Sequence[pl.Callback] = ()) -> int:
    """Run `gptlit fit`, `validate` or `test`; return the exit code."""
    keep_freed_memory()
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a user's own class: --trainer.callbacks mycallback.Hello
    if verb == "fit":
        return run_fit(parse_fit(arguments), extra_callbacks)
    run_evaluation(parse_evaluation(verb, arguments), extra_callbacks)
    return 0


def run_fit(plan: Plan, extra_callbacks: Sequence[pl.Callback] = (), quiet: bool = False) -> int:
    """Train as planned; whatever ends training, say what happened and how to resume.

    Args:
        plan: from `parse_fit`.
        extra_callbacks: added after those of the run.
        quiet: leave out the progress bar, the sampled texts and the opening and closing lines.

    Returns:
        The exit code: 0, 1 when training could not continue, or 128 + n after signal n.

    Raises:
        UserError: when a setting is wrong; the run folder is removed again if it is new.
    """
    if plan.start is not None:
        for key, reason in plan.left_out.items():
            say_once(f"{key} of the checkpoint is left out: {reason}", style="yellow")
        if plan.finished:
            say_nothing_left(plan)
            return 0
    check_trainer_settings(plan.settings)
    objects = instantiate(plan)
    prepare(plan, objects.model, objects.data)
    for notice in (*objects.data.corpus.notices, *leaks(objects.model, objects.data)):
        say_once(notice, style="bold red")
    if line := shorten_run(plan, objects):
        say_once(line, style="bold red")
    folder = None if plan.settings["trainer"]["fast_dev_run"] else open_run_dir(plan, objects.data)
    wanted = plan.settings["run_dir"]
    if folder is not None and wanted and folder.path.resolve() != Path(wanted).resolve():
        say_once(f"{wanted} exists: this run goes to {folder.path}", style="yellow")
    try:
        trainer, parts = make_trainer(plan, objects, None if folder is None else folder.path, extra_callbacks, quiet)
    except BaseException:
        close(folder, keep=False)
        raise
    assert parts is not None
    threads_before = torch.get_num_threads()
    try:
        fit = Fit(plan, objects.model, objects.data, trainer, parts, folder, quiet)
        with restored_environment(lambda: fit.alone):
            exit_code = fit.run()
    finally:
        torch.set_num_threads(threads_before)
    if fit.ending is None or fit.ending.collective:
        leave_process_group()
    return exit_code


@dataclass
class Fit:
    """A training run with everything that it needs."""

    plan: Plan
    model: LitGPT
    data: TextDataModule
    trainer: pl.Trainer
    parts: RunParts
    folder: RunDir | None
    quiet: bool
    threads: Threads = field(default_factory=Threads)
    ending: Ending | None = None
    """What ended training early."""
    killed: bool = False
    """Whether the processes that this one started were killed."""

    @property
    def alone(self) -> bool:
        """Whether there is no other process of the run, or no longer."""
        return self.trainer.world_size == 1 or self.killed

    @property
    def run_dir(self) -> Path | None:
        """Folder of the run; None where nothing is kept."""
        return None if self.folder is None else self.folder.path

    def run(self) -> int:
        """Train; return the exit code."""
        path = None if self.plan.start is None else self.plan.start.path
        signals = self.parts.signals
        try:
            self.threads = choose_threads(self.plan, self.model, self.data, self.trainer)
            self.parts.threads.number = self.threads.number
            if not self.quiet:
                self.say_start()
            self.trainer.fit(self.model, datamodule=self.data, ckpt_path=path)
            self.require_progress()
            if not self.quiet:
                self.say_end()
            if signals.received is not None and not started_by_first_process():  # it came after the last step
                return 128 + int(signals.received)
            return 0
        except BaseException as error:
            before, step = self.plan.steps_before, self.trainer.global_step
            if isinstance(error, ModuleNotFoundError) and step in (0, before):
                raise UserError(f"the settings need something that is not installed: {error}") from error
            self.ending = ending_of(error, signals.received, before, step, self.run_dir)
            self.end_other_processes()
            if self.ending is None:
                if isinstance(error, SystemExit) and step in (0, before) and not self.quiet:
                    say_once("stopped before the first step: nothing was saved", style="yellow")
                if self.trainer.global_step and not isinstance(error, UserError):
                    self.say_how_to_resume()
                raise
            return self.say_ending(self.ending)
        finally:
            close(self.folder, keep=self.trainer.global_step > 0)

    def require_progress(self) -> None:
        """Refuse a run that ended without a step, although steps are left.

        Raises:
            UserError: names the likely cause.
        """
        stopped = self.parts.signals.received is not None
        if self.trainer.global_step == self.plan.steps_before < self.trainer.max_steps and not stopped:
            raise UserError("no step was made: a time limit (trainer.max_time) or a callback ended the run before it")

    def end_other_processes(self) -> None:
        """Kill the processes that this one started, unless they end by themselves: they would wait for it."""
        launcher: Any = self.trainer.strategy.launcher
        if launcher is not None and not (self.ending is not None and self.ending.collective):
            launcher.kill(signal.SIGKILL)
            self.killed = True

    def say_start(self) -> None:
        """The opening lines."""
        plan = self.plan
        rows = opening_rows(self.model, self.data, self.trainer, plan, self.threads, self.run_dir)
        if process_rank() == 0:
            table(f"gptlit {__version__}", rows)
        for warning in edited_copies(plan.config_files):
            say_once(warning, style="yellow")
        notes = [
            slow_precision(plan.settings["trainer"]),
            interval_note(self.model.optimizer_config, self.trainer.max_steps),
            self.threads.note,
            None if holds_whole_model(self.trainer) else SPREAD,
        ]
        if self.model.teachers is not None and process_rank() == 0:
            notes += unfinished(self.model.teachers)
        for line in filter(None, notes):
            say_once(line, style="yellow")
        if plan.start is not None:
            say_once(f"resuming from step {plan.start.steps:,} of {plan.start.path}")
            if self.run_dir is not None and self.run_dir.resolve() != plan.start.path.parent.resolve():
                say_once(f"{plan.start.path.parent} stays as it is: the run continues in {self.run_dir}", "yellow")
            for key, (old, new) in plan.changes.items():
                say_once(f"changed: {key} {readable(old)} -> {readable(new)}", style="yellow")
            if note := rate_note(self.model, plan.start.steps, plan.changes):
                say_once(note, style="yellow")

    def say_ending(self, ending: Ending) -> int:
        """Say why training ended early and how to resume; return the exit code."""
        say_once(f"gptlit: {ending.line}", style="yellow")
        problem = None if self.parts.checkpoints is None else self.parts.checkpoints.problem
        if problem is not None and ending.collective:
            say_once(f"gptlit: last.ckpt could not be written: {problem}", style="yellow")
        self.say_how_to_resume()
        # Where all processes end by themselves, the first one answers; Lightning would kill it for a failure elsewhere.
        return 0 if ending.collective and started_by_first_process() else ending.exit_code

    def say_how_to_resume(self) -> None:
        """The command that resumes the run."""
        if self.parts.checkpoints is not None and not self.quiet:
            slower = self.ending is not None and self.ending.slower
            losses = self.trainer.callback_metrics
            for line in resume_lines(self.run_dir, self.model, slower, self.parts.checkpoints, losses):
                say_once(line)

    def say_end(self) -> None:
        """The closing table."""
        if process_rank() != 0:
            return
        checkpoints = self.parts.checkpoints
        best = {} if checkpoints is None else checkpoints.best_by_step
        picture = None if self.run_dir is None else write_curves(self.run_dir, best)
        rows = closing_rows(self.trainer, self.parts.curves, checkpoints, self.run_dir, picture)
        done, wanted = self.trainer.global_step, self.trainer.max_steps
        if done >= wanted:
            table("done", rows)
        else:  # trainer.max_time, or a callback such as EarlyStopping
            table(
                f"stopped after step {done:,} of {wanted:,}: trainer.max_time was reached, or a callback stopped it",
                rows,
            )
        if note := part_note(self.plan, self.trainer):
            say_once(note, style="yellow")
        if done < wanted:
            self.say_how_to_resume()


def close(folder: RunDir | None, keep: bool) -> None:
    """Unlock the run folder; remove it where nothing was trained and it is new."""
    if folder is not None:
        if not keep:
            folder.give_back()
        folder.close()


def say_nothing_left(plan: Plan) -> None:
    """Say that the run of the checkpoint is finished, and how to train longer."""
    assert plan.start is not None
    steps, wanted = plan.start.steps, plan.settings["trainer"]["max_steps"]
    unused = ", ".join(f"{key} {readable(value)}" for key, value in given_for_this_start(plan).items())
    command = f"gptlit fit {shell_option('--ckpt_path', plan.start.path)}"
    say_once(
        f"this run has made {counted(steps, 'step')} and trainer.max_steps is {wanted:,}: nothing is left to do"
        + (f"; not used: {unused}" if unused else "")
    )
    say_once(f"to train longer: {command} --trainer.max_steps {2 * steps}")


def given_for_this_start(plan: Plan) -> dict[str, Any]:
    """Return the settings, apart from `trainer.max_steps`, that were given with `--ckpt_path` and differ from its."""
    changed = {key: new for key, (_, new) in plan.changes.items() if key != "trainer.max_steps"}
    of_this_start = {"run_dir": plan.settings["run_dir"], "trainer.max_time": plan.settings["trainer"]["max_time"]}
    return changed | {key: value for key, value in of_this_start.items() if value is not None}
