"""Callbacks and loggers of a training run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar

from gptlit.callbacks.averaging import AverageWeights
from gptlit.callbacks.bar import RunBar
from gptlit.callbacks.checkpoints import RunCheckpoints, ValidateAtEnd
from gptlit.callbacks.metrics import MetricsFile, MetricsLogger
from gptlit.callbacks.pictures import Pictures
from gptlit.callbacks.samples import SampleText
from gptlit.callbacks.signals import StopBetweenSteps
from gptlit.callbacks.slowdown import SlowdownNotice
from gptlit.callbacks.tensorboard import EventFiles, TensorBoardPages
from gptlit.callbacks.threads import UseThreads
from gptlit.checkpoint.atomic import atomic_write_text


class SaveConfig(pl.Callback):
    """Writes `config.yaml`, the settings of the run, into the run folder when training starts."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            atomic_write_text(self.run_dir / "config.yaml", pl_module.run_config)


@dataclass(frozen=True)
class RunParts:
    """Callbacks and loggers of a run. The callbacks that the command reads results from are also fields."""

    curves: MetricsLogger
    signals: StopBetweenSteps
    threads: UseThreads
    checkpoints: RunCheckpoints | None
    callbacks: list[pl.Callback]
    logger: Any
    """Value of the Trainer's `logger`."""

    def settings(self) -> dict[str, Any]:
        """Return them as arguments of the Trainer."""
        return {
            "callbacks": self.callbacks,
            "logger": self.logger,
            "enable_checkpointing": self.checkpoints is not None,
        }


def run_parts(
    trainer: Mapping[str, Any], options: Any, run_dir: Path | None, steps_done: int | None, quiet: bool = False
) -> RunParts:
    """Create callbacks and loggers; the callbacks in the order in which Lightning must call them.

    Args:
        trainer: the user's settings of the Trainer; the user's callbacks come last.
        options: options of the command other than those of model, data and Trainer.
        run_dir: folder of the run; None writes no files.
        steps_done: optimizer steps of the checkpoint that the run resumes from.
        quiet: no progress bar and no sampled text on the terminal.
    """
    curves, signals, threads = MetricsLogger(), StopBetweenSteps(), UseThreads(options["threads"])
    checkpoints: RunCheckpoints | None = None
    callbacks: list[pl.Callback] = [threads, ValidateAtEnd(), curves, signals, TensorBoardPages()]
    logger: Any = False
    own_bar = any(isinstance(callback, ProgressBar) for callback in as_list(trainer["callbacks"]))
    if trainer["enable_progress_bar"] is not False and not quiet and not own_bar:
        callbacks.append(RunBar())
    if run_dir is not None:
        pictures = Pictures(**vars(options["pictures"]))
        callbacks += [SaveConfig(run_dir), sample_text(options["sample_text"], run_dir, quiet), pictures]
        if trainer["enable_checkpointing"] is not False:
            checkpoints = RunCheckpoints(run_dir, options["save_every_n_steps"])
            callbacks.append(checkpoints)
            if not quiet:
                callbacks.append(SlowdownNotice(curves, run_dir))
        logger = trainer["logger"]
        if logger in (None, True):  # TensorBoard and CSV, in the run folder itself
            logger = [EventFiles(run_dir, steps_done), MetricsFile(run_dir, steps_done)]
    if options["average"]["decay"]:  # after those that use the average; Lightning calls checkpoint callbacks last
        callbacks.append(AverageWeights(options["average"]["decay"]))
    return RunParts(curves, signals, threads, checkpoints, [*callbacks, *as_list(trainer["callbacks"])], logger)


def sample_text(options: Any, run_dir: Path, quiet: bool) -> SampleText:
    settings = {**vars(options), "run_dir": run_dir} | ({"show": 0} if quiet else {})
    return SampleText(**settings)


def as_list(value: Any) -> list[Any]:
    """Return a list of the values; empty for None."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
