"""What a training run consists of beside model and data: its callbacks and its loggers."""

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
from gptlit.callbacks.tensorboard import EventFiles, TensorBoardPages
from gptlit.checkpoint.atomic import atomic_write_text


class SaveConfig(pl.Callback):
    """Writes config.yaml into the run folder when training starts; YAML of all settings of the run."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            atomic_write_text(self.run_dir / "config.yaml", pl_module.run_config)


@dataclass(frozen=True)
class RunParts:
    """The callbacks of a run, those that the command asks for numbers by name, and its loggers."""

    curves: MetricsLogger
    signals: StopBetweenSteps
    checkpoints: RunCheckpoints | None
    callbacks: list[pl.Callback]
    logger: Any
    """As Trainer takes it."""

    def settings(self) -> dict[str, Any]:
        """What the Trainer must be told of them."""
        return {
            "callbacks": self.callbacks,
            "logger": self.logger,
            "enable_checkpointing": self.checkpoints is not None,
        }


def run_parts(
    trainer: Mapping[str, Any], options: Any, run_dir: Path | None, steps_done: int | None, quiet: bool = False
) -> RunParts:
    """The parts of a run, in the order in which they must act.

    Args:
        trainer: the user's settings of the Trainer; their callbacks come last.
        options: of the command, outside of model, data and Trainer.
        run_dir: folder of the run; None keeps nothing.
        steps_done: optimizer steps of the checkpoint that the run resumes from.
        quiet: without a progress bar, and without sampled texts on the terminal.
    """
    curves, signals = MetricsLogger(), StopBetweenSteps()
    checkpoints: RunCheckpoints | None = None
    callbacks: list[pl.Callback] = [ValidateAtEnd(), curves, signals, TensorBoardPages()]
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
        logger = trainer["logger"]
        if logger in (None, True):  # TensorBoard and CSV, straight into the run folder
            logger = [EventFiles(run_dir, steps_done), MetricsFile(run_dir, steps_done)]
    if options["average"]["decay"]:  # behind those that draw from the average; checkpoints Lightning puts behind all
        callbacks.append(AverageWeights(options["average"]["decay"]))
    return RunParts(curves, signals, checkpoints, [*callbacks, *as_list(trainer["callbacks"])], logger)


def sample_text(options: Any, run_dir: Path, quiet: bool) -> SampleText:
    settings = {**vars(options), "run_dir": run_dir} | ({"show": 0} if quiet else {})
    return SampleText(**settings)


def as_list(value: Any) -> list[Any]:
    """None as nothing, one thing as a list of it."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
