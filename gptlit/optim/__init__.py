"""How weights are changed: which tensor is treated how, AdamW and Muon in one optimizer, the rate of every step."""

from gptlit.optim.groups import OptimizerConfig, build_optimizer, describe_groups, parameter_groups
from gptlit.optim.muon import MuonAdamW, newton_schulz
from gptlit.optim.schedule import ScheduleConfig, learning_rate_factor

__all__ = [
    "MuonAdamW",
    "OptimizerConfig",
    "ScheduleConfig",
    "build_optimizer",
    "describe_groups",
    "learning_rate_factor",
    "newton_schulz",
    "parameter_groups",
]
