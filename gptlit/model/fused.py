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

from gptlit.model.rope import rotate_

softmax_backward = torch.ops.aten._softmax_backward_data  # noqa: SLF001  # it has no public name
# Rows of scores that are computed together: fewer waste less on keys that are masked, and make more matmuls.
ROWS = 128
Context = Any  # of torch.autograd.Function, whose saved attributes have no types


def pays(x: Tensor) -> bool:
    """Whether these functions serve x: on a CPU and with gradients.

    Not in torch.compile, which fuses by itself, nor in torch.func, which takes derivatives of its own.
    """
    if x.device.type != "cpu" or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return not torch._C._are_functorch_transforms_active()  # noqa: SLF001  # it has no public name


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

    Queries and keys are rotated and normalised together; the queries' factor also has the 1 / √D of the scores. Rows of
    `ROWS` positions leave out the keys that all of them must not read.
    Tensors of other element types are copied without a change of layout, which takes half as long as both at once.
    """

    @staticmethod
    def forward(
        ctx: Context, qkv: Tensor, n_head: int, rotation: tuple[Tensor, Tensor] | None, eps: float | None
    ) -> Tensor:
        B, T, width = qkv.shape
        D = width // 3 // n_head
        heads = qkv.view(B, T, 3, n_head, D).permute(2, 0, 3, 1, 4).contiguous()  # (3, B, H, T, D)
        qk = heads[:2].to(_wide(qkv))  # itself if it is wide
        if rotation is not None:
            rotate_(qk, *rotation)
        factor = None if eps is None else _inverse_rms(qk, eps)
        if factor is None:
            qk[0].mul_(D**-0.5)
        else:
            factor[0].mul_(D**-0.5)
            qk.mul_(factor)
        heads[:2].copy_(qk)
        q, k, v = heads.view(3, B * n_head, T, D)
        bias = causal_bias(min(T, ROWS), q.dtype)
        weights, parts = [], []
        for start, end in _rows(T):
            scores = torch.bmm(q[:, start:end], k[:, :end].mT)
            scores[..., start:].add_(bias[: end - start, : end - start])
            weights.append(scores.softmax(-1))  # (B·H, end − start, end)
            parts.append(torch.bmm(weights[-1], v[:, :end]))
        y = parts[0] if len(parts) == 1 else torch.cat(parts, 1)  # (B·H, T, D)
        ctx.rotation, ctx.count = rotation, len(weights)
        ctx.save_for_backward(heads, *weights, *(() if factor is None else (factor,)))
        return y.view(B, n_head, T, D).transpose(1, 2).reshape(B, T, n_head * D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None, None, None]:
        heads, *saved = ctx.saved_tensors
        weights, factor = saved[: ctx.count], saved[ctx.count :]
        _, B, H, T, D = heads.shape
        q, k, v = heads.view(3, B * H, T, D)
        grads = torch.empty_like(heads)  # of q, k and v
        dq, dk, dv = grads.view(3, B * H, T, D)
        dy = grad.view(B, T, H, D).transpose(1, 2).reshape(B * H, T, D)
        for (start, end), part in reversed(list(zip(_rows(T), weights, strict=True))):
            dy_part = dy[:, start:end]
            through = softmax_backward(torch.bmm(dy_part, v[:, :end].mT), part, -1, part.dtype)
            dq[:, start:end] = torch.bmm(through, k[:, :end])
            if end == T:  # the last rows read all keys
                torch.bmm(through.mT, q[:, start:end], out=dk)
                torch.bmm(part.mT, dy_part, out=dv)
            else:
                dk[:, :end].baddbmm_(through.mT, q[:, start:end])
                dv[:, :end].baddbmm_(part.mT, dy_part)
        dqk = grads[:2].to(_wide(heads))
        if factor:
            # y = x · f, f = s / rms(x): dx = f · (g − y · mean(g · y) / s²), where s² is 1 / D for queries, 1 for keys
            normalised = heads[:2].to(dqk.dtype)
            share = (dqk * normalised).sum(-1, keepdim=True)
            share[1].mul_(1 / D)
            dqk.addcmul_(normalised, share, value=-1).mul_(factor[0])
        else:
            dqk[0].mul_(D**-0.5)
        if ctx.rotation is not None:
            cos, sin = ctx.rotation
            rotate_(dqk, cos, -sin)
        grads[:2].copy_(dqk)
        return grads.permute(1, 3, 0, 2, 4).reshape(B, T, 3 * H * D), None, None, None


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _rows(T: int) -> list[tuple[int, int]]:
    return [(start, min(start + ROWS, T)) for start in range(0, T, ROWS)]


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
