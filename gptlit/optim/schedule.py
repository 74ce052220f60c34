"""The learning rate as a pure function of the step."""

import math
from dataclasses import dataclass
from typing import Literal

from gptlit.errors import UserError


@dataclass(frozen=True)
class ScheduleConfig:
    """How the rate moves during a run: it climbs for `warmup_steps`, then follows `shape`."""

    shape: Literal["constant", "cosine", "linear", "wsd"] = "linear"
    """After the warm-up: stay; fall along half a cosine; fall along a line; or stay and fall along a line at the end
    (warm-up, stable, decay: arXiv:2405.18392)."""
    warmup_steps: int = 0
    """Optimizer steps of the climb."""
    final_fraction: float = 0.0
    """Rate at the end of the run, as a fraction of the peak."""
    decay_fraction: float = 0.4
    """Only for wsd: the last part of the run, as a fraction of its steps, during which the rate falls."""

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise UserError(f"model.schedule.warmup_steps is {self.warmup_steps}: it must be 0 or more")
        if not 0 <= self.final_fraction <= 1:
            raise UserError(f"model.schedule.final_fraction is {self.final_fraction}: it must be between 0 and 1")
        if not 0 < self.decay_fraction <= 1:
            raise UserError(f"model.schedule.decay_fraction is {self.decay_fraction}: it must be above 0 and at most 1")


def learning_rate_factor(step: int, max_steps: int, schedule: ScheduleConfig) -> float:
    """What the peak rate is multiplied with in optimizer step `step` (0 is the first of `max_steps`): from 0 to 1.

    Warm-up and cosine are nanoGPT's, with its `lr_decay_iters` at `max_steps`.
    """
    # 1. climb in a line, from 1 / (warmup_steps + 1) since a step at rate 0 would be lost
    if step < schedule.warmup_steps:
        return (step + 1) / (schedule.warmup_steps + 1)
    # 2. stay
    decay_start = float(schedule.warmup_steps)
    if schedule.shape == "wsd":
        decay_start = max(decay_start, (1 - schedule.decay_fraction) * max_steps)
    if schedule.shape == "constant" or step <= decay_start:
        return 1.0
    # 3. after the end
    if step >= max_steps:
        return schedule.final_fraction
    # 4. fall from 1 to final_fraction
    progress = (step - decay_start) / (max_steps - decay_start)
    height = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.shape == "cosine" else 1 - progress
    return schedule.final_fraction + (1 - schedule.final_fraction) * height
