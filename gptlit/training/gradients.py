"""Gradients of a step: their norm, clipping by it, and when the optimizer step may be fused."""

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


def norm_is_known(trainer: pl.Trainer) -> bool:
    """Return whether the strategy lets this process compute the norm of all gradients."""
    return isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy | ModelParallelStrategy)


def fused_step_works(trainer: pl.Trainer, device: torch.device) -> bool:
    """Return whether AdamW may run as one kernel, which not every device has.

    A fused step cannot be clipped under a gradient scaler, which 16-mixed brings. When it clips by value, Lightning
    takes every mixed precision for one.
    """
    by_value = trainer.gradient_clip_algorithm == "value"
    scaled = ("16-mixed", "bf16-mixed") if by_value else ("16-mixed",)
    return trainer.precision not in scaled and device.type in ("cpu", "cuda")


def clip_by_norm(
    trainer: pl.Trainer, optimizer: Optimizer, value: int | float | None, algorithm: str | None, needed: bool
) -> tuple[Tensor | None, bool]:
    """Clip the gradients when the settings say by norm, and compute their norm when it is needed.

    Args:
        trainer: of the run; its strategy says whether the norm is known.
        optimizer: over all trained parameters.
        value: `gradient_clip_val`.
        algorithm: `gradient_clip_algorithm`; None is `norm`.
        needed: whether to compute the norm even without clipping.

    Returns:
        The norm () before clipping, or None; and whether the gradients were clipped.
    """
    clips = bool(value) and algorithm in (None, "norm")
    if not norm_is_known(trainer) or not (clips or needed):
        return None, False
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if clips:
        nn.utils.clip_grads_with_norm_(parameters, float(value or 0.0), norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm, clips
