"""The two files of a run, `best.ckpt` and `last.ckpt`: when they are written, and that they are always whole."""

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from gptlit.callbacks.curves import clock_stopped


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames, so that a file under its own name is whole at every moment."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes, flushes to the disk, renames; leaves no partial file behind when the disk is full."""
        target = Path(path)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads tensors and plain types only; nothing in the file is executed."""
        return torch.load(path, map_location=map_location or "cpu", weights_only=True)


class RunCheckpoints(Checkpoint):
    """Keeps `best.ckpt` (lowest monitored value, at the end of a validation) and `last.ckpt` (to go on from).

    `last.ckpt` is written every `every_n_steps` optimizer steps, at the end, and when a run is stopped by a signal or
    an exception, always between two steps: after an interruption in the middle of an optimizer step the weights are
    half old and half new, and the older file is the better one.

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
        self._written_step = -1
        self._started = False

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
        """Restores what `state_dict` gave."""
        self.best_score, self.best_step = state_dict["best_score"], state_dict["best_step"]
        self.validated_step = state_dict["validated_step"]

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Sets the loops to the boundary after the last whole step, whatever moment the file was written at."""
        step_boundary(checkpoint, trainer.accumulate_grad_batches)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A validation that the interruption cut off is made up for."""
        self._started = True
        self._written_step = trainer.global_step
        if trainer.global_step and self.validated_step != trainer.global_step and validation_due(trainer):
            validate_now(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Writes `last.ckpt` before the next step begins, which is after any validation of the step before."""
        step = trainer.global_step
        if step and step % self.every_n_steps == 0:
            self._write_last(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes `best.ckpt` when the monitored value is the lowest so far."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self.validated_step = trainer.global_step
        score = float(trainer.callback_metrics[self.monitor])
        if self.best_score is None or score < self.best_score:
            self.best_score, self.best_step = score, trainer.global_step
            trainer.save_checkpoint(self.best_path)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes `last.ckpt` at the end of training."""
        self._write_last(trainer)
        self._started = False

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Writes `last.ckpt` when the run is stopped between two steps."""
        if not self._started or not trainer.global_step or getattr(pl_module, "mid_step", False):
            return
        try:
            self._write_last(trainer)
        except OSError as error:
            exception.add_note(f"last.ckpt could not be written ({error}); the one from before is untouched")

    def _write_last(self, trainer: pl.Trainer) -> None:
        if self._written_step != trainer.global_step:
            with clock_stopped(trainer):
                trainer.save_checkpoint(self.last_path)
            self._written_step = trainer.global_step


class ValidateAtEnd(pl.Callback):
    """Validates at the last step too, when `val_check_interval` does not divide `max_steps`."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Asks Lightning to stop, which makes it validate first."""
        if trainer.global_step >= trainer.max_steps:
            trainer.should_stop = True


def validation_due(trainer: pl.Trainer) -> bool:
    """Whether a validation belongs to the step that the run has reached."""
    micro_batches = trainer.global_step * trainer.accumulate_grad_batches
    interval = trainer.val_check_batch
    at_end = trainer.global_step >= trainer.max_steps
    return at_end or (isinstance(interval, int) and interval > 0 and micro_batches % interval == 0)


def validate_now(trainer: pl.Trainer) -> None:
    """Runs the validation loop of a fit outside its turn, as Lightning's epoch loop does."""
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True


def step_boundary(checkpoint: dict[str, Any], accumulate: int) -> None:
    """Rewrites the progress of Lightning's loops in a checkpoint as "so many whole steps are done", in place.

    A file may have been written inside a validation, between two micro-batches or with another number of accumulation
    steps; its weights are those after the last whole optimizer step in every case.
    """
    loops = checkpoint.get("loops", {}).get("fit_loop")
    if loops is None:
        return
    done = checkpoint["global_step"] * accumulate
    progress = loops["epoch_loop.batch_progress"]
    for count in (progress["total"], progress["current"]):
        count.update(ready=done, started=done, processed=done, completed=done)
    progress["is_last_batch"] = False
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = checkpoint["global_step"]
    for key in ("epoch_loop.val_loop.batch_progress",):
        for count in (loops[key]["total"], loops[key]["current"]):
            count.update(ready=0, started=0, processed=0, completed=0)
        loops[key]["is_last_batch"] = False
    epochs = loops["epoch_progress"]
    epochs["total"].update(ready=1, started=1, processed=0, completed=0)
    epochs["current"].update(ready=1, started=1, processed=0, completed=0)
