"""Validation and test: exact means over all tokens, of all processes, in every precision."""

import math
from collections.abc import Sequence

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from gptlit.training.lightning_internals import datamodule_of, validate_initial_weights
from gptlit.training.metrics import ESTIMATES, evaluation_metrics, publish


def batches_evaluated(trainer: pl.Trainer, name: str = "val", loader: int = 0) -> tuple[int, int] | None:
    """Return on how many batches a Trainer validates or tests, and how many there are; None if that is unknown.

    Both are those of all processes together.

    Args:
        trainer: during or after the validation.
        name: "val" or "test".
        loader: 0 for the windows of the validation part, the others for the loss estimates.
    """
    loaders = getattr(trainer, f"{name}_dataloaders")
    try:
        whole = len((loaders if isinstance(loaders, list) else [loaders])[loader])
        done = int(getattr(trainer, f"num_{name}_batches")[loader])
    except (TypeError, OverflowError, IndexError):  # loaders without a length; not as many
        return None
    return done * trainer.world_size, whole * trainer.world_size


class TokenSums(Metric):
    """Sums over all counted tokens of all processes: loss, tokens, characters and UTF-8 bytes.

    The sums are float64 (float32 on MPS, which has no float64). An instance must not be an attribute of a module:
    casting the module to bfloat16 or float16 would cast the sums.
    """

    full_state_update = False
    sums: Tensor  # (4,): loss, tokens, characters, bytes

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(4, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, losses: Tensor, counted: Tensor, sizes: Tensor | None = None) -> None:
        """Add one batch.

        Args:
            losses: (N,) loss per token, nats; 0 where a token is not counted.
            counted: (N,) bool.
            sizes: (2, N) characters and UTF-8 bytes per token; None counts none.
        """
        wide = self.sums.dtype
        lengths = losses.new_zeros(2, dtype=wide) if sizes is None else (sizes * counted).sum(1, dtype=wide)
        self.sums = self.sums + torch.stack([losses.sum(dtype=wide), counted.sum(dtype=wide), *lengths])

    def compute(self) -> Tensor:
        """Return means per token, (3,): loss in nats, characters, bytes."""
        loss, tokens, characters, size = self.sums.unbind()
        return torch.stack([loss, characters, size]) / tokens.clamp(min=1)

    def move_to(self, device: torch.device) -> None:
        """Move the sums to a device."""
        if device.type == "mps":
            self.set_dtype(torch.float32)
        self.to(device)


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of every token in nats, (B·T,), float32 or better; 0 where the target is ignored.

    Args:
        logits: (B, T, V).
        targets: (B, T), negative where a token is ignored.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    flat = targets.flatten()
    losses = F.cross_entropy(logits.flatten(0, 1).to(wide), flat.clamp(min=0), reduction="none")
    return losses.masked_fill(flat < 0, 0.0)


def losses_of_zero_logits(vocab_size: int, targets: Tensor) -> Tensor:
    """Return `token_losses` of logits that are all 0, ln V for each token, (B·T,): the same numbers, computed once."""
    one = targets.new_zeros(1, 1)
    loss = token_losses(torch.zeros(1, 1, vocab_size, device=targets.device), one)
    return loss.expand(targets.numel()).masked_fill(targets.flatten() < 0, 0.0)


class Evaluation:
    """Sums of a validation: over the windows (loader 0), and over each further loader."""

    def __init__(self) -> None:
        self._sums: list[TokenSums] = []  # per loader
        self._estimates: Sequence[str] = ()
        self._device = torch.device("cpu")

    def start(self, device: torch.device, estimates: Sequence[str] = ()) -> None:
        """Forget an interrupted validation.

        Args:
            device: of the batches.
            estimates: names of the loss estimates, which the loaders after the first are for; empty for other data.
        """
        self._sums, self._estimates, self._device = [], estimates, device

    def add(self, losses: Tensor, targets: Tensor, sizes_per_token: Tensor, loader: int) -> None:
        """Add one batch.

        Args:
            losses: (B·T,) from `token_losses`.
            targets: (B, T), negative where a token is not counted.
            sizes_per_token: (2, V) int64, characters and UTF-8 bytes.
            loader: index of the validation loader.
        """
        while len(self._sums) <= loader:
            self._sums.append(TokenSums())
            self._sums[-1].move_to(self._device)
        flat = targets.flatten()
        sizes = None if loader and self._estimates else sizes_per_token[:, flat.clamp(min=0)]
        self._sums[loader].update(losses, flat >= 0, sizes)

    def finish(self, part: str) -> dict[str, float]:
        """Return the metrics, exact over all tokens of all processes; a second loader of the user has `val_1/loss`."""
        metrics: dict[str, float] = {}
        for loader, sums in enumerate(self._sums):
            if not sums.update_called:  # a loader without batches, before one with some
                continue
            means = sums.compute().tolist()
            if loader and self._estimates:
                metrics[self._estimates[loader - 1]] = means[0]
            else:
                metrics |= evaluation_metrics(f"{part}_{loader}" if loader else part, *means)
        return metrics


class EvaluatesTokens(pl.LightningModule):
    """LightningModule whose validation and test report the mean loss per token; `forward` returns logits (B, T, V)."""

    sizes_per_token: Tensor  # (2, V) int64: characters and UTF-8 bytes

    def __init__(self) -> None:
        super().__init__()
        self.validated_step: int | None = None  # step of the last validation whose metrics were published
        self._evaluation = Evaluation()
        self._validating_initial_weights = False
        self._logits_are_zero = False

    def validate_initial_weights(self, logits_are_zero: bool = False) -> None:
        """Validate before the first step of a fit and publish the metrics, in a new run at step 0.

        Args:
            logits_are_zero: whether they are for all inputs; then there is no forward pass.
        """
        self._validating_initial_weights, self._logits_are_zero = True, logits_are_zero
        try:
            validate_initial_weights(self.trainer)
        finally:
            self._validating_initial_weights = self._logits_are_zero = False

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to the running sums: of windows (loader 0), of a loss estimate, or of a further loader."""
        inputs, targets = batch  # (B, T) each
        if self._logits_are_zero:
            losses = losses_of_zero_logits(self.sizes_per_token.size(1), targets)
        else:
            losses = token_losses(self(inputs), targets)
        self._evaluation.add(losses, targets, self.sizes_per_token, dataloader_idx)

    def on_validation_epoch_start(self) -> None:
        estimated = getattr(datamodule_of(self.trainer), "estimate_batches", 0) and self.trainer.state.fn == "fit"
        self._evaluation.start(self.device, ESTIMATES if estimated else ())

    def on_validation_epoch_end(self) -> None:
        """Publish `val/…` and the loss estimates.

        Raises:
            FloatingPointError: when `val/loss` is not finite.
        """
        metrics = self._evaluation.finish("val")
        if self.trainer.sanity_checking and not self._validating_initial_weights:
            return
        if self.trainer.state.fn != "fit":
            self._return(metrics)
            return
        publish(self.trainer, metrics, self.global_step)
        self.validated_step = self.global_step
        if "val/loss" in metrics:
            require_finite_validation(metrics["val/loss"], self.global_step)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Do the same as `validation_step`."""
        self.validation_step(batch, batch_idx, dataloader_idx)

    def on_test_epoch_start(self) -> None:
        self._evaluation.start(self.device)

    def on_test_epoch_end(self) -> None:
        """Return `test/loss`, `test/bpc`, `test/bpb` and `test/perplexity`."""
        self._return(self._evaluation.finish("test"))

    def _return(self, metrics: dict[str, float]) -> None:
        """Hand metrics to `Trainer.validate` or `Trainer.test`, in float64 whatever the precision."""
        self.log_dict({name: torch.tensor(value, dtype=torch.float64) for name, value in metrics.items()})


def require_finite_validation(loss: float, step: int) -> None:
    """Check a validation loss.

    Raises:
        FloatingPointError: names the step and what usually helps.
    """
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the validation loss is {loss} after step {step}: nothing is saved from here on; lower "
            "model.optimizer.lr, or choose a wider trainer.precision"
        )
