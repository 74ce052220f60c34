"""Validation and test: exact means over all tokens, of all processes, in every precision."""

import math

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn import functional as F

from gptlit.training.lightning_internals import validate_initial_weights
from gptlit.training.metrics import ESTIMATES, evaluation_metrics, publish


class TokenSums:
    """Running sums of loss, tokens, characters and bytes, for means that are exact over all tokens.

    The sums are float64 (float32 on MPS, which has no float64) and are no buffers: casting the module to bfloat16 or
    float16 must not cast them.
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # (4,): loss, tokens, characters, bytes

    def add(self, losses: Tensor, counted: Tensor, sizes: Tensor | None = None) -> None:
        """Add one batch.

        Args:
            losses: (N,) loss per token, nats; 0 where a token is not counted.
            counted: (N,) bool.
            sizes: (2, N) characters and UTF-8 bytes per token; None counts none.
        """
        wide = torch.float32 if losses.device.type == "mps" else torch.float64
        none = losses.new_zeros(2, dtype=wide)
        lengths = none if sizes is None else (sizes * counted).sum(1, dtype=wide)
        batch = torch.stack([losses.sum(dtype=wide), counted.sum(dtype=wide), *lengths])
        self._sums = batch if self._sums is None else self._sums + batch

    def means(self, strategy: pl.strategies.Strategy) -> tuple[float, float, float] | None:
        """Return mean loss, characters and bytes per token over all processes, and reset.

        Returns:
            None when nothing was added.
        """
        if self._sums is None:
            return None
        sums = strategy.reduce(self._sums, reduce_op="sum")
        self._sums = None
        assert isinstance(sums, Tensor)
        loss, tokens, characters, size = sums.tolist()
        return loss / max(tokens, 1), characters / max(tokens, 1), size / max(tokens, 1)

    def reset(self) -> None:
        """Forget what was added."""
        self._sums = None


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of every token in nats, (B·T,), float32 or better; 0 where the target is ignored.

    Args:
        logits: (B, T, V).
        targets: (B, T).
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.flatten(0, 1).to(wide), targets.flatten(), reduction="none")


class Evaluation:
    """Sums of a validation: over the windows (loader 0) and over the random batches of the loss estimates."""

    def __init__(self) -> None:
        self._sums = [TokenSums() for _ in range(1 + len(ESTIMATES))]  # per loader

    def reset(self) -> None:
        """Forget an interrupted validation."""
        for sums in self._sums:
            sums.reset()

    def add(self, logits: Tensor, targets: Tensor, sizes_per_token: Tensor, loader: int) -> None:
        """Add one batch.

        Args:
            logits: (B, T, V).
            targets: (B, T), negative where a token is not counted.
            sizes_per_token: (2, V) int64, characters and UTF-8 bytes.
            loader: index of the validation loader.
        """
        flat = targets.flatten()
        sizes = None if loader else sizes_per_token[:, flat.clamp(min=0)]
        self._sums[loader].add(token_losses(logits, targets), flat >= 0, sizes)

    def finish(self, part: str, trainer: pl.Trainer) -> dict[str, float]:
        """Return the metrics, exact over all tokens of all processes, and reset."""
        windows, *estimates = (sums.means(trainer.strategy) for sums in self._sums)
        metrics = {} if windows is None else evaluation_metrics(part, *windows)
        return metrics | {name: found[0] for name, found in zip(ESTIMATES, estimates, strict=True) if found}


class EvaluatesTokens(pl.LightningModule):
    """LightningModule whose validation and test report the mean loss per token; `forward` returns logits (B, T, V)."""

    sizes_per_token: Tensor  # (2, V) int64: characters and UTF-8 bytes

    def __init__(self) -> None:
        super().__init__()
        self.validated_step: int | None = None  # step of the last validation whose metrics were published
        self._evaluation = Evaluation()
        self._validating_initial_weights = False

    def validate_initial_weights(self) -> None:
        """Validate before the first step and publish the metrics at step 0."""
        self._validating_initial_weights = True
        try:
            validate_initial_weights(self.trainer)
        finally:
            self._validating_initial_weights = False

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch of windows (loader 0) or of random chunks (the loss estimates) to the running sums."""
        inputs, targets = batch  # (B, T) each
        self._evaluation.add(self(inputs), targets, self.sizes_per_token, dataloader_idx)

    def on_validation_epoch_start(self) -> None:
        self._evaluation.reset()

    def on_validation_epoch_end(self) -> None:
        """Publish `val/…` and the loss estimates.

        Raises:
            FloatingPointError: when `val/loss` is not finite.
        """
        metrics = self._evaluation.finish("val", self.trainer)
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

    def on_test_epoch_end(self) -> None:
        """Return `test/loss`, `test/bpc`, `test/bpb` and `test/perplexity`."""
        self._return(self._evaluation.finish("test", self.trainer))

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
