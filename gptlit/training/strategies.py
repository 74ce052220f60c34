"""Which processes hold which weights under a Lightning strategy."""

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy


def holds_whole_model(trainer: pl.Trainer) -> bool:
    """Whether this process holds all weights: on one device and under DDP, not where they are sharded."""
    return isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy)
