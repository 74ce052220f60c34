"""The transformer: token ids (B, T) -> logits (B, T, V). Its parts are switches of `GPTConfig`.

Shapes: B sequences, T positions, C = n_embd channels, H = n_head heads of D = C / H channels, V = vocab_size tokens.
"""

import math
from dataclasses import replace
from typing import cast

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gptlit.errors import UserError
from gptlit.model import fused
from gptlit.model.config import GPTConfig
from gptlit.model.initialize import initialize
from gptlit.model.kv_cache import KVCache
from gptlit.model.loss import cross_entropy
from gptlit.model.noise import drop, dropout_threshold, with_noise
from gptlit.model.rope import rope_angles, rotate

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


class GPT(nn.Module):
    """Decoder-only transformer over token ids.

    Called with ids (B, T) int64 it returns logits (B, T, V); with `targets` it returns the mean loss in nats.
    `torch.export.export` and `torch.jit.trace` take it in evaluation mode, without a cache.

    Args:
        config: the architecture; `vocab_size` must be set.

    Raises:
        UserError: if `config.vocab_size` is 0, or, when called, if a context is longer than `block_size`.
    """

    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        if config.vocab_size < 1:
            raise UserError("is 0: give the number of tokens, or a tokenizer", "vocab_size")
        self.config = config
        self.loss_fn = next_token_loss  # or the same, compiled
        self.checkpoint_activations = False  # keep only the input of each block for the backward pass
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                **({"wpe": nn.Embedding(config.block_size, config.n_embd)} if config.position == "learned" else {}),
                "drop": nn.Dropout(config.embedding_dropout),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": make_norm(config),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=config.bias and not config.tie_weights)
        if config.tie_weights:
            self.lm_head.weight = cast(nn.Embedding, self.transformer["wte"]).weight
        if config.position == "rope" and config.n_layer:
            cos, sin = rope_angles(torch.arange(config.block_size), config.head_dim, config.rope_base, torch.float32)
            self.register_buffer("rope_cos", cos, persistent=False)  # (block_size, D / 2)
            self.register_buffer("rope_sin", sin, persistent=False)
        initialize(self, config)

    @property
    def blocks(self) -> list[Block]:
        """The transformer blocks, in order."""
        return cast(list[Block], list(cast(nn.ModuleList, self.transformer["h"])))

    def forward(self, ids: Tensor, cache: KVCache | None = None, targets: Tensor | None = None) -> Tensor:
        """Compute the logits of the token after each position, or their loss.

        Args:
            ids: token ids (B, T) int64.
            cache: keys and values of earlier tokens; `ids` follow them, and are added.
            targets: the true next ids (B, T); negative ones are ignored.

        Returns:
            Logits (B, T, V), or with `targets` the mean cross-entropy in nats, a scalar (0 if all are ignored).
        """
        x = self.stream(ids, cache)
        return self.head(self.transformer["ln_f"](x)) if targets is None else self.loss_fn(self, x, targets)

    def hidden(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Return the residual stream (B, T, C) after the last norm, before the head."""
        return self.transformer["ln_f"](self.stream(ids, cache))

    def stream(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Return the residual stream (B, T, C) after the last block, before the last norm."""
        T = ids.size(1)
        start = 0 if cache is None else cache.length
        if start + T > self.config.block_size:
            raise UserError(
                f"a context of {start + T} tokens does not fit block_size {self.config.block_size}: crop it first"
            )
        positions = torch.arange(T, device=ids.device) if cache is None else cache.positions(T, ids.device)
        mask = None if cache is None else cache.mask(T, ids.device)

        if self.training and self.config.token_noise:
            ids = with_noise(ids, self.config.token_noise, self.config.vocab_size)
        x = self.transformer["wte"](ids)  # (B, T, C)
        if "wpe" in self.transformer:
            x = x + self.transformer["wpe"](positions)  # (T, C) or (B, T, C)
        if self.config.norm == "rmsnorm":
            x = rms_norm(x)
            # Under autocast the residual stream has its type too: half the memory traffic.
            if x.device.type != "cpu" and torch.is_autocast_enabled(x.device.type):
                x = x.to(torch.get_autocast_dtype(x.device.type))
        x = self.transformer["drop"](x)
        rotation = self.rotation(positions, x.dtype)
        random_bytes = self.dropout_bytes(x)
        for layer, block in enumerate(self.blocks):
            own_bytes = None if random_bytes is None else random_bytes[layer]
            # Without a cache every layer gets the same arguments, so that all share one compiled block.
            arguments = (x, rotation, cache, layer if cache is not None else 0, mask, own_bytes)
            recompute = self.checkpoint_activations and self.training and cache is None
            x = checkpoint(block, *arguments, use_reentrant=False) if recompute else block(*arguments)
        if cache is not None:
            cache.advance(T)
        return x

    def dropout_bytes(self, x: Tensor) -> Tensor | None:
        """Return random bytes (n_layer, 2, B, T, C) for dropout on a CPU; None elsewhere, and without dropout.

        Drawn eight at a time they cost a tenth of torch's dropout, and stay outside of compiled blocks.
        """
        if not (self.training and self.config.dropout and x.device.type == "cpu"):
            return None
        shape = (self.config.n_layer, 2, *x.shape)
        words = torch.empty(-(-math.prod(shape) // 8), dtype=torch.int64).random_(-(2**63), None)
        return words.view(torch.uint8)[: math.prod(shape)].view(shape)

    def head(self, x: Tensor) -> Tensor:
        """Return the logits (…, V) of the normalised residual stream (…, C)."""
        logits = self.lm_head(x)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    @property
    def logits_are_zero(self) -> bool:
        """Whether all logits are 0 whatever the ids are, as with the initial weights of `init: zero`."""
        return not any(weight.any() for weight in self.lm_head.parameters())

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Return cosines and sines of positions (T,) or (B, T), to broadcast to (B, H, T, D / 2); None without RoPE."""
        if self.config.position != "rope" or not self.config.n_layer:
            return None
        cos, sin = self.rope_cos[positions].to(dtype), self.rope_sin[positions].to(dtype)
        return (cos, sin) if positions.dim() == 1 else (cos[:, None], sin[:, None])


def next_token_loss(model: GPT, x: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats of targets (B, T), from the residual stream x (B, T, C).

    Compiled as one function, it never stores the logits in float32, the largest tensor of a model with many tokens.
    """
    return cross_entropy(model.head(model.transformer["ln_f"](x)), targets)


def meta_model(config: GPTConfig) -> GPT:
    """Return the model on the meta device, for names and shapes of its parameters: nothing is allocated.

    The tables of RoPE, which are not parameters, are missing.
    """
    with torch.device("meta"):
        return GPT(replace(config, position="none" if config.position == "rope" else config.position))
