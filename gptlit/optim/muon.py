"""Muon and AdamW as one optimizer, and Muon's Newton-Schulz iteration."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from gptlit.device.cpu import cpu_multiplies_bfloat16

# Coefficients, number of iterations and epsilon of Keller Jordan's Muon and of torch.optim.Muon.
QUINTIC = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
NORM_EPS = 1e-7


class MuonAdamW(torch.optim.Optimizer):
    """Muon for groups with the role `matrix` and AdamW for all others, as one optimizer with one state dict.

    Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon/) replaces the Nesterov momentum of a matrix by the
    nearest matrix with orthonormal rows or columns, and steps by lr · √max(1, rows / columns) along it, the scale of
    that implementation ("original" in `torch.optim.Muon`). AdamW is torch's function.

    With an `interval` of k, a matrix moves in every k-th step only, k times as far; its momentum takes every gradient.
    Successive directions share most of their momentum, and orthogonalising is up to a third of a step's work.

    Args:
        groups: as `parameter_groups` returns them.
        fused: whether AdamW runs as one kernel. This is safe under a gradient scaler, which unscales the gradients and
            decides about the step before it calls `step`.

    Raises:
        ValueError: when a group lacks a setting that its role needs.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], fused: bool = False) -> None:
        super().__init__(groups, {"fused": fused})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; a ValueError if it lacks a setting of its role."""
        settings = {"role", "lr", "weight_decay"}
        settings |= {"momentum", "splits", "interval"} if param_group.get("role") == "matrix" else {"betas", "eps"}
        if missing := settings - param_group.keys():
            raise ValueError(f"a parameter group lacks {', '.join(sorted(missing))}")
        if param_group["role"] == "matrix":
            # Muon's counter stays on the CPU, where reading it makes nothing wait; torch moves those of fused groups.
            param_group = {**param_group, "fused": False}
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a state, of an older version too."""
        super().__setstate__(state)
        for group in self.param_groups:
            if group["role"] == "matrix":
                group.setdefault("interval", 1)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; return the result of `closure`, which is called first."""
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
                # The fused kernel counts on the device; the others on the CPU, to avoid a synchronisation.
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
        found = [(p, splits) for p, splits in zip(group["params"], group["splits"], strict=True) if p.grad is not None]
        if not found:
            return
        for p, _ in found:
            state = self.state[p]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(p)
            state.setdefault("step", torch.zeros((), dtype=torch.float32)).add_(1)
        momenta = [self.state[p]["momentum"] for p, _ in found]
        torch._foreach_lerp_(momenta, [p.grad for p, _ in found], 1 - group["momentum"])
        interval = group["interval"]
        if int(self.state[found[0][0]]["step"]) % interval:
            return  # the next update contains this gradient through the momentum
        # Matrices of one shape are one batch of Newton-Schulz: a few large matmuls instead of many small ones.
        batches: dict[object, list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)
        for (p, splits), momentum in zip(found, momenta, strict=True):
            parts = zip(*(tensor.chunk(splits) for tensor in (p, p.grad, momentum)), strict=True)
            for part in parts:
                batches[part[0].shape, p.dtype, p.device].append(part)
        for batch in batches.values():
            params, grads, parts_of_momenta = (list(tensors) for tensors in zip(*batch, strict=True))
            stack = torch.empty((len(params), *params[0].shape), dtype=params[0].dtype, device=params[0].device)
            slots = list(stack.unbind())
            torch._foreach_copy_(slots, grads)
            # Nesterov: look one step of momentum ahead
            torch._foreach_lerp_(slots, parts_of_momenta, group["momentum"])
            update = newton_schulz(stack.to(product_dtype(stack))).to(stack.dtype)  # (K, rows, columns)
            rows, columns = params[0].shape
            rate = interval * group["lr"]
            torch._foreach_mul_(params, 1 - rate * group["weight_decay"])
            torch._foreach_add_(params, update.unbind(), alpha=-rate * math.sqrt(max(1, rows / columns)))


def product_dtype(matrices: Tensor) -> torch.dtype:
    """Return the dtype of the matmuls in Newton-Schulz.

    bfloat16 on CUDA devices that have it, and on CPUs that have it if float32 matmuls may round to it anyway; else
    float32, or float64 for float64 matrices. Without hardware support bfloat16 is ten times slower than float32.
    """
    if matrices.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    if matrices.device.type == "cpu" and matrices.dtype == torch.float32 and not products_are_exact(matrices):
        return torch.bfloat16
    return torch.promote_types(matrices.dtype, torch.float32)


def newton_schulz(stack: Tensor, steps: int = NEWTON_SCHULZ_STEPS) -> Tensor:
    """Move the singular values of each matrix towards 1 and keep its singular vectors: U·S·Vᵀ becomes about U·Vᵀ.

    Each step applies p(σ) = a·σ + b·σ³ + c·σ⁵ to the singular values, with Keller Jordan's coefficients. They rise fast
    and do not converge: after five steps, values above 1/500 of the matrix' Frobenius norm are in [0.68, 1.21].

    Args:
        stack: (K, rows, columns), floating point; not modified.
        steps: number of applications of p.

    Returns:
        (K, rows, columns) of the same dtype; a matrix of zeros stays zero.
    """
    norms = torch.linalg.vector_norm(stack, dim=(1, 2), keepdim=True).clamp(min=NORM_EPS)  # (K, 1, 1)
    stack = stack / norms  # singular values at most 1
    tall = stack.size(1) > stack.size(2)
    X = stack.mT if tall else stack  # (K, m, n) with m <= n
    if X.size(2) >= 2 * X.size(1) and products_are_exact(X):
        Q = _iterate_on_gram(X @ X.mT, steps)
        return stack @ Q if tall else Q @ stack
    a, b, c = QUINTIC
    X = X.contiguous()
    spare = torch.empty_like(X)
    A = X.new_empty(X.size(0), X.size(1), X.size(1))  # (K, m, m)
    B = torch.empty_like(A)
    for _ in range(steps):  # reuses four tensors, since new memory costs as much as a matmul
        torch.bmm(X, X.mT, out=A)
        torch.baddbmm(A, A, A, beta=b, alpha=c, out=B)
        torch.baddbmm(X, B, X, beta=a, out=spare)
        X, spare = spare, X
    return X.mT if tall else X


def products_are_exact(x: Tensor) -> bool:
    """Return whether matmuls of x keep its full precision.

    Those of float32 may be allowed to round to bfloat16 or TF32. A CPU does so only with instructions for bfloat16.
    """
    if x.dtype != torch.float32:
        return x.dtype == torch.float64
    return torch.get_float32_matmul_precision() == "highest" or (x.is_cpu and not cpu_multiplies_bfloat16())


def _iterate_on_gram(A: Tensor, steps: int) -> Tensor:
    """Return Q (K, m, m) such that Q·X is the result of `steps` iterations on X (K, m, n), from A = X·Xᵀ alone.

    Every matmul is (m, m), which saves most of the work for a long matrix. All matrices are polynomials of A, hence
    symmetric and commuting. Squaring the singular values costs half of the digits, so this is not for bfloat16.
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
