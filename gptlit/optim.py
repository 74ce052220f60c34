"""How weights are changed: which tensor is treated how, AdamW and Muon in one optimizer, the rate of every step."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
import torch.nn as nn
from torch import Tensor
from torch.optim.adamw import adamw

from gptlit.errors import UserError

# The quintic's coefficients, the number of iterations and the epsilon of Keller Jordan's Muon and of torch.optim.Muon.
QUINTIC = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
NORM_EPS = 1e-7


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


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
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
        f"{group['role']:<8} {len(group['params']):>4} tensors {sum(p.numel() for p in group['params']):>12,} parameters"
        f"  lr {group['initial_lr']:g}  weight decay {group['weight_decay']:g}"
        for group in groups
    )


class MuonAdamW(torch.optim.Optimizer):
    """Muon for groups whose `role` is matrix, AdamW for all others: one optimizer, one state dict, one step.

    Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon/) replaces the Nesterov momentum of a matrix by the
    nearest matrix with orthonormal rows or columns, and steps by lr · √max(1, rows / columns) along it, the scale of
    that implementation ("original" in `torch.optim.Muon`). AdamW is torch's own function.

    Args:
        groups: as `parameter_groups` returns them.
        fused: whether AdamW runs as one kernel. Safe under a gradient scaler, since the scaler unscales the gradients
            and decides about the step before it gets here.

    Raises:
        ValueError: when a group lacks a setting that its role needs.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], fused: bool = False) -> None:
        super().__init__(groups, {"fused": fused})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Checks that the group is complete before it takes it."""
        settings = {"role", "lr", "weight_decay"}
        settings |= {"momentum", "splits"} if param_group.get("role") == "matrix" else {"betas", "eps"}
        if missing := settings - param_group.keys():
            raise ValueError(f"a parameter group lacks {', '.join(sorted(missing))}")
        super().add_param_group(param_group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Changes every parameter that has a gradient; returns what `closure`, called first, returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["role"] == "matrix":
                self._step_muon(group)
            else:
                self._step_adamw(group)
        return loss

    def _step_adamw(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            if not self.state[p]:
                # The fused kernel counts on the device; the others count on the CPU, where reading costs no wait.
                self.state[p]["step"] = torch.zeros(
                    (), dtype=torch.float32, device=p.device if group["fused"] else "cpu"
                )
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        adamw(
            params,
            [p.grad for p in params],
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            [],
            [self.state[p]["step"] for p in params],
            fused=group["fused"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _step_muon(self, group: dict[str, Any]) -> None:
        # Matrices of one shape go through Newton-Schulz as one batch: a few large products instead of many small.
        batches: dict[object, list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)
        for p, splits in zip(group["params"], group["splits"], strict=True):
            if p.grad is None:
                continue
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
            parts = zip(*(tensor.chunk(splits) for tensor in (p, p.grad, self.state[p]["momentum"])), strict=True)
            for part in parts:
                batches[part[0].shape, p.dtype, p.device].append(part)
        for batch in batches.values():
            params, grads, momenta = (list(tensors) for tensors in zip(*batch, strict=True))
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            stack = torch.empty((len(params), *params[0].shape), dtype=params[0].dtype, device=params[0].device)
            slots = list(stack.unbind())
            torch._foreach_copy_(slots, grads)
            torch._foreach_lerp_(slots, momenta, group["momentum"])  # Nesterov: look one step of momentum ahead
            update = newton_schulz(stack.to(product_dtype(stack))).to(stack.dtype)  # (K, rows, columns)
            rows, columns = params[0].shape
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, update.unbind(), alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))


def product_dtype(matrices: Tensor) -> torch.dtype:
    """What Newton-Schulz multiplies in: bfloat16 on CUDA devices that have it, else float32, or float64 if given so.

    Without hardware for it, bfloat16 is ten times slower than float32.
    """
    if matrices.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.promote_types(matrices.dtype, torch.float32)


def newton_schulz(stack: Tensor, steps: int = NEWTON_SCHULZ_STEPS) -> Tensor:
    """Pulls the singular values of each matrix towards 1 and leaves its singular vectors: U·S·Vᵀ becomes about U·Vᵀ.

    Each step applies p(σ) = a·σ + b·σ³ + c·σ⁵ to the singular values, with Keller Jordan's coefficients, which climb
    fast and then wander: after five steps whatever was above 0.01 of the matrix' norm lies in about [0.7, 1.2].

    Args:
        stack: (K, rows, columns), floating point; left as it is.
        steps: how often p is applied.

    Returns:
        (K, rows, columns) of the same dtype; a matrix of zeros stays zero.
    """
    norms = torch.linalg.vector_norm(stack, dim=(1, 2), keepdim=True).clamp(min=NORM_EPS)  # (K, 1, 1)
    stack = stack / norms  # singular values at most 1
    tall = stack.size(1) > stack.size(2)
    X = stack.mT if tall else stack  # (K, m, n) with m <= n
    if X.size(2) >= 2 * X.size(1) and X.dtype in (torch.float32, torch.float64):
        Q = _iterate_on_gram(X @ X.mT, steps)
        return stack @ Q if tall else Q @ stack
    a, b, c = QUINTIC
    X = X.contiguous()
    spare = torch.empty_like(X)
    A = X.new_empty(X.size(0), X.size(1), X.size(1))  # (K, m, m)
    B = torch.empty_like(A)
    for _ in range(steps):  # writes into the same four tensors, since fresh memory costs as much as a product
        torch.bmm(X, X.mT, out=A)
        torch.baddbmm(A, A, A, beta=b, alpha=c, out=B)
        torch.baddbmm(X, B, X, beta=a, out=spare)
        X, spare = spare, X
    return X.mT if tall else X


def _iterate_on_gram(A: Tensor, steps: int) -> Tensor:
    """Q (K, m, m) such that Q·X is what `steps` iterations make of X (K, m, n), from A = X·Xᵀ alone.

    Every product is (m, m), which spares a long matrix most of its work. All of them are polynomials of A: symmetric,
    and free to change places. Squaring the singular values costs half of the digits: not for bfloat16.
    """
    a, b, c = QUINTIC
    B, Q, spare = (torch.empty_like(A) for _ in range(3))
    diagonal = B.diagonal(dim1=1, dim2=2)
    for step in range(steps):
        torch.baddbmm(A, A, A, beta=b, alpha=c, out=B)
        diagonal.add_(a)  # this step turns X into B·X
        if step == 0:
            Q.copy_(B)
        else:
            torch.bmm(B, Q, out=spare)
            Q, spare = spare, Q
        if step < steps - 1:
            torch.bmm(B, A, out=spare)
            torch.bmm(spare, B, out=A)
    return Q
