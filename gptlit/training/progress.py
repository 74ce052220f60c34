"""Where a run stands, in whole optimizer steps: what Lightning's loops are told when a checkpoint is loaded."""

from typing import Any

import lightning.pytorch as pl


def step_boundary(checkpoint: dict[str, Any], accumulate: int) -> None:
    """Rewrites the progress of Lightning's loops in a checkpoint as "so many whole steps are done", in place.

    A file may have been written inside a validation, between two micro-batches or with another number of accumulation
    steps; its weights are those after the last whole optimizer step in every case.
    """
    loops = checkpoint.get("loops", {}).get("fit_loop")
    if loops is None:
        return
    steps = checkpoint["global_step"]
    micro_batches = steps * accumulate
    training = loops["epoch_loop.batch_progress"]
    for count in (training["total"], training["current"]):
        count.update(dict.fromkeys(("ready", "started", "processed", "completed"), micro_batches))
    validation = loops["epoch_loop.val_loop.batch_progress"]
    for count in (validation["total"], validation["current"]):
        count.update(dict.fromkeys(("ready", "started", "processed", "completed"), 0))
    training["is_last_batch"] = validation["is_last_batch"] = False
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = steps
    for count in (loops["epoch_progress"]["total"], loops["epoch_progress"]["current"]):
        count.update(ready=1, started=1, processed=0, completed=0)


def count_logged_steps(trainer: pl.Trainer) -> None:
    """Sets the step that `self.log` of other callbacks goes by; Lightning is one ahead after some resumes."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


def validation_due(trainer: pl.Trainer, step: int) -> bool:
    """Whether a validation belongs to the state after `step` optimizer steps."""
    if not trainer.limit_val_batches or step == 0:
        return False
    if step >= trainer.max_steps:
        return True
    interval = trainer.val_check_interval  # in micro-batches
    return isinstance(interval, int) and step * trainer.accumulate_grad_batches % interval == 0


def validate_now(trainer: pl.Trainer) -> None:
    """Runs the validation loop of a fit outside its turn, as Lightning's epoch loop does."""
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True
