"""The average of the weights over the last steps, which is what gets validated, drawn from and kept as the best."""

import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from gptlit.errors import UserError
from gptlit.training.strategies import holds_whole_model


class AverageWeights(WeightAveraging):
    """Lightning's averaging with an exponential moving average whose memory grows with the run.

    After step t the average moves by 1 - min(decay, (1 + t) / (10 + t)) of the way to the weights (TensorFlow's
    ExponentialMovingAverage has that warm-up), so that the first, poor weights are soon forgotten. Training itself goes
    on with the weights as they are. In a checkpoint the average is `state_dict`, and they are `current_model_state`.

    Args:
        decay: share of the average that a step keeps, when the run is old: 0.998 remembers some 500 steps. With 0
            the command makes no average.

    Raises:
        UserError: when `decay` is not at least 0 and less than 1.
    """

    _latest_update_step: int

    def __init__(self, decay: float = 0.0) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"average.decay is {decay}: it must be 0 (no average) or more, and less than 1")

        super().__init__(use_buffers=False)
        self.decay = decay

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Makes the average, which needs the whole model in each process.

        Raises:
            UserError: when the strategy spreads the weights over processes.
        """
        if not holds_whole_model(trainer):
            raise UserError("average.decay needs the whole model on each device: leave it out, or choose ddp")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*overrides the configure_model")  # which is not a problem here
            super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Brings the average to the model's device, which Lightning made where the model was before it was moved.

        Its count of steps stays on the CPU, where reading it makes nobody wait.
        """
        assert self._average_model is not None
        self._average_model.module.to(pl_module.device)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves the average, once a step. Torch's own update counts on the device, and waits for it three times."""
        average = self._average_model
        if average is None or trainer.global_step <= self._latest_update_step:
            return
        averaged: list[Tensor] = list(average.module.parameters())
        current: list[Tensor] = list(pl_module.parameters())
        if steps := int(average.n_averaged):
            torch._foreach_lerp_(averaged, current, 1 - min(self.decay, (1 + steps) / (10 + steps)))
        else:
            torch._foreach_copy_(averaged, current)
        average.n_averaged += 1
        self._latest_update_step = trainer.global_step

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing yet: what other callbacks draw at the end of a validation is drawn from the average, too."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Puts the weights that are trained back in their place, before a checkpoint is written."""
        if self._average_model is not None:
            self._swap_models(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing yet: a finished run must go on from the weights that were trained, if it is made longer."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leaves the average in the model, once the last checkpoint is written."""
        self._copy_average_to_current(pl_module)
