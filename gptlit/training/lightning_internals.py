"""Every name of Lightning that gptlit uses without a promise: private ones, and public ones that have no declared type.

No other module of the package touches them. `tests/training/test_lightning_internals.py` checks each one against the
installed version of Lightning, and names that version when something has changed.
"""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer, TQDMProgressBar, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities.model_helpers import _restricted_classmethod
from torch import Tensor

from gptlit.data import TextDataModule
from gptlit.errors import UserError

restricted_classmethod = _restricted_classmethod  # refuses a call on an instance, whose result would be lost

# ---------------------------------------------------------------- attributes that Trainer does not declare


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """Return the callbacks of a Trainer, in the order in which their hooks run."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def datamodule_of(trainer: pl.Trainer) -> Any:
    """Return the DataModule of a Trainer, or None."""
    return trainer.datamodule  # type: ignore[attr-defined]


def log_interval(trainer: pl.Trainer) -> int:
    """Return `log_every_n_steps` in optimizer steps."""
    return int(trainer.log_every_n_steps)  # type: ignore[attr-defined]


def trainer_of(module: pl.LightningModule) -> pl.Trainer | None:
    """Return the Trainer that a module is attached to; `module.trainer` raises where there is none."""
    return module._trainer  # noqa: SLF001


# ---------------------------------------------------------------- loops


def steps_of_run(trainer: pl.Trainer) -> float:
    """Return the optimizer steps of a fit: `max_steps`, or those of `max_epochs` passes; inf where neither tells it.

    To be called once training has begun: before, `estimated_stepping_batches` would make the loaders, and those with a
    state would not be restored.
    """
    if trainer.max_steps != -1:
        return trainer.max_steps
    steps = trainer.estimated_stepping_batches
    return steps if steps >= 0 else float("inf")  # -1 for a loader without a length


def set_logged_step(trainer: pl.Trainer) -> None:
    """Set the step under which `self.log` of any callback reaches the loggers to the number of optimizer steps made.

    After some resumes Lightning is one step ahead.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step  # noqa: SLF001


def set_max_steps(trainer: pl.Trainer, max_steps: int) -> None:
    """Set the number of optimizer steps after which the training loop ends."""
    trainer.fit_loop.epoch_loop.max_steps = max_steps


def completes_step(trainer: pl.Trainer) -> bool:
    """Return whether an optimizer step follows the micro-batch of this moment: it does on the last of an epoch too."""
    return not trainer.fit_loop._should_accumulate()  # noqa: SLF001


def validate_now(trainer: pl.Trainer) -> None:
    """Run a validation of a fit outside of its schedule, as Lightning's epoch loop runs it."""
    metrics = trainer._logger_connector  # noqa: SLF001
    first_batch = metrics._first_loop_iter  # noqa: SLF001
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True
    metrics._first_loop_iter = first_batch  # noqa: SLF001


def validate_initial_weights(trainer: pl.Trainer) -> None:
    """Run a validation over all batches as Lightning's sanity check, which other callbacks do not take for a result."""
    bars = [callback for callback in callbacks_of(trainer) if isinstance(callback, TQDMProgressBar)]
    for bar in bars:  # it makes its bar for a sanity check in a hook of its own
        bar.val_progress_bar = bar.init_sanity_tqdm()
    steps = trainer.num_sanity_val_steps
    trainer.num_sanity_val_steps = float("inf")
    trainer.sanity_checking = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True
    trainer.num_sanity_val_steps = steps
    for bar in bars:
        bar.val_progress_bar.close()


def stop_after_this_step(trainer: pl.Trainer) -> None:
    """Make Lightning raise `SIGTERMException` once all callbacks have seen the step."""
    trainer._signal_connector.received_sigterm = True  # noqa: SLF001


def starts_processes_by_fork(trainer: pl.Trainer) -> bool:
    """Return whether the strategy starts its processes through `multiprocessing` (spawn or fork)."""
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def to_save_one_file(trainer: pl.Trainer) -> str | None:
    """Return what to change so that a checkpoint is one file; None where it is."""
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy) and strategy._save_distributed_checkpoint:  # noqa: SLF001
        return "add --trainer.strategy.init_args.save_distributed_checkpoint false"
    if isinstance(strategy, FSDPStrategy) and strategy._state_dict_type == "sharded":  # noqa: SLF001
        return "set trainer.strategy.init_args.state_dict_type to full"
    if isinstance(strategy, DeepSpeedStrategy):
        return "choose trainer.strategy ddp, or a FSDPStrategy"
    return None


# ---------------------------------------------------------------- metrics


def set_metrics(
    trainer: pl.Trainer, metrics: Mapping[str, Tensor], logged: bool = False, bar: Mapping[str, float] | None = None
) -> None:
    """Update `trainer.callback_metrics`, and on demand `logged_metrics` and `progress_bar_metrics`."""
    connector = trainer._logger_connector  # noqa: SLF001
    connector._callback_metrics.update(metrics)  # noqa: SLF001
    if logged:
        connector._logged_metrics.update(metrics)  # noqa: SLF001
    connector._progress_bar_metrics.update(bar or {})  # noqa: SLF001


def log_to_loggers(trainer: pl.Trainer, metrics: Mapping[str, Tensor], step: int) -> None:
    """Hand metrics to every logger under a step of our own, and save."""
    trainer._logger_connector.log_metrics(dict(metrics), step=step)  # noqa: SLF001


# ---------------------------------------------------------------- averaged weights


def averaged_state(trainer: pl.Trainer) -> dict[str, Tensor] | None:
    """Return the averaged weights of a running fit as a state dict; None without averaging."""
    for callback in callbacks_of(trainer):
        average = callback._average_model if isinstance(callback, WeightAveraging) else None  # noqa: SLF001
        if average is not None:
            return dict(average.module.state_dict())
    return None


def average_parameters_only(trainer: pl.Trainer) -> None:
    """Leave the buffers of the model out of averages of its weights. To be called before the callbacks are set up.

    They are constant tables, which an average changes by rounding, and which no checkpoint holds: after a resume the
    validations would differ.
    """
    for callback in callbacks_of(trainer):
        if isinstance(callback, WeightAveraging):
            callback._use_buffers = False  # noqa: SLF001


# ---------------------------------------------------------------- checkpoints


def checkpoint_contents(trainer: pl.Trainer) -> dict[str, Any]:
    """Return what `Trainer.save_checkpoint` writes, without waiting for other processes."""
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)  # noqa: SLF001


def use_trained_weights(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Replace averaged weights in a checkpoint by the trained ones, in place, if the run averages no longer.

    Raises:
        UserError: where they are out of reach, because the strategy reads its shards from the file itself.
    """
    averages = any(isinstance(callback, WeightAveraging) for callback in callbacks_of(trainer))
    if averages or "current_model_state" not in checkpoint:
        return
    if "state_dict" not in checkpoint:
        raise UserError(
            "the checkpoint holds an average of the weights (average.decay), which trainer.strategy would take for the "
            "weights: make a step without the average on one device first, or choose ddp"
        )
    checkpoint["state_dict"] = checkpoint["current_model_state"]


def forget_elapsed_time(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Remove the time that a Timer has counted from a checkpoint, in place: a time limit belongs to one start.

    With the time of the last start restored, `Trainer(max_time=…)` would make no step.
    """
    for callback in callbacks_of(trainer):
        if isinstance(callback, Timer):
            checkpoint.get("callbacks", {}).pop(callback.state_key, None)


def is_one_epoch(trainer: pl.Trainer) -> bool:
    """Return whether a fit is one epoch by its data: a TextDataModule has the batches of all steps.

    `limit_train_batches` cuts them into epochs. Lightning also sets it for `overfit_batches` and `fast_dev_run`.
    """
    limit: int | float = trainer.limit_train_batches
    limited = isinstance(limit, int) or limit < 1
    other_limit = trainer.overfit_batches or trainer.fast_dev_run  # type: ignore[attr-defined]
    return isinstance(datamodule_of(trainer), TextDataModule) and not (limited and not other_limit)


def set_progress_to_step_boundary(checkpoint: dict[str, Any], accumulate: int, one_epoch: bool) -> None:
    """Rewrite the loop progress in a checkpoint to "`global_step` whole optimizer steps are done", in place.

    A file may have been written inside a validation, between two micro-batches, or with another number of accumulation
    steps. In every case its weights are those after the last whole optimizer step.

    Args:
        checkpoint: as Lightning loads it; without loop progress it is left as it is.
        accumulate: micro-batches of an optimizer step in the run that continues.
        one_epoch: whether all steps of that run belong to its first epoch. Otherwise it continues in the epoch of the
            checkpoint, or begins the next one if that is complete.
    """
    loops = checkpoint.get("loops", {}).get("fit_loop")
    if loops is None:
        return
    steps = checkpoint["global_step"]
    training = loops["epoch_loop.batch_progress"]
    epochs, batches_before, steps_here = (0, 0, steps) if one_epoch else position_in_epochs(loops)
    begun = one_epoch or steps_here > 0
    set_counts(training["total"], batches_before + steps_here * accumulate)
    set_counts(training["current"], steps_here * accumulate)
    loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["current"].update(
        ready=steps_here, completed=steps_here
    )
    validation = loops["epoch_loop.val_loop.batch_progress"]
    for count in (validation["total"], validation["current"]):
        set_counts(count, 0)
    training["is_last_batch"] = validation["is_last_batch"] = False
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = steps
    for count in (loops["epoch_progress"]["total"], loops["epoch_progress"]["current"]):
        set_counts(count, epochs)
        count.update(ready=epochs + begun, started=epochs + begun)


def position_in_epochs(loops: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return how many epochs are complete, their micro-batches, and the optimizer steps made in the next epoch.

    Args:
        loops: progress of the fit loop in a checkpoint of a run of several epochs. The counter of processed epochs
            includes one that `max_steps` cut off; that epoch is not complete.
    """
    epoch, batch = loops["epoch_progress"]["current"], loops["epoch_loop.batch_progress"]
    here, total = batch["current"], batch["total"]
    if not here["ready"]:  # between two epochs, or before the first
        return epoch["processed"], total["ready"], 0
    epochs = epoch["ready"] - 1
    if batch["is_last_batch"] and here["processed"] == here["ready"]:
        return epochs + 1, total["ready"], 0
    steps = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["current"]["completed"]
    return epochs, total["ready"] - here["ready"], steps


def training_ended(checkpoint: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint of one epoch was written when training had ended, and no signal or error stopped it.

    Only then has Lightning counted the epoch as processed.
    """
    epoch = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
    return bool(epoch["processed"] == epoch["ready"])


def set_counts(count: dict[str, int], value: int) -> None:
    """Set all counters of one kind of progress, in place."""
    count.update(dict.fromkeys(("ready", "started", "processed", "completed"), value))


def acts_after_validations_only(trainer: pl.Trainer, callback: pl.Callback) -> bool:
    """Return whether an `EarlyStopping` or a `ModelCheckpoint` does nothing in a run without validations.

    Where `check_val_every_n_epoch` is 1, both act at the end of an epoch instead.
    """
    if trainer.check_val_every_n_epoch == 1:
        return False
    if isinstance(callback, ModelCheckpoint):
        timed = callback._every_n_train_steps >= 1 or callback._train_time_interval is not None  # noqa: SLF001
        return not (timed or callback._save_on_train_epoch_end)  # noqa: SLF001
    return isinstance(callback, EarlyStopping) and not callback._check_on_train_epoch_end  # noqa: SLF001
