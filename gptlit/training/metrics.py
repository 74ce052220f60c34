"""Metrics: those of a training step, where metrics are published, and which names a callback may monitor."""

import difflib
import math
import re
from collections.abc import Iterable, Mapping

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from torch import Tensor
from torch.optim import Optimizer

from gptlit.device.processes import HostCopy, mean_over_processes
from gptlit.errors import UserError
from gptlit.training.gradients import norm_is_known
from gptlit.training.lightning_internals import (
    acts_after_validations_only,
    callbacks_of,
    datamodule_of,
    log_interval,
    log_to_loggers,
    set_metrics,
    steps_of_run,
)

ESTIMATES = ("train/loss_estimate", "val/loss_estimate")  # in the order of the validation loaders after the first
PROGRESS_BAR = ("train/loss", "val/loss")
RATE_NAMES = {"matrix": "lr/muon", "head": "lr/head", "decay": "lr/adamw", "no_decay": "lr/adamw"}  # by role of a group


def evaluation_metrics(part: str, loss: float, chars_per_token: float, bytes_per_token: float) -> dict[str, float]:
    """Return the metrics of a part of the text under its name.

    Returns:
        `loss` (nats per token), `bpc` (bits per character), `bpb` (bits per byte of UTF-8) and `perplexity`.
    """
    bits = loss / math.log(2)
    return {
        f"{part}/loss": loss,
        f"{part}/bpc": bits / max(chars_per_token, 1e-12),
        f"{part}/bpb": bits / max(bytes_per_token, 1e-12),
        f"{part}/perplexity": math.exp(min(loss, 700.0)),
    }


class StepMetrics:
    """Loss, gradient norm and learning rates of the last optimizer step, on the device until they are read."""

    def __init__(self) -> None:
        self.loss: Tensor | None = None  # (): mean over micro-batches and processes
        self.grad_norm: Tensor | None = None  # (): before clipping
        self.rates: dict[str, Tensor] = {}  # () each
        self._micro_losses: list[Tensor] = []
        self._loss_on_host: HostCopy | None = None

    def reset(self) -> None:
        """Forget the last step and its micro-batches."""
        self.loss = self.grad_norm = self._loss_on_host = None
        self.rates = {}
        self._micro_losses.clear()

    def add(self, loss: Tensor, last: bool) -> None:
        """Add the loss () of a micro-batch; `last` completes the step and starts the copy to the host."""
        self._micro_losses.append(loss.detach().clone())  # a CUDA graph writes the next loss into the same memory
        if last:
            self.loss = mean_over_processes(torch.stack(self._micro_losses).mean())
            self._micro_losses.clear()
            self._loss_on_host = HostCopy(self.loss)

    def require_finite(self, step: int) -> None:
        """Check the loss before the weights change.

        Raises:
            FloatingPointError: names the step and what usually helps.
        """
        loss = 0.0 if self._loss_on_host is None else self._loss_on_host.item()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the training loss is {loss} at step {step}: training stopped before the weights changed; lower "
                "model.optimizer.lr, or set trainer.gradient_clip_val"
            )

    def tensors(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """Return `train/loss`, `train/grad_norm` and the learning rates (`lr/…`), without waiting for the device.

        The rates are those that the step began with: an lr_scheduler may have set those of the next step. Where they
        were not noted, as in a subclass with an `optimizer_step` of its own, they are those of the optimizer.
        """
        found = dict(self.rates) or learning_rates(optimizer)
        for name, value in (("train/loss", self.loss), ("train/grad_norm", self.grad_norm)):
            if value is not None:
                found[name] = value
        return found


def learning_rates(optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the current learning rates, () float64 each, by metric.

    A group of gptlit is named by its optimizer (`decay` and `no_decay` have the same rate), one of another optimizer by
    its `name`, or by the class of the optimizer: `lr/sgd`, with several groups `lr/sgd_0`, `lr/sgd_1`. Groups without a
    rate are left out.
    """
    groups, rates = optimizer.param_groups, {}
    for index, group in enumerate(groups):
        kind = type(optimizer).__name__.lower() + (f"_{index}" if len(groups) > 1 else "")
        name = RATE_NAMES.get(group.get("role", ""), f"lr/{group.get('name', kind)}")
        if group.get("lr") is not None:
            rates[name] = torch.as_tensor(group["lr"], dtype=torch.float64)
    return rates


def is_logged(trainer: pl.Trainer, step: int) -> bool:
    """Return whether the metrics of an optimizer step go to the loggers; none do if `log_every_n_steps` is 0."""
    return at_log_interval(trainer, step) or (log_interval(trainer) > 0 and step >= steps_of_run(trainer))


def at_log_interval(trainer: pl.Trainer, step: int) -> bool:
    """Return whether a step is a multiple of `log_every_n_steps`; none is one of 0."""
    interval = log_interval(trainer)
    return interval > 0 and step % interval == 0


def is_monitored(trainer: pl.Trainer, name: str) -> bool:
    """Return whether a callback monitors the metric."""
    return any(getattr(callback, "monitor", None) == name for callback in callbacks_of(trainer))


def publish(trainer: pl.Trainer, metrics: Mapping[str, float], step: int) -> None:
    """Publish metrics as `self.log` does, under the number of optimizer steps done and in full precision.

    They reach the loggers, `trainer.callback_metrics`, `trainer.logged_metrics` and, for the losses, the progress bar.
    `self.log` itself would cast them to the default dtype (bfloat16 in bf16-true), count one step less, and cost 1 ms.
    """
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in metrics.items()}
    set_metrics(trainer, tensors, logged=True, bar={name: metrics[name] for name in PROGRESS_BAR if name in metrics})
    log_to_loggers(trainer, tensors, step)


def metric_names(trainer: pl.Trainer) -> set[str]:
    """Return the names of the metrics that a fit publishes and that a callback can monitor."""
    names = {"train/loss"} | learning_rates(trainer.optimizers[0]).keys()
    if norm_is_known(trainer):
        names.add("train/grad_norm")
    if trainer.enable_validation:
        names.update(evaluation_metrics("val", 0.0, 1.0, 1.0))
        if getattr(datamodule_of(trainer), "estimate_batches", 0):
            names.update(ESTIMATES)
    return names


def validation_counts(trainer: pl.Trainer) -> bool:
    """Return whether a validation that ends is one of a fit, the one at step 0 included, and no sanity check."""
    return trainer.state.fn == "fit" and "val/loss" in trainer.callback_metrics


def check_monitors(trainer: pl.Trainer) -> None:
    """Refuse callbacks that monitor a metric which the run does not have, or wait for validations that it lacks.

    Callbacks and modules from outside of Lightning and gptlit, such as a subclass of LitGPT, may log metrics of their
    own; where there is one, every name passes. Callbacks of gptlit read their metric after a validation only, so
    without validations any name passes for them.

    Args:
        trainer: before its first step.

    Raises:
        UserError: names callback and metric.
    """
    callbacks, known = callbacks_of(trainer), metric_names(trainer)
    for callback in callbacks:
        if not trainer.enable_validation and acts_after_validations_only(trainer, callback):
            raise UserError(
                "acts after validations, and this run has none: leave it out, or let trainer.limit_val_batches be 1 or "
                "more",
                setting=type(callback).__name__,
            )
    if not (is_shipped(trainer.lightning_module) and all(map(is_shipped, callbacks))):
        return
    monitors_rates = any(isinstance(callback, LearningRateMonitor) for callback in callbacks)
    own_loaders = not hasattr(datamodule_of(trainer), "estimate_batches")
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if own_loaders and monitor is not None:
            monitor = re.sub(r"^val_\d+/", "val/", monitor)  # a further loader has the metrics of the first
        if monitor is None or monitor in known or (monitors_rates and str(monitor).startswith("lr-")):
            continue
        if not trainer.enable_validation and is_of(callback, "gptlit"):
            continue
        raise UserError(
            f"is {monitor!r}, which this run does not log; {suggestion(str(monitor), known)}",
            setting=f"{type(callback).__name__}.monitor",
        )


def is_shipped(owner: pl.Callback | pl.LightningModule) -> bool:
    """Return whether a callback or module comes from Lightning or gptlit, and thus logs only metrics that we know."""
    return is_of(owner, "lightning", "gptlit")


def is_of(owner: pl.Callback | pl.LightningModule, *packages: str) -> bool:
    """Return whether the class of a callback or module is defined in one of the packages."""
    return type(owner).__module__.partition(".")[0] in packages


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return "did you mean …?", or all names where none is similar."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    return f"did you mean {close[0]}?" if close else f"choose one of {', '.join(names)}"
