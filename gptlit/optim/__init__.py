"""Parameter groups, Muon and AdamW in one optimizer, and the learning rate schedule."""

from gptlit.optim.groups import OptimizerConfig, build_optimizer, continue_scheduled_settings, parameter_groups
from gptlit.optim.muon import MuonAdamW, newton_schulz
from gptlit.optim.schedule import ScheduleConfig, check_length, learning_rate_factor

__all__ = [
    "MuonAdamW",
    "OptimizerConfig",
    "ScheduleConfig",
    "build_optimizer",
    "check_length",
    "continue_scheduled_settings",
    "learning_rate_factor",
    "newton_schulz",
    "parameter_groups",
]
