"""Rotary position embedding (RoFormer, arXiv:2104.09864)."""

import torch
from torch import Tensor


def rope_angles(positions: Tensor, head_dim: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of rotary embedding, each (…, D / 2) for positions (…).

    The angle is p·base^(-2i/D) for channel pair (i, i + D/2), as in RoFormer and NanoChat. Computed in float64: float32
    loses the last digits of the angle at large positions. Computed on the CPU, unless the positions are on the meta
    device.
    """
    device = "meta" if positions.is_meta else "cpu"
    frequencies = base ** (torch.arange(0, head_dim, 2, device=device, dtype=torch.float64) / -head_dim)
    angles = positions.to(device, torch.float64)[..., None] * frequencies
    return angles.cos().to(positions.device, dtype), angles.sin().to(positions.device, dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel pairs (i, i + D/2) of x (B, H, T, D) by angles given as (T, D / 2) or (B, 1, T, D / 2)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate x (…, T, D) in place, as `rotate` does, by angles given as (T, D / 2)."""
    first, second = x.chunk(2, dim=-1)
    crossed = first * -sin
    first.mul_(cos).addcmul_(second, sin)
    second.mul_(cos).add_(crossed)
