"""Callbacks and strategies of Lightning that cannot work in a run of gptlit, and epochs that train nothing."""

from collections.abc import Iterable

import lightning.pytorch as pl
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BasePredictionWriter,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision

from gptlit.errors import UserError
from gptlit.model.config import GPTConfig
from gptlit.optim import ScheduleConfig
from gptlit.training.lightning_internals import callbacks_of, is_one_epoch, starts_processes_by_fork

REFUSED_CALLBACKS: dict[type[pl.Callback], str] = {
    BaseFinetuning: "changes the parameter groups of the optimizer, which gptlit builds by role: train all parameters",
    BasePredictionWriter: "writes predictions, which fit does not make: use gptlit predict --output",
    BatchSizeFinder: "changes the batch size, on which batches, losses and resume depend: set data.batch_size",
    GradientAccumulationScheduler: (
        "changes the accumulation from epoch to epoch, and a run is one epoch: set trainer.accumulate_grad_batches"
    ),
    LearningRateFinder: "tries rates that the schedule overwrites at every step: set model.optimizer.lr",
    ModelPruning: "renames the weights, so that the checkpoints could not be loaded again: train a smaller model",
    StochasticWeightAveraging: (
        "averages at the end of each epoch, and a run is one epoch: set average.decay (callback AverageWeights)"
    ),
}
REFUSED_NAMES = {  # classes of packages that are not required here
    "PyTorchLightningPruningCallback": (
        "reports under the number of the epoch, so that Optuna takes the first validation only, and a run is one "
        "epoch: report under trainer.global_step, in a callback of your own"
    ),
}


def refuse_callbacks(callbacks: Iterable[pl.Callback]) -> None:
    """Refuse callbacks that would be without effect, or worse.

    Raises:
        UserError: names the callback and what to use instead.
    """
    averaging: list[str] = []
    for callback in callbacks:
        for refused, reason in REFUSED_CALLBACKS.items():
            if isinstance(callback, refused):
                raise UserError(reason, setting=type(callback).__name__)
        name = type(callback).__name__
        if name in REFUSED_NAMES:
            raise UserError(REFUSED_NAMES[name], setting=name)
        if isinstance(callback, WeightAveraging):
            averaging.append("average.decay" if name == "AverageWeights" else name)
    if len(averaging) > 1:  # each of them would save the average of the other in place of the trained weights
        raise UserError(f"is one average of the weights, and {averaging[0]} another: leave one out", averaging[-1])


def check_callbacks(trainer: pl.Trainer) -> None:
    """Refuse the callbacks of a Trainer that would be without effect, or worse.

    Raises:
        UserError: names the callback and what to use instead.
    """
    refuse_callbacks(callbacks_of(trainer))
    if not isinstance(trainer.precision_plugin, HalfPrecision | DoublePrecision):
        return
    for callback in callbacks_of(trainer):
        start = type(callback).on_validation_epoch_start
        if isinstance(callback, WeightAveraging) and start is WeightAveraging.on_validation_epoch_start:
            raise UserError(
                "exchanges the weights and their average at every validation, which rounds them if trainer.precision "
                f"is {trainer.precision}: set average.decay (callback AverageWeights), or a precision such as 32-true",
                setting=type(callback).__name__,
            )


def check_processes(trainer: pl.Trainer) -> None:
    """Refuse strategies that start processes by spawn or fork: the trained weights would stay in those processes.

    Raises:
        UserError: names `trainer.strategy`.
    """
    if starts_processes_by_fork(trainer):
        raise UserError(
            "starts its processes by spawn or fork, which gptlit does not support: choose trainer.strategy ddp",
            "trainer.strategy",
        )


def check_schedulers(trainer: pl.Trainer, schedule: ScheduleConfig) -> None:
    """Refuse an lr_scheduler of a subclass's `configure_optimizers` that contradicts the schedule or is never stepped.

    Args:
        trainer: at the start of a fit.
        schedule: settings. Next to an lr_scheduler they must be the default, or constant without a warm-up.

    Raises:
        UserError: names the class of the lr_scheduler.
    """
    unused = schedule in (ScheduleConfig(), ScheduleConfig(shape="constant"))
    for config in trainer.lr_scheduler_configs:
        name = type(config.scheduler).__name__
        if not unused:
            raise UserError(
                f"is not the default, but configure_optimizers returns the lr_scheduler {name}, which sets the rates "
                "instead: leave one of them out",
                "model.schedule",
            )
        if config.interval == "epoch" and trainer.lightning_module.automatic_optimization and is_one_epoch(trainer):
            raise UserError(
                f"returns the lr_scheduler {name} with interval epoch, and a run is one epoch, so that no rate would "
                "change: set interval to step",
                "configure_optimizers",
            )


def check_vocabulary(config: GPTConfig, size: int) -> None:
    """Refuse a `vocab_size` that is neither 0 nor the number of tokens of the tokenizer.

    Raises:
        UserError: names both.
    """
    if config.vocab_size not in (0, size):
        raise UserError(
            f"is {config.vocab_size}, but the tokenizer has {size} tokens: leave it at 0 to take the tokenizer's",
            "model.gpt.vocab_size",
        )


def check_epoch(trainer: pl.Trainer, steps_before: int) -> None:
    """Refuse an epoch in which no optimizer step was made, since training would never end.

    Args:
        trainer: at the end of an epoch.
        steps_before: optimizer steps when the epoch began.

    Raises:
        UserError: when steps are left to do and nothing asked the run to stop.
    """
    stuck = trainer.global_step == steps_before < trainer.max_steps
    if stuck and not trainer.should_stop:
        raise UserError(
            f"no optimizer step was made in an epoch, after step {steps_before:,} of {trainer.max_steps:,}: training "
            "would never end; a callback changed the accumulation, or trainer.limit_train_batches is smaller than "
            "trainer.accumulate_grad_batches"
        )
