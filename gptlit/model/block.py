"""A transformer block and its parts: normalisation, causal self-attention and feed-forward network.

Shapes: B sequences, T positions, C = n_embd channels, H = n_head heads of D = C / H channels.
"""

import math

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

from gptlit.model import fused
from gptlit.model.config import GPTConfig
from gptlit.model.kv_cache import KVCache
from gptlit.model.noise import drop, dropout_threshold
from gptlit.model.rope import rotate

RMS_NORM_EPS = 1e-6
# Above so many positions, attention that keeps its weights (T, T) takes as long as torch's kernel, which does not keep
# them, or longer: 384 channels in float32, one thread of a CPU with AVX-512, 2026-11-29.
LONGEST_WITH_WEIGHTS = 256


class RMSNorm(nn.Module):
    """RMS normalisation without weights: x / √(mean(x²) + ε) over the last axis (arXiv:1910.07467)."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.dtype in (torch.float32, torch.float64)  # in float16 the square of a norm may be infinite
        return fused.RMSNormFunction.apply(x, RMS_NORM_EPS) if wide and self.training and fused.pays(x) else rms_norm(x)


def rms_norm(x: Tensor) -> Tensor:
    """Divide the last axis by its root mean square; same shape."""
    return F.rms_norm(x, (x.size(-1),), eps=RMS_NORM_EPS)


def make_norm(config: GPTConfig) -> nn.Module:
    if config.norm == "layernorm":
        return nn.LayerNorm(config.n_embd, bias=config.bias)
    return RMSNorm() if config.norm == "rmsnorm" else nn.Identity()


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Return softmax(q·kᵀ / √D)·v, (B, H, T, D), where `mask` is True; without a mask attention is causal."""
    T = q.size(2)
    if not plain_attention_is_faster(q):
        causal = bool(mask is None and T > 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
    weights = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, H, T, T)
    if mask is None and T > 1:
        mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        weights = weights.masked_fill(~mask, -math.inf)
    return F.dropout(weights.softmax(-1), dropout) @ v


def plain_attention_is_faster(x: Tensor) -> bool:
    """Whether separate operations are faster than the fused attention kernel.

    On a CPU with matmuls in bfloat16 (or rounded to it: `medium`) they are, by a factor of ten: the fused kernel splits
    the matmuls into blocks too small for the matrix unit, above all in the backward pass.
    """
    if x.device.type != "cpu":  # first: reading the precision is a graph break in torch.compile
        return False
    return x.dtype == torch.bfloat16 or (x.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest")


class CausalSelfAttention(nn.Module):
    """Causal multi-head attention: every position reads from itself and the positions before it (arXiv:1706.03762)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.attention_dropout
        self.qk_norm = config.qk_norm
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.qkv_bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def project(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values (B, H, T, D) of x (B, T, C)."""
        return self.split(self.c_attn(x), rotation)

    def split(self, qkv: Tensor, rotation: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values (B, H, T, D), rotated and normalised, of `qkv` (B, T, 3·H·D)."""
        B, T, width = qkv.shape
        q, k, v = qkv.view(B, T, 3, self.n_head, width // 3 // self.n_head).permute(2, 0, 3, 1, 4)  # (B, H, T, D) ×3
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        if self.qk_norm:
            q, k = rms_norm(q), rms_norm(k)
        return q, k, v

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor] | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
        mask: Tensor | None = None,
    ) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x)  # (B, T, 3·C)
        fuse = self.training and cache is None and not self.dropout and fused.pays(x)
        if fuse and (T <= LONGEST_WITH_WEIGHTS or plain_attention_is_faster(qkv)):
            eps = RMS_NORM_EPS if self.qk_norm else None
            return self.c_proj(fused.CausalAttentionFunction.apply(qkv, self.n_head, rotation, eps))
        q, k, v = self.split(qkv, rotation)
        if cache is not None:
            k, v = cache.extend(layer, k, v)  # (B, H, length + T, D)
        y = attend(q, k, v, mask, self.dropout if self.training else 0.0)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.c_proj(y)


class MLP(nn.Module):
    """Feed-forward network, applied to every position alone."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.token_shift, self.shifted_channels = config.token_shift, config.shifted_channels
        self.c_fc = nn.Linear(config.n_embd, config.mlp_ratio * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.mlp_ratio * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        fuse = self.training and cache is None and fused.pays(x)
        if self.token_shift and fuse and self.token_shift < x.size(1):
            x = fused.ShiftFunction.apply(x, self.token_shift, self.shifted_channels)
        elif self.token_shift:
            x = shift_tokens(x, self.token_shift, self.shifted_channels, cache, layer)
        x = self.c_fc(x)  # (B, T, mlp_ratio · C)
        x = fused.SquaredReLUFunction.apply(x) if self.activation == "relu2" and fuse else activate(x, self.activation)
        return self.c_proj(x)  # (B, T, C)


def shift_tokens(x: Tensor, reach: int, channels: int, cache: KVCache | None = None, layer: int = 0) -> Tensor:
    """Replace the k-th of the first `reach` groups of channels by those of k positions earlier.

    Args:
        x: (B, T, C).
        reach: number of groups.
        channels: channels of all groups together.
        cache: provides the positions before x in this layer, and stores x; without it they are zeros.
        layer: number of the layer.
    """
    T, width, own = x.size(1), channels // reach, x[..., :channels]
    rows = F.pad(own, (0, 0, reach, 0)) if cache is None else cache.remember(layer, own)  # (B, reach + T, channels)
    groups = (rows[:, reach - k : reach - k + T, width * (k - 1) : width * k] for k in range(1, reach + 1))
    return torch.cat((*groups, x[..., channels:]), dim=-1)


def activate(x: Tensor, activation: str) -> Tensor:
    """Apply the non-linearity of `GPTConfig.activation`; same shape."""
    if activation == "relu2":
        return F.relu(x).square()
    if activation == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


class Block(nn.Module):
    """One layer: attention, then MLP."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.residual = config.residual
        self.dropout = config.dropout
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = make_norm(config) if config.mlp_ratio else None
        self.mlp = MLP(config) if config.mlp_ratio else None

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor] | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
        mask: Tensor | None = None,
        random_bytes: Tensor | None = None,
    ) -> Tensor:
        """Return the residual stream (B, T, C) after this layer; dropout uses `random_bytes` (2, B, T, C) if given."""
        x = self.join(x, self.attn(self.ln_1(x), rotation, cache, layer, mask), random_bytes, 0)
        if self.mlp is not None and self.ln_2 is not None:
            x = self.join(x, self.mlp(self.ln_2(x), cache, layer), random_bytes, 1)
        return x

    def join(self, x: Tensor, branch: Tensor, random_bytes: Tensor | None, half: int) -> Tensor:
        if self.training and self.dropout and random_bytes is not None and self.residual and fused.pays(x):
            return fused.DropAddFunction.apply(x, branch, random_bytes[half], dropout_threshold(self.dropout))
        if self.training and self.dropout:
            branch = drop(branch, self.dropout, None if random_bytes is None else random_bytes[half])
        return x + branch if self.residual else branch
