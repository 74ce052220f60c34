"""The two files of a run, `best.ckpt` and `last.ckpt`: when they are written, and that they are always whole."""

import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint, WeightAveraging
from lightning.pytorch.utilities.exceptions import SIGTERMException

from gptlit.callbacks.metrics import clock_stopped
from gptlit.training.lightning_internals import (
    callbacks_of,
    checkpoint_contents,
    set_logged_step,
    set_max_steps,
    validate_now,
)
from gptlit.training.strategies import holds_whole_model


class RunCheckpoints(Checkpoint):
    """Keeps `best.ckpt` (lowest monitored value, at the end of a validation) and `last.ckpt` (to go on from).

    `last.ckpt` is written every `every_n_steps` optimizer steps, at the end, and when a run is stopped by a signal or
    an exception, always between two steps: after an interruption in the middle of an optimizer step the weights are
    half old and half new, and the older file is the better one. Neither is ever written with weights that are no
    numbers.

    Args:
        run_dir: folder of the run.
        every_n_steps: optimizer steps between two writes of `last.ckpt`.
        monitor: metric whose lowest value is best.
    """

    def __init__(self, run_dir: str | Path, every_n_steps: int = 100, monitor: str = "val/loss") -> None:
        self.run_dir = Path(run_dir)
        self.every_n_steps = every_n_steps
        self.monitor = monitor
        self.best_score: float | None = None
        self.best_step: int | None = None
        self.validated_step = 0
        self.problem: OSError | None = None  # why a file could not be written
        self._written: tuple[int, int] | None = None  # step and validated step in last.ckpt
        self._started = False
        self._validation_logged = False  # while other callbacks do their part at the end of a validation

    @property
    def best_path(self) -> Path:
        """Where the best checkpoint lies."""
        return self.run_dir / "best.ckpt"

    @property
    def last_path(self) -> Path:
        """Where the checkpoint to go on from lies."""
        return self.run_dir / "last.ckpt"

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know to judge the next validation."""
        return {
            "best_score": self.best_score,
            "best_step": self.best_step,
            "validated_step": self.validated_step,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` gave; in a new folder, which holds no best file yet, the search begins anew."""
        self.validated_step = state_dict["validated_step"]
        if self.best_path.is_file():
            self.best_score, self.best_step = state_dict["best_score"], state_dict["best_step"]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Agrees on the folder with the first process, which clears away what a dead process left half-written."""
        self.run_dir = Path(trainer.strategy.broadcast(str(self.run_dir)))
        if trainer.is_global_zero:
            for partial in self.run_dir.glob(".*.partial"):
                partial.unlink(missing_ok=True)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A validation that an interruption cut off is made up for."""
        self._started = True
        if self.validated_step != trainer.global_step and validation_due(trainer, trainer.global_step):
            validate_now(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Writes `last.ckpt` before the next step begins, which is after any validation of the step before."""
        step = trainer.global_step
        if step and step % self.every_n_steps == 0:
            self._write_last(trainer)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From now on, a validation that is made up for would be logged twice."""
        self._validation_logged = True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes `best.ckpt` when the monitored value is the lowest so far."""
        self._validation_logged = False
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self.validated_step = trainer.global_step
        score = float(trainer.callback_metrics[self.monitor])
        if math.isfinite(score) and (self.best_score is None or score < self.best_score):
            self.best_score, self.best_step = score, trainer.global_step
            self._save(trainer, self.best_path)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes `last.ckpt` at the end of training."""
        self._write_last(trainer)
        self._started = False

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Writes `last.ckpt` when the run is stopped between two steps.

        Not after a loss that is no number, since going on from there would meet it again; and not when writing is what
        failed.
        """
        started, self._started = self._started, False
        if not started or self.problem is not None or isinstance(exception, FloatingPointError):
            return
        if not trainer.global_step or getattr(pl_module, "mid_step", False):
            return
        if self._validation_logged or holds_averaged_weights(trainer):
            return
        agreed = isinstance(exception, SIGTERMException)  # all processes stop here, and can save together
        if agreed or holds_whole_model(trainer):  # else a shard is all there is
            with suppress(OSError):  # kept in `problem`
                self._write_last(trainer, together=agreed)

    def _write_last(self, trainer: pl.Trainer, together: bool = True) -> None:
        reached = trainer.global_step, self.validated_step
        if self._written != reached:
            self._save(trainer, self.last_path, together)
            self._written = reached

    def _save(self, trainer: pl.Trainer, path: Path, together: bool = True) -> None:
        """Writes a file; `together` is false when the other processes cannot be waited for."""
        with clock_stopped(trainer):
            finite = has_finite_weights(trainer.lightning_module)
            if not (trainer.strategy.reduce_boolean_decision(finite) if together else finite):
                raise FloatingPointError(
                    f"the weights are no numbers after step {trainer.global_step}: {path.name} was not overwritten"
                )
            try:
                for logger in trainer.loggers:  # the curves up to here, which a resumed run counts on
                    logger.save()
                if together:
                    trainer.save_checkpoint(path)
                elif trainer.is_global_zero:
                    trainer.strategy.checkpoint_io.save_checkpoint(checkpoint_contents(trainer), path)
            except OSError as error:
                self.problem = error
                raise


def validation_due(trainer: pl.Trainer, step: int) -> bool:
    """Return whether a validation belongs to the state after `step` optimizer steps."""
    if not trainer.limit_val_batches or step == 0:
        return False
    if step >= trainer.max_steps:
        return True
    interval = trainer.val_check_interval  # in micro-batches
    return isinstance(interval, int) and step * trainer.accumulate_grad_batches % interval == 0


def holds_averaged_weights(trainer: pl.Trainer) -> bool:
    """Whether a validation has put averaged weights where the trained ones belong."""
    return trainer.validating and any(isinstance(callback, WeightAveraging) for callback in callbacks_of(trainer))


def has_finite_weights(module: torch.nn.Module) -> bool:
    """Whether every weight that this process holds is a number."""
    weights = [getattr(weight, "_local_tensor", weight).detach() for weight in module.parameters()]
    return not weights or bool(torch.stack([weight.isfinite().all() for weight in weights]).all())


class ValidateAtEnd(pl.Callback):
    """Validates at the last step too, when `val_check_interval` does not divide `max_steps`.

    Must stand before the other callbacks, which may ask for `max_steps`.
    """

    def __init__(self) -> None:
        self.max_steps = -1

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remembers the length of the run."""
        self.max_steps = trainer.max_steps

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """When all steps are made, makes Lightning begin at all: the last validation or file may be missing."""
        if trainer.state.fn == "fit" and checkpoint["global_step"] == trainer.max_steps:
            set_max_steps(trainer, self.max_steps + 1)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Now it has begun."""
        set_max_steps(trainer, self.max_steps)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the step of foreign callbacks' metrics true."""
        set_logged_step(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Asks Lightning to stop, which makes it validate first."""
        if trainer.global_step >= trainer.max_steps:
            trainer.should_stop = True
