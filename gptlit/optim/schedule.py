"""The learning rate as a pure function of the step."""

import math
from dataclasses import dataclass
from typing import Literal

from gptlit.errors import UserError, require


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over a run: a linear warm-up of `warmup_steps`, then `shape`."""

    shape: Literal["constant", "cosine", "linear", "wsd"] = "linear"
    """After the warm-up: constant, cosine decay, linear decay, or wsd (warm-up, stable, decay: arXiv:2405.18392), which
    is constant and decays linearly at the end."""
    warmup_steps: int = 0
    """Optimizer steps of the warm-up."""
    final_fraction: float = 0.0
    """Learning rate at the end of the run, as a fraction of the peak."""
    decay_fraction: float = 0.4
    """Only for wsd: length of the decay as a fraction of the run."""

    def __post_init__(self) -> None:
        require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "0 or more")
        require(0 <= self.final_fraction <= 1, "final_fraction", self.final_fraction, "between 0 and 1")
        require(0 < self.decay_fraction <= 1, "decay_fraction", self.decay_fraction, "above 0 and at most 1")


def check_length(max_steps: float, schedule: ScheduleConfig) -> None:
    """Check that the number of steps is known, if the schedule depends on it.

    Args:
        max_steps: steps of the run; inf if unknown.
        schedule: settings.

    Raises:
        UserError: if it is unknown.
    """
    if math.isinf(max_steps) and schedule.shape != "constant":
        raise UserError(
            f"is not set, and the number of steps does not follow from max_epochs and the length of the data, but the "
            f"schedule {schedule.shape} depends on it: set it, or choose the shape constant",
            "trainer.max_steps",
        )


def learning_rate_factor(step: int, max_steps: float, schedule: ScheduleConfig) -> float:
    """Return the factor of the peak learning rate in an optimizer step, from 0 to 1.

    Warm-up and cosine are nanoGPT's, with its `lr_decay_iters` at `max_steps`.

    Args:
        step: index of the step; 0 is the first.
        max_steps: steps of the run; inf, which only `constant` allows, if that is unknown.
        schedule: settings.
    """
    # 1. warm up from 1 / (warmup_steps + 1), since a step at rate 0 would be lost
    if step < schedule.warmup_steps:
        return (step + 1) / (schedule.warmup_steps + 1)
    # 2. constant
    decay_start = float(schedule.warmup_steps)
    if schedule.shape == "wsd":
        decay_start = max(decay_start, (1 - schedule.decay_fraction) * max_steps)
    if schedule.shape == "constant" or step <= decay_start:
        return 1.0
    # 3. after the end
    if step >= max_steps:
        return schedule.final_fraction
    # 4. decay from 1 to final_fraction
    progress = (step - decay_start) / (max_steps - decay_start)
    height = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.shape == "cosine" else 1 - progress
    return schedule.final_fraction + (1 - schedule.final_fraction) * height
