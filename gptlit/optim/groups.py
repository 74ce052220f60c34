"""Which parameter is treated how, and the optimizer that does it."""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn as nn
from torch import Tensor

from gptlit.errors import UserError
from gptlit.optim.muon import MuonAdamW


@dataclass(frozen=True)
class OptimizerConfig:
    """Which optimizer, and its settings. Rates are peaks: `ScheduleConfig` scales them during the run."""

    name: Literal["adamw", "muon"] = "muon"
    """adamw for every parameter (arXiv:1711.05101), or muon for the matrices inside the blocks
    (https://kellerjordan.github.io/posts/muon/) and AdamW for the rest."""
    lr: float = 5e-3
    """AdamW's rate: of everything, or of what Muon leaves."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's decay rates of the mean and of the squared mean of gradients."""
    eps: float = 1e-8
    """AdamW's guard against dividing by zero."""
    weight_decay: float = 0.1
    """AdamW's decoupled weight decay: a step takes lr · weight_decay of the weight away."""
    decay: Literal["matrices", "all"] = "matrices"
    """What AdamW decays: weights of projections and embeddings as in nanoGPT, or biases and norms too, as torch does
    when it is not told otherwise."""
    muon_lr: float = 0.02
    """Muon's rate."""
    muon_momentum: float = 0.95
    """Muon's Nesterov momentum."""
    muon_weight_decay: float = 0.1
    """Muon's decoupled weight decay."""

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "muon_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"model.optimizer.{name} is {getattr(self, name)}: it must be above 0")
        for name in ("weight_decay", "muon_weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"model.optimizer.{name} is {getattr(self, name)}: it must be 0 or more")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"model.optimizer.betas is {self.betas}: it must be two numbers of at least 0 and below 1")
        if not 0 <= self.muon_momentum < 1:
            raise UserError(f"model.optimizer.muon_momentum is {self.muon_momentum}: it must be at least 0 and below 1")
        object.__setattr__(self, "betas", (float(self.betas[0]), float(self.betas[1])))  # YAML gives a list


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:  # noqa: C901
    """Sorts the trainable parameters of a GPT by role, each into exactly one group; a tied weight is one parameter.

    | role | what | treated by |
    |---|---|---|
    | matrix | with `name: muon`, weights of the projections inside the blocks | Muon |
    | decay | other weights of projections and embeddings; with `decay: all`, every other parameter | AdamW |
    | no_decay | biases, and weights of norms | AdamW, without weight decay |

    With `decay: matrices` and `name: adamw` these are nanoGPT's two groups (two or more axes, or fewer), told by the
    kind of module and not by counting axes, which sharded training may change.

    Returns:
        Groups for `torch.optim.Optimizer`, empty ones left out. Beside `params` and the settings of its optimizer, each
        has `role`, `names` of its parameters, and `initial_lr`, the rate before the schedule. A matrix group has
        `splits`: into how many matrices, stacked along the rows, Muon cuts each parameter. That is 3 for `c_attn`,
        which holds queries, keys and values, else 1.

    Raises:
        UserError: when Muon is asked for parameters that are sharded, since it needs whole matrices.
        RuntimeError: when a parameter has no role or several; it is named.
    """
    in_blocks = set(model.get_submodule("transformer.h").modules())
    claims: dict[Tensor, set[str]] = defaultdict(set)  # by identity, as tensors hash
    thirds: set[Tensor] = set()
    for name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if leaf == "weight" and isinstance(module, nn.Linear | nn.Embedding):
                by_muon = config.name == "muon" and module in in_blocks and isinstance(module, nn.Linear)
                claims[parameter].add("matrix" if by_muon else "decay")
                if name.endswith(".c_attn"):
                    thirds.add(parameter)
            elif isinstance(module, nn.Linear | nn.LayerNorm):
                claims[parameter].add("decay" if config.decay == "all" else "no_decay")

    adamw_settings = {"lr": config.lr, "initial_lr": config.lr, "betas": config.betas, "eps": config.eps}
    groups: dict[str, dict[str, Any]] = {
        "matrix": {
            "lr": config.muon_lr,
            "initial_lr": config.muon_lr,
            "momentum": config.muon_momentum,
            "weight_decay": config.muon_weight_decay,
            "splits": [],
        },
        "decay": {**adamw_settings, "weight_decay": config.weight_decay},
        "no_decay": {**adamw_settings, "weight_decay": 0.0},
    }
    for role, group in groups.items():
        group.update(role=role, names=[], params=[])
    offenders = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        roles = claims[parameter]
        if len(roles) != 1:
            offenders.append(f"{name} ({' and '.join(sorted(roles)) or 'no role'})")
            continue
        (role,) = roles
        if role == "matrix":
            if parameter.dim() != 2 or hasattr(parameter, "full_tensor"):  # flat shards of FSDP; DTensor
                raise UserError(
                    f"model.optimizer.name is muon, which needs whole matrices, but {name} is sharded: choose "
                    "model.optimizer.name adamw, or trainer.strategy ddp"
                )
            groups[role]["splits"].append(3 if parameter in thirds else 1)
        groups[role]["names"].append(name)
        groups[role]["params"].append(parameter)
    if offenders:
        raise RuntimeError(f"every parameter needs exactly one role in the optimizer: {', '.join(offenders)}")
    return [group for group in groups.values() if group["params"]]


def describe_groups(groups: Iterable[dict[str, Any]]) -> str:
    """One line a group: role, tensors, parameters, rate before the schedule, and weight decay."""
    return "\n".join(
        f"{group['role']:<8} {len(group['params']):>4} tensors  "
        f"{sum(p.numel() for p in group['params']):>12,} parameters"
        f"  lr {group['initial_lr']:g}  weight decay {group['weight_decay']:g}"
        for group in groups
    )


def build_optimizer(model: nn.Module, config: OptimizerConfig, fused: bool) -> torch.optim.Optimizer:
    """The optimizer that `config` names, over `parameter_groups(model, config)`.

    Loading a state dict restores its moments and counters only. Settings stay those of `config`, where torch would
    bring back the settings of the saved run without a word.

    Args:
        model: a `GPT`.
        config: which optimizer, and its settings.
        fused: whether AdamW runs as one kernel, which needs a device that has it.

    Raises:
        UserError: from `load_state_dict`, when the state was saved by another optimizer or with other groups.
    """
    groups = parameter_groups(model, config)
    optimizer = MuonAdamW(groups, fused) if config.name == "muon" else torch.optim.AdamW(groups, fused=fused)
    optimizer.register_load_state_dict_pre_hook(_keep_settings)
    return optimizer


def _keep_settings(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state dict with the settings of the optimizer that is about to load it."""
    saved, own = state_dict["param_groups"], optimizer.param_groups
    if [(group.get("role"), group.get("names")) for group in saved] != [
        (group["role"], group["names"]) for group in own
    ]:
        raise UserError(
            "the checkpoint's optimizer state belongs to other parameter groups: resume with the model.optimizer.name "
            "and model.optimizer.decay of the saved run, or start a new run from its weights alone"
        )
    groups = [{**mine, "params": theirs["params"]} for mine, theirs in zip(own, saved, strict=True)]
    return {**state_dict, "param_groups": groups}
