"""Writes `best.ckpt` and `last.ckpt`, and validates at the end of a run."""

import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint, WeightAveraging
from lightning.pytorch.utilities.exceptions import SIGTERMException

from gptlit.callbacks.console import console
from gptlit.callbacks.metrics import clock_stopped
from gptlit.checkpoint.validations import part_of
from gptlit.training.evaluation import batches_evaluated
from gptlit.training.lightning_internals import (
    callbacks_of,
    checkpoint_contents,
    set_logged_step,
    set_max_steps,
    validate_now,
)
from gptlit.training.strategies import holds_whole_model


class RunCheckpoints(Checkpoint):
    """Writes `best.ckpt` (lowest monitored value after a validation) and `last.ckpt` (to resume from).

    `last.ckpt` is written every `every_n_steps` optimizer steps, at the end, and when a signal or an exception stops
    the run. It always holds the state between two steps: if a step was interrupted, the older file stays. When a
    callback raises at the end of a validation, both files are written first. Files with non-finite weights are never
    written.

    Args:
        run_dir: folder of the run.
        every_n_steps: optimizer steps between two writes of `last.ckpt`.
        monitor: name of the metric; the lowest value is best, among those of the same validation batches.
    """

    def __init__(self, run_dir: str | Path, every_n_steps: int = 100, monitor: str = "val/loss") -> None:
        self.run_dir = Path(run_dir)
        self.every_n_steps = every_n_steps
        self.monitor = monitor
        self.best_score: float | None = None
        self.best_step: int | None = None
        self.validated_step = 0
        self.best_batches: list[int] | None = None  # evaluated for the best score, and how many there are
        self.validated_batches: list[int] | None = None  # the same of the last validation
        self.problem: OSError | None = None  # why a file could not be written
        self._written: tuple[int, int] | None = None  # step and validated step in last.ckpt
        self._started = False

    @property
    def best_path(self) -> Path:
        """Path of the best checkpoint."""
        return self.run_dir / "best.ckpt"

    @property
    def last_path(self) -> Path:
        """Path of the checkpoint to resume from."""
        return self.run_dir / "last.ckpt"

    @property
    def best_by_step(self) -> dict[int, float]:
        """The lowest validation loss under its step; empty before the first validation."""
        return {} if self.best_score is None else {self.best_step or 0: self.best_score}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run compares its next validation with."""
        return {
            "best_score": self.best_score,
            "best_step": self.best_step,
            "validated_step": self.validated_step,
            "best_batches": self.best_batches,
            "validated_batches": self.validated_batches,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state; in a new folder, which has no best file yet, the search for the best starts again."""
        self.validated_step = state_dict["validated_step"]
        self.validated_batches = state_dict.get("validated_batches")
        if self.best_path.is_file():
            self.best_score, self.best_step = state_dict["best_score"], state_dict["best_step"]
            self.best_batches = state_dict.get("best_batches")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Use the folder of rank 0, for reports of a profiler too; it removes partial files of a killed process."""
        folder = Path(trainer.strategy.broadcast(str(self.run_dir)))
        profiler: Any = trainer.profiler  # type: ignore[attr-defined]
        if profiler.dirpath == self.run_dir:
            profiler.dirpath = folder
        self.run_dir = folder
        if trainer.is_global_zero:
            for partial in self.run_dir.glob(".*.partial"):
                partial.unlink(missing_ok=True)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Repeat a validation that was interrupted."""
        self._started = True
        if self.validated_step != trainer.global_step and validation_due(trainer, trainer.global_step):
            validate_now(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Write `last.ckpt` before the next step, after any validation of the step before."""
        step = trainer.global_step
        if step and step % self.every_n_steps == 0:
            self._write_last(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write `best.ckpt` when the monitored value is the lowest so far."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._judge(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write `last.ckpt` at the end of the run, before an averaging callback replaces the trained weights."""
        self._write_last(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = False

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Write `last.ckpt` when the run is stopped between two steps, and `best.ckpt` if a validation just ended.

        Writes nothing after a non-finite loss, since the resumed run would reach it again, nor if writing failed.
        """
        started, self._started = self._started, False
        if not started or self.problem is not None or isinstance(exception, FloatingPointError):
            return
        validated = getattr(pl_module, "validated_step", None) == trainer.global_step
        if not trainer.global_step or getattr(pl_module, "mid_step", False):
            return
        if any(holds_average(callback, trainer.validating and not validated) for callback in callbacks_of(trainer)):
            return
        agreed = isinstance(exception, SIGTERMException)  # all ranks stop here and can save together
        if not agreed and not holds_whole_model(trainer):
            return
        with suppress(OSError):  # kept in `problem`
            if validated and self.validated_step != trainer.global_step:
                self._judge(trainer, collective=agreed)
            self._write_last(trainer, collective=agreed)

    def _judge(self, trainer: pl.Trainer, collective: bool = True) -> None:
        """Write `best.ckpt` if the last validation is the best so far."""
        self.validated_step = trainer.global_step
        batches = batches_evaluated(trainer)
        self.validated_batches = None if batches is None else list(batches)
        if self.best_score is not None and (line := another_part(self.best_batches, self.validated_batches)):
            if trainer.is_global_zero:
                console().print(line, style="yellow")
            self.best_score = self.best_step = self.best_batches = None
        score = float(trainer.callback_metrics[self.monitor])
        if math.isfinite(score) and (self.best_score is None or score < self.best_score):
            self.best_score, self.best_step = score, trainer.global_step
            self.best_batches = self.validated_batches
            self._save(trainer, self.best_path, collective)

    def _write_last(self, trainer: pl.Trainer, collective: bool = True) -> None:
        reached = trainer.global_step, self.validated_step
        if self._written != reached:
            self._save(trainer, self.last_path, collective)
            self._written = reached

    def _save(self, trainer: pl.Trainer, path: Path, collective: bool = True) -> None:
        """Write a file; `collective` is false when the other ranks cannot take part."""
        with clock_stopped(trainer):
            finite = has_finite_weights(trainer.lightning_module)
            if not (trainer.strategy.reduce_boolean_decision(finite) if collective else finite):
                raise FloatingPointError(
                    f"the weights are not finite after step {trainer.global_step}: {path.name} was not overwritten"
                )
            try:
                for logger in trainer.loggers:  # the metrics up to here, which a resumed run relies on
                    logger.save()
                if collective:
                    trainer.save_checkpoint(path)
                elif trainer.is_global_zero:
                    trainer.strategy.checkpoint_io.save_checkpoint(checkpoint_contents(trainer), path)
            except OSError as error:
                self.problem = error
                raise


def another_part(before: list[int] | None, now: list[int] | None) -> str | None:
    """Return why `best.ckpt` is chosen again; None if two losses are those of the same batches.

    Args:
        before: evaluated batches and all batches of the best loss; None if unknown.
        now: the same of the new one.
    """
    if before is None or now is None or before == now:
        return None
    was, is_now = part_of(before), part_of(now)
    if was is is_now is None:
        return None
    return (
        f"val/loss is now that of {is_now or 'all batches'} of the validation part, before of {was or 'all batches'}: "
        "best.ckpt is chosen again"
    )


def validation_due(trainer: pl.Trainer, step: int) -> bool:
    """Return whether a validation belongs to the state after `step` optimizer steps."""
    if not trainer.limit_val_batches or step == 0:
        return False
    if step >= trainer.max_steps:
        return True
    interval = trainer.val_check_interval  # in micro-batches
    return isinstance(interval, int) and step * trainer.accumulate_grad_batches % interval == 0


def holds_average(callback: pl.Callback, in_validation: bool) -> bool:
    """Return whether a callback has put averaged weights into the module.

    Lightning's own averaging has no flag for it; it swaps from the start to the end of a validation epoch.
    """
    swapped = getattr(callback, "swapped", in_validation)
    return isinstance(callback, WeightAveraging) and bool(swapped)


def has_finite_weights(module: torch.nn.Module) -> bool:
    """Return whether all weights that this process holds are finite."""
    weights = [getattr(weight, "_local_tensor", weight).detach() for weight in module.parameters()]
    return not weights or bool(torch.stack([weight.isfinite().all() for weight in weights]).all())


class ValidateAtEnd(pl.Callback):
    """Validates after the last step too, when `val_check_interval` does not divide `max_steps`.

    Must be the first callback, since others may read `max_steps`.
    """

    def __init__(self) -> None:
        self.max_steps = -1

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.max_steps = trainer.max_steps

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let a run start after its last step: its last validation or checkpoint may be missing."""
        if trainer.state.fn == "fit" and checkpoint["global_step"] == trainer.max_steps:
            set_max_steps(trainer, self.max_steps + 1)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        set_max_steps(trainer, self.max_steps)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Correct the step of metrics that other callbacks log."""
        set_logged_step(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ask Lightning to stop, which makes it validate first."""
        if trainer.global_step >= trainer.max_steps:
            trainer.should_stop = True
