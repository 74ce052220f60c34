"""Curves: every number goes to the loggers through one function, under the number of optimizer steps done."""

import time
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl


def log_metrics(trainer: pl.Trainer, metrics: Mapping[str, float]) -> None:
    """Hands numbers to every logger, at the true step."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=trainer.global_step)


class Curves(pl.Callback):
    """`train/loss`, `train/grad_norm`, `lr/…`, `perf/…` every `log_every_n_steps` steps, `val/…` at each validation.

    Speed counts training alone: the clock stands still while the run validates, draws samples or writes files.
    """

    def __init__(self) -> None:
        self.latest: dict[str, float] = {}
        self.training_seconds = 0.0
        self.steps_timed = 0
        self._since: float | None = None
        self._window = (0, 0.0)  # steps and seconds at the last log

    def state_dict(self) -> dict[str, Any]:
        """Training time so far, for the closing table of a resumed run."""
        return {"training_seconds": self.training_seconds, "steps_timed": self.steps_timed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self.training_seconds, self.steps_timed = state_dict["training_seconds"], state_dict["steps_timed"]
        self._window = (self.steps_timed, self.training_seconds)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Starts the clock."""
        if self._since is None:
            self._since = time.perf_counter()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops the clock."""
        self._stop()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops the clock."""
        self._stop()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs when its turn has come; reads from the device only then."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self.steps_timed += 1
        step = trainer.global_step
        if step % trainer.log_every_n_steps and step < trainer.max_steps:
            return
        loss = trainer.strategy.reduce(pl_module.train_loss, reduce_op="mean").item()
        now = time.perf_counter()
        seconds = self.training_seconds + (now - (self._since if self._since is not None else now))
        steps, before = self._window
        self._window = (self.steps_timed, seconds)
        steps_per_second = (self.steps_timed - steps) / max(seconds - before, 1e-9)
        datamodule = trainer.datamodule
        tokens = datamodule.batch_size * datamodule.block_size
        self.latest.update(
            {
                "train/loss": loss,
                "perf/step_milliseconds": 1e3 / steps_per_second,
                "perf/characters_per_second": tokens * steps_per_second * datamodule.chars_per_train_token,
            }
        )
        if pl_module.grad_norm is not None:
            self.latest["train/grad_norm"] = float(pl_module.grad_norm)
        for group in trainer.optimizers[0].param_groups:
            self.latest[f"lr/{group['role']}"] = group["lr"]
        log_metrics(trainer, self.latest)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs what the validation gave."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        log_metrics(trainer, metrics)

    def _stop(self) -> None:
        if self._since is not None:
            self.training_seconds += time.perf_counter() - self._since
            self._since = None
