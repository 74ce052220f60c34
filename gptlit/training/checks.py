"""Callbacks of Lightning that cannot work in a run of gptlit, and epochs that train nothing."""

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging

from gptlit.errors import UserError
from gptlit.model.config import GPTConfig
from gptlit.training.lightning_internals import callbacks_of

REFUSED: dict[type[pl.Callback], str] = {
    GradientAccumulationScheduler: (
        "changes the accumulation from epoch to epoch, and a run is one epoch: set trainer.accumulate_grad_batches"
    ),
    StochasticWeightAveraging: (
        "averages at the end of each epoch, and a run is one epoch: set average.decay (callback AverageWeights)"
    ),
}


def check_callbacks(trainer: pl.Trainer) -> None:
    """Refuse callbacks that would be without effect, or worse.

    Raises:
        UserError: names the callback and what to use instead.
    """
    for callback in callbacks_of(trainer):
        for refused, reason in REFUSED.items():
            if isinstance(callback, refused):
                raise UserError(reason, setting=refused.__name__)


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
