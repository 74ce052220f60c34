"""Exponential moving average of the weights, used for validation, samples and `best.ckpt`."""

import warnings
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.plugins.precision import DoublePrecision
from torch import Tensor

from gptlit.errors import UserError
from gptlit.training.strategies import holds_whole_model


class AverageWeights(WeightAveraging):
    """Lightning's weight averaging as an exponential moving average with a warm-up.

    After step t the average moves by 1 - min(decay, (1 + t) / (10 + t)) of the way to the weights (the warm-up of
    TensorFlow's ExponentialMovingAverage), so that it soon forgets the initial weights. Training itself continues with
    the trained weights. In a checkpoint the average is `state_dict` and the trained weights are `current_model_state`.
    The average has float32 numbers, or float64 ones if the weights have: rounded to bfloat16 it would not move, and a
    validation must not round it (`findings/lightning-ema-rounded-by-validation.sh`).

    Args:
        decay: share of the average that a step keeps, late in the run: 0.998 averages over some 500 steps. The
            command adds no average for 0.

    Raises:
        UserError: when `decay` is not at least 0 and less than 1.
    """

    _latest_update_step: int

    def __init__(self, decay: float = 0.0) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"is {decay}: it must be 0 (no average) or more, and less than 1", "average.decay")
        super().__init__(use_buffers=False)
        self.decay = decay
        self.trained: list[Tensor] | None = None  # the trained weights, while the module holds the average

    @property
    def swapped(self) -> bool:
        """Whether the module holds the average."""
        return self.trained is not None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Create the average.

        Raises:
            UserError: when the strategy shards the weights, since the average needs the whole model on each rank.
        """
        if not holds_whole_model(trainer):
            message = "needs the whole model on each device: leave it out, or choose trainer.strategy ddp"
            raise UserError(message, "average.decay")
        # The model is built here, before Lightning builds it in the type of its weights. Types below float32 are left
        # out: the average needs float32.
        double = isinstance(trainer.precision_plugin, DoublePrecision)
        with warnings.catch_warnings(), trainer.precision_plugin.module_init_context() if double else nullcontext():
            warnings.filterwarnings("ignore", message=".*overrides the configure_model")  # no problem without shards
            super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Move the average to the model's device; Lightning created it before the model was moved.

        Its step counter stays on the CPU, so that reading it needs no device synchronisation.
        """
        assert self._average_model is not None
        self._average_model.module.to(pl_module.device)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average once a step; torch's own update synchronises with the device three times."""
        average = self._average_model
        if average is None or trainer.global_step <= self._latest_update_step:
            return
        averaged: list[Tensor] = list(average.module.parameters())
        current = [weight.to(mean.dtype) for weight, mean in zip(pl_module.parameters(), averaged, strict=True)]
        if steps := int(average.n_averaged):
            torch._foreach_lerp_(averaged, current, 1 - min(self.decay, (1 + steps) / (10 + steps)))
        else:
            torch._foreach_copy_(averaged, current)
        average.n_averaged += 1
        self._latest_update_step = trainer.global_step

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the average into the module."""
        if self._average_model is not None:
            self.trained = [weight.detach().clone() for weight in pl_module.parameters()]
            self._take_average(pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the average in the module, since other callbacks sample from it at the end of a validation."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the trained weights back, before a checkpoint is written."""
        self._restore(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Put the trained weights back, so that a checkpoint can be written."""
        self._restore(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the trained weights: a longer run must resume from them."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the average in the module, after the last checkpoint is written."""
        self._take_average(pl_module)

    @torch.no_grad()
    def _take_average(self, module: pl.LightningModule) -> None:
        assert self._average_model is not None
        torch._foreach_copy_(list(module.parameters()), list(self._average_model.module.parameters()))

    @torch.no_grad()
    def _restore(self, module: pl.LightningModule) -> None:
        if self.trained is not None:
            torch._foreach_copy_(list(module.parameters()), self.trained)
            self.trained = None
