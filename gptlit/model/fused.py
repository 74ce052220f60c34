"""Parts of a training step on a CPU as single autograd functions, with their derivatives written out.

PyTorch records an operation for every line of a formula and for every line of its derivative. At the sizes that a CPU
trains, each of them reads and writes memory for longer than it computes. Here a formula and its derivative are two
short lists of operations on few tensors. Second derivatives need the plain formulas, which evaluation mode uses.
Elementwise work is in float32 even where matrix multiplications are in bfloat16: converting takes less time than
computing in bfloat16. `tests/model/test_fused.py` compares each part with the plain formula.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

softmax_backward = torch.ops.aten._softmax_backward_data  # noqa: SLF001  # it has no public name
Context = Any  # of torch.autograd.Function, whose saved attributes have no types


def pays(x: Tensor) -> bool:
    """Whether these functions serve x: on a CPU and with gradients.

    Not in torch.compile, which fuses by itself, nor in torch.func, which takes derivatives of its own.
    """
    if x.device.type != "cpu" or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return not torch._C._are_functorch_transforms_active()  # noqa: SLF001  # it has no public name


def tables(cos: Tensor, sin: Tensor, n_head: int) -> tuple[Tensor, Tensor]:
    """Return RoPE's tables for all channels of queries and keys, (T, 2H, D), from those of a half (T, D / 2)."""
    shape = (cos.size(0), 2 * n_head, 2 * cos.size(1))
    all_cos, all_sin = torch.cat((cos, cos), -1), torch.cat((sin, -sin), -1)  # (T, D)
    return all_cos[:, None].expand(shape).contiguous(), all_sin[:, None].expand(shape).contiguous()


def causal_bias(T: int, dtype: torch.dtype) -> Tensor:
    """Return (T, T): −∞ above the diagonal, else 0."""
    return torch.full((T, T), -torch.inf, dtype=dtype).triu_(1)


class RMSNormFunction(torch.autograd.Function):
    """x (…, C) -> y = x · r, where r = 1 / √(mean(x²) + ε) over the last axis (arXiv:1910.07467)."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, eps: float) -> Tensor:
        r = _inverse_rms(x, eps)
        y = x * r
        ctx.save_for_backward(y, r)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None]:
        # dx = r · (g - y · mean(g · y))
        y, r = ctx.saved_tensors
        return _through_norm(grad, y).mul_(r), None


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(norm.new_tensor(eps), norm, norm, value=1 / x.size(-1)).rsqrt_()


def _through_norm(grad: Tensor, y: Tensor) -> Tensor:
    share = (grad * y).sum(-1, keepdim=True)
    return torch.addcmul(grad, y, share, value=-1 / y.size(-1))


class CausalAttentionFunction(torch.autograd.Function):
    """Queries, keys and values (B, T, 3·H·D) -> heads side by side (B, T, H·D), with RoPE and QK-norm.

    A rotation does not change a norm, so queries and keys are rotated first and normalised after it, both at once.
    """

    @staticmethod
    def forward(
        ctx: Context, qkv: Tensor, bias: Tensor, n_head: int, rotation: tuple[Tensor, Tensor] | None, eps: float | None
    ) -> Tensor:
        B, T, width = qkv.shape
        C = width // 3
        D = C // n_head
        qk = qkv[..., : 2 * C].to(bias.dtype).view(B, T, 2 * n_head, D)
        if rotation is not None:
            cos, sin = rotation
            qk = torch.addcmul(qk * cos, swap_halves(qk), sin)
        r = None
        if eps is not None:
            r = _inverse_rms(qk, eps)
            qk = qk * r
        heads = qkv.new_empty(3, B, n_head, T, D)
        heads[:2].copy_(qk.view(B, T, 2, n_head, D).permute(2, 0, 3, 1, 4))
        heads[2].copy_(qkv[..., 2 * C :].view(B, T, n_head, D).transpose(1, 2))
        q, k, v = heads.view(3, B * n_head, T, D)
        weights = torch.baddbmm(bias.to(q.dtype), q, k.mT, alpha=D**-0.5).softmax(-1)  # (B·H, T, T)
        y = torch.bmm(weights, v).view(B, n_head, T, D).transpose(1, 2).reshape(B, T, C)
        ctx.rotation = rotation
        ctx.save_for_backward(heads, weights, *(() if r is None else (qk, r)))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        heads, weights, *normalised = ctx.saved_tensors
        _, B, H, T, D = heads.shape
        C = H * D
        q, k, v = heads.view(3, B * H, T, D)
        grads = torch.empty_like(heads)  # of q, k and v
        dq, dk, dv = grads.view(3, B * H, T, D)
        dy = grad.view(B, T, H, D).transpose(1, 2).reshape(B * H, T, D)
        through = softmax_backward(torch.bmm(dy, v.mT), weights, -1, weights.dtype)
        torch.bmm(through, k, out=dq)
        torch.bmm(through.mT, q, out=dk)
        torch.bmm(weights.mT, dy, out=dv)
        dqk = torch.empty((B, T, 2 * H, D), dtype=torch.promote_types(heads.dtype, torch.float32))
        dqk.view(B, T, 2, H, D).copy_(grads[:2].permute(1, 3, 0, 2, 4))
        dqk.mul_(D**-0.5)
        if normalised:
            qk, r = normalised
            dqk = _through_norm(dqk, qk).mul_(r)
        if ctx.rotation is not None:
            cos, sin = ctx.rotation
            dqk = torch.addcmul(dqk * cos, swap_halves(dqk), sin, value=-1)
        dqkv = heads.new_empty(B, T, 3 * C)
        dqkv[..., : 2 * C].copy_(dqk.view(B, T, 2 * C))
        dqkv[..., 2 * C :].view(B, T, H, D).copy_(grads[2].transpose(1, 2))
        return dqkv, None, None, None, None


def swap_halves(x: Tensor) -> Tensor:
    """Exchange the halves of the last axis; same shape."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((second, first), dim=-1)


class SquaredReLUFunction(torch.autograd.Function):
    """max(x, 0)² (Primer, arXiv:2109.08668)."""

    @staticmethod
    def forward(ctx: Context, x: Tensor) -> Tensor:
        positive = x.relu()
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return torch.addcmul(grad.new_zeros(()), grad, positive, value=2)


class ShiftFunction(torch.autograd.Function):
    """`shift_tokens` of x (B, T, C) without a cache: a copy with `reach` groups of channels from earlier rows."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, reach: int, channels: int) -> Tensor:
        ctx.reach, ctx.width = reach, channels // reach
        y = x.clone(memory_format=torch.contiguous_format)
        for k in range(1, reach + 1):
            group = slice(ctx.width * (k - 1), ctx.width * k)
            y[:, k:, group] = x[:, :-k, group]
            y[:, :k, group] = 0
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None, None]:
        shifted = grad.clone(memory_format=torch.contiguous_format)
        for k in range(1, ctx.reach + 1):
            group = slice(ctx.width * (k - 1), ctx.width * k)
            shifted[:, :-k, group] = grad[:, k:, group]
            shifted[:, -k:, group] = 0
        return shifted, None, None


class DropAddFunction(torch.autograd.Function):
    """x + branch, both (B, T, C), after dropout of the branch by random bytes of the same shape."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, branch: Tensor, random_bytes: Tensor, threshold: int) -> Tensor:
        # Comparing into floating point is five times faster than into bool, which then has to be converted.
        kept = torch.ge(random_bytes, threshold, out=torch.empty_like(x)).mul_(256 / (256 - threshold))
        ctx.save_for_backward(kept)
        ctx.dtype = branch.dtype
        return torch.addcmul(x, branch.to(x.dtype), kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        return grad, (grad * kept).to(ctx.dtype), None, None
