"""Parameter groups of a GPT by role, and the optimizer over them."""

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn as nn
from torch import Tensor

from gptlit.errors import UserError, require
from gptlit.optim.muon import MuonAdamW


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its settings. Learning rates are peak values, which `ScheduleConfig` scales during the run."""

    name: Literal["adamw", "muon"] = "muon"
    """adamw for every parameter (arXiv:1711.05101), or muon for the matrices inside the blocks
    (https://kellerjordan.github.io/posts/muon/) and AdamW for the rest."""
    lr: float = 5e-3
    """Learning rate of AdamW."""
    head_lr: float | None = None
    """Learning rate of AdamW for lm_head; null is lr. Not with gpt.tie_weights, where the head is the embedding."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's coefficients of the running means of gradients and squared gradients."""
    eps: float = 1e-8
    """Added to AdamW's denominator."""
    weight_decay: float = 0.1
    """AdamW's decoupled weight decay: a step multiplies the weight by 1 - lr · weight_decay."""
    decay: Literal["matrices", "all"] = "matrices"
    """What AdamW decays: weights of projections and embeddings, as nanoGPT does, or also biases and norms, torch's
    default."""
    muon_lr: float = 0.02
    """Learning rate of Muon."""
    muon_momentum: float = 0.95
    """Muon's Nesterov momentum."""
    muon_weight_decay: float = 0.1
    """Muon's decoupled weight decay."""
    muon_interval: int = 1
    """Optimizer steps from one update by Muon to the next, which then moves as far as so many updates. 2 or more saves
    time, since orthogonalising is up to a third of a step's work."""

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "muon_lr", *(() if self.head_lr is None else ("head_lr",))):
            require(0 < getattr(self, name) < math.inf, name, getattr(self, name), "above 0, and finite")
        for name in ("weight_decay", "muon_weight_decay"):
            require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "0 or more, and finite")
        two = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        require(two, "betas", self.betas, "two numbers of at least 0 and below 1")
        require(0 <= self.muon_momentum < 1, "muon_momentum", self.muon_momentum, "at least 0 and below 1")
        require(self.muon_interval >= 1, "muon_interval", self.muon_interval, "1 or more")
        object.__setattr__(self, "betas", (float(self.betas[0]), float(self.betas[1])))  # YAML gives a list


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Group the trainable parameters of a GPT by role, each into exactly one group. A tied weight counts once.

    | role | parameters | optimizer |
    |---|---|---|
    | matrix | with `name: muon`, weights of the projections inside the blocks | Muon |
    | head | with a `head_lr`, the weight of `lm_head` | AdamW at that rate, with weight decay |
    | decay | other weights of projections and embeddings; with `decay: all`, every other parameter | AdamW |
    | no_decay | biases and weights of norms | AdamW without weight decay |

    With `decay: matrices` and `name: adamw` these are nanoGPT's two groups (two or more axes, or fewer). They are found
    by the kind of module, since sharded training may change the number of axes.

    Args:
        model: a `GPT`.
        config: optimizer and settings.

    Returns:
        Groups for `torch.optim.Optimizer`, without empty ones. Besides `params` and the settings of its optimizer, each
        has `role`, `names` of its parameters, and `initial_lr`, the learning rate before the schedule. A matrix group
        has `splits`: the number of matrices, stacked along the rows, that Muon treats separately in each parameter. It
        is 3 for `c_attn`, which holds queries, keys and values, else 1.

    Raises:
        UserError: when Muon would get sharded parameters, since it needs whole matrices; when there is a `head_lr` but
            no head of its own.
        RuntimeError: when a parameter has no role or several; names it.
    """
    roles_of, thirds = roles_by_module(model, config)
    groups = empty_groups(config)
    offenders = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        roles = roles_of[parameter]
        if len(roles) != 1:
            offenders.append(f"{name} ({' and '.join(sorted(roles)) or 'no role'})")
            continue
        (role,) = roles
        if role == "matrix":
            if parameter.dim() != 2 or hasattr(parameter, "full_tensor"):  # flat shards of FSDP; DTensor
                raise UserError(
                    f"is muon, which needs whole matrices, but {name} is sharded: choose adamw, or trainer.strategy "
                    "ddp",
                    "model.optimizer.name",
                )
            groups[role]["splits"].append(3 if parameter in thirds else 1)
        groups[role]["names"].append(name)
        groups[role]["params"].append(parameter)
    if offenders:
        raise RuntimeError(f"every parameter needs exactly one role in the optimizer: {', '.join(offenders)}")
    return [group for group in groups.values() if group["params"]]


def empty_groups(config: OptimizerConfig) -> dict[str, dict[str, Any]]:
    """Return the groups by role, with their settings and without parameters."""
    adamw_settings = {"lr": config.lr, "initial_lr": config.lr, "betas": config.betas, "eps": config.eps}
    head_lr = config.lr if config.head_lr is None else config.head_lr
    groups: dict[str, dict[str, Any]] = {
        "matrix": {
            "lr": config.muon_lr,
            "initial_lr": config.muon_lr,
            "momentum": config.muon_momentum,
            "weight_decay": config.muon_weight_decay,
            "interval": config.muon_interval,
            "splits": [],
        },
        "head": {**adamw_settings, "lr": head_lr, "initial_lr": head_lr, "weight_decay": config.weight_decay},
        "decay": {**adamw_settings, "weight_decay": config.weight_decay},
        "no_decay": {**adamw_settings, "weight_decay": 0.0},
    }
    for role, group in groups.items():
        group.update(role=role, names=[], params=[])
    return groups


def roles_by_module(model: nn.Module, config: OptimizerConfig) -> tuple[dict[Tensor, set[str]], set[Tensor]]:
    """Return the roles that the modules give to their parameters, and the parameters that hold three matrices.

    Raises:
        UserError: when there is a `head_lr`, but the head is the embedding.
    """
    head = model.get_submodule("lm_head")
    if config.head_lr is not None and head.weight is model.get_submodule("transformer.wte").weight:
        raise UserError(
            "is for a head with weights of its own, but model.gpt.tie_weights makes it the embedding: leave it out",
            "model.optimizer.head_lr",
        )
    in_blocks = set(model.get_submodule("transformer.h").modules())
    roles: dict[Tensor, set[str]] = defaultdict(set)  # tensors hash by identity
    thirds: set[Tensor] = set()
    for name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if leaf == "weight" and isinstance(module, nn.Linear | nn.Embedding):
                by_muon = config.name == "muon" and module in in_blocks and isinstance(module, nn.Linear)
                own_rate = config.head_lr is not None and module is head
                roles[parameter].add("matrix" if by_muon else "head" if own_rate else "decay")
                if name.endswith(".c_attn"):
                    thirds.add(parameter)
            elif isinstance(module, nn.Linear | nn.LayerNorm):
                roles[parameter].add("decay" if config.decay == "all" else "no_decay")
    return roles, thirds


def build_optimizer(model: nn.Module, config: OptimizerConfig, fused: bool) -> torch.optim.Optimizer:
    """Return the optimizer of `config` over `parameter_groups(model, config)`.

    Loading a state dict restores moments and counters only. Settings stay those of `config`; torch would silently
    restore those of the saved run.

    Args:
        model: a `GPT`.
        config: optimizer and settings.
        fused: whether AdamW runs as one kernel, which not every device has.

    Raises:
        UserError: from `load_state_dict`, when the state was saved by another optimizer or with other groups.
    """
    groups = parameter_groups(model, config)
    optimizer = MuonAdamW(groups, fused) if config.name == "muon" else torch.optim.AdamW(groups, fused=fused)
    optimizer.register_load_state_dict_pre_hook(_keep_settings)
    return optimizer


def continue_scheduled_settings(optimizer: torch.optim.Optimizer) -> None:
    """Let `load_state_dict` also restore learning rates and momenta, which an lr_scheduler changes from step to step.

    Args:
        optimizer: from `build_optimizer`, which would keep those of its configuration, or any other.
    """
    optimizer.register_load_state_dict_pre_hook(_take_scheduled_settings, prepend=True)


def _take_scheduled_settings(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Set rates and momenta of the groups to the saved ones."""
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=False):
        group.update({name: saved[name] for name in ("lr", "betas", "momentum") if name in saved})


def _keep_settings(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Replace the settings in a state dict by those of the optimizer that is about to load it."""
    saved, current = state_dict["param_groups"], optimizer.param_groups
    if [(group.get("role"), group.get("names")) for group in saved] != [
        (group["role"], group["names"]) for group in current
    ]:
        raise UserError(
            "the checkpoint's optimizer state belongs to other parameter groups: resume with the model.optimizer.name, "
            "model.optimizer.decay and model.optimizer.head_lr (a rate, or null) of the saved run, or start a new run "
            "from its weights alone"
        )
    groups = [{**group, "params": other["params"]} for group, other in zip(current, saved, strict=True)]
    return {**state_dict, "param_groups": groups}
