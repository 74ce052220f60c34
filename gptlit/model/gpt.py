"""The transformer: token ids (B, T) in, logits (B, T, V) out. Its parts are switches of `GPTConfig`.

Shapes are written with B sequences, T positions, C = n_embd channels, H = n_head heads of D = C / H channels,
and V = vocab_size symbols.
"""

import math
from typing import cast

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gptlit.errors import UserError
from gptlit.model.config import GPTConfig
from gptlit.model.kv_cache import KVCache

RMS_NORM_EPS = 1e-6


class RMSNorm(nn.Module):
    """x / √(mean(x²) + ε) over the last axis, without weights (arXiv:1910.07467)."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x)


def rms_norm(x: Tensor) -> Tensor:
    """Divides the last axis by its root mean square; same shape."""
    return F.rms_norm(x, (x.size(-1),), eps=RMS_NORM_EPS)


def make_norm(config: GPTConfig) -> nn.Module:
    if config.norm == "layernorm":
        return nn.LayerNorm(config.n_embd, bias=config.bias)
    return RMSNorm() if config.norm == "rmsnorm" else nn.Identity()


def rope_angles(positions: Tensor, head_dim: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary embedding, each (…, D / 2) for positions (…).

    Angle p·base^(-2i/D) for channel pair (i, i + D/2), as in RoFormer and NanoChat. Computed in float64, since
    float32 loses the angle's last digits at long positions.
    """
    frequencies = base ** (torch.arange(0, head_dim, 2, device="cpu", dtype=torch.float64) / -head_dim)
    angles = positions.to("cpu", torch.float64)[..., None] * frequencies
    return angles.cos().to(positions.device, dtype), angles.sin().to(positions.device, dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns channel pairs (i, i + D/2) of x (B, H, T, D) by the angles given as (T, D / 2) or (B, 1, T, D / 2)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """softmax(q·kᵀ / √D + mask)·v, (B, H, T, D); without a mask (True: may be seen) each query sees up to itself."""
    T = q.size(2)
    if not written_out_is_faster(q):
        causal = bool(mask is None and T > 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
    weights = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, H, T, T)
    if mask is None and T > 1:
        mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        weights = weights.masked_fill(~mask, -math.inf)
    return F.dropout(weights.softmax(-1), dropout) @ v


def written_out_is_faster(x: Tensor) -> bool:
    """Whether plain operations beat the fused kernel.

    On a CPU that computes products in bfloat16 (or may round them to it: `medium`), they do by a factor of ten: the
    fused kernel cuts the products into pieces too small for the matrix unit, above all in the backward pass.
    """
    if x.device.type != "cpu":  # at once: the question for the precision cuts what is compiled into pieces
        return False
    return x.dtype == torch.bfloat16 or (x.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest")


class CausalSelfAttention(nn.Module):
    """Communication: every position gathers from the positions before it (arXiv:1706.03762)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.attention_dropout
        self.qk_norm = config.qk_norm
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.qkv_bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def project(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, H, T, D) of x (B, T, C)."""
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (B, H, T, D) ×3
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
        q, k, v = self.project(x, rotation)
        if cache is not None:
            k, v = cache.extend(layer, k, v)  # (B, H, length + T, D)
        y = attend(q, k, v, mask, self.dropout if self.training else 0.0)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.c_proj(y)


class MLP(nn.Module):
    """Computation: every position thinks alone about what it gathered."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.token_shift, self.shifted_channels = config.token_shift, config.shifted_channels
        self.c_fc = nn.Linear(config.n_embd, config.mlp_ratio * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.mlp_ratio * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        if self.token_shift:
            x = shift_tokens(x, self.token_shift, self.shifted_channels, cache, layer)
        x = activate(self.c_fc(x), self.activation)  # (B, T, mlp_ratio · C)
        return self.c_proj(x)  # (B, T, C)


def shift_tokens(x: Tensor, reach: int, channels: int, cache: KVCache | None = None, layer: int = 0) -> Tensor:
    """X (B, T, C) with the k-th of its first `reach` groups of channels taken from k positions earlier, zeros before
    the first; the groups share `channels` channels. A cache knows what came before x in this layer, and learns x.
    """
    T, width, own = x.size(1), channels // reach, x[..., :channels]
    rows = F.pad(own, (0, 0, reach, 0)) if cache is None else cache.remember(layer, own)  # (B, reach + T, channels)
    groups = (rows[:, reach - k : reach - k + T, width * (k - 1) : width * k] for k in range(1, reach + 1))
    return torch.cat((*groups, x[..., channels:]), dim=-1)


def activate(x: Tensor, activation: str) -> Tensor:
    """The MLP's non-linearity, by its name in `GPTConfig.activation`; same shape."""
    if activation == "relu2":
        return F.relu(x).square()
    if activation == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def with_noise(ids: Tensor, probability: float, vocab_size: int) -> Tensor:
    """Ids of the same shape, each replaced with `probability` by one drawn from the whole vocabulary."""
    others = torch.randint(vocab_size, ids.shape, device=ids.device)
    return torch.where(torch.rand(ids.shape, device=ids.device) < probability, others, ids)


def drop(x: Tensor, probability: float, random_bytes: Tensor | None) -> Tensor:
    """Dropout (Srivastava et al. 2014) by given random bytes of x's shape; by torch's own draw when there are none."""
    if random_bytes is None:
        return F.dropout(x, probability)
    threshold = round(256 * probability)
    return x * (random_bytes >= threshold).to(x.dtype) * (256 / (256 - threshold))


class Block(nn.Module):
    """One layer: communication, then computation."""

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
        """The residual stream (B, T, C) after this layer; `random_bytes` (2, B, T, C) say what dropout drops."""
        x = self.join(x, self.attn(self.ln_1(x), rotation, cache, layer, mask), random_bytes, 0)
        if self.mlp is not None and self.ln_2 is not None:
            x = self.join(x, self.mlp(self.ln_2(x), cache, layer), random_bytes, 1)
        return x

    def join(self, x: Tensor, branch: Tensor, random_bytes: Tensor | None, half: int) -> Tensor:
        if self.training and self.dropout:
            branch = drop(branch, self.dropout, None if random_bytes is None else random_bytes[half])
        return x + branch if self.residual else branch


class GPT(nn.Module):
    """A decoder-only transformer over token ids.

    Raises:
        UserError: when `config.vocab_size` is 0, or a context longer than `block_size` is given.
    """

    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        if config.vocab_size < 1:
            raise UserError("model.gpt.vocab_size is 0: give the number of symbols, or a tokenizer that knows it")
        self.config = config
        self.loss_fn = next_token_loss  # or the same, compiled
        self.checkpoint_activations = False  # keep only what goes into each block, and compute the rest once more
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
        initialize(self)

    @property
    def blocks(self) -> list[Block]:
        """The layers, from the embedding to the head."""
        return cast(list[Block], list(cast(nn.ModuleList, self.transformer["h"])))

    def forward(self, ids: Tensor, cache: KVCache | None = None, targets: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of the token after each of ids (B, T) int64; with `targets` (B, T), their mean loss.

        With a cache, ids are the tokens behind those it already holds.
        """
        x = self.stream(ids, cache)
        return self.head(self.transformer["ln_f"](x)) if targets is None else self.loss_fn(self, x, targets)

    def hidden(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """The residual stream (B, T, C) after the last norm, before the head."""
        return self.transformer["ln_f"](self.stream(ids, cache))

    def stream(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """The residual stream (B, T, C) after the last block, before the last norm."""
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
            # Under autocast the residual stream takes its type too: half the memory traffic.
            x = x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x
        x = self.transformer["drop"](x)
        rotation = self.rotation(positions, x.dtype)
        random_bytes = self.dropout_bytes(x)
        for layer, block in enumerate(self.blocks):
            own_bytes = None if random_bytes is None else random_bytes[layer]
            # Without a cache every layer is called alike, so that one compiled block serves all.
            arguments = (x, rotation, cache, layer if cache is not None else 0, mask, own_bytes)
            recompute = self.checkpoint_activations and self.training and cache is None
            x = checkpoint(block, *arguments, use_reentrant=False) if recompute else block(*arguments)
        if cache is not None:
            cache.advance(T)
        return x

    def dropout_bytes(self, x: Tensor) -> Tensor | None:
        """Random bytes (n_layer, 2, B, T, C) for dropout on a CPU: drawn eight at a time, they cost a tenth of its own
        draw, and lie outside of what is compiled. None elsewhere, and without dropout.
        """
        if not (self.training and self.config.dropout and x.device.type == "cpu"):
            return None
        shape = (self.config.n_layer, 2, *x.shape)
        words = torch.empty(-(-math.prod(shape) // 8), dtype=torch.int64).random_(-(2**63), None)
        return words.view(torch.uint8)[: math.prod(shape)].view(shape)

    def head(self, x: Tensor) -> Tensor:
        """Logits (…, V) of the residual stream (…, C)."""
        logits = self.lm_head(x)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines for `positions` (T,) or (B, T), shaped to meet (B, H, T, D / 2); None without RoPE."""
        if self.config.position != "rope" or not self.config.n_layer:
            return None
        cos, sin = self.rope_cos[positions].to(dtype), self.rope_sin[positions].to(dtype)
        return (cos, sin) if positions.dim() == 1 else (cos[:, None], sin[:, None])


def next_token_loss(model: GPT, x: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy, in nats, of targets (B, T) under the residual stream x (B, T, C) before the last norm.

    Compiled as one piece, it never writes the logits down in float32, the largest tensor of all when there are many
    symbols.
    """
    return F.cross_entropy(model.head(model.transformer["ln_f"](x)).flatten(0, 1), targets.flatten())


@torch.no_grad()
def initialize(model: GPT) -> None:
    """Draws the first weights from torch's global generator.

    | `init` | token embedding | matrices in the blocks | output projections (`c_proj`) | head |
    |---|---|---|---|---|
    | torch, the lecture's while it climbs | N(0, 1) | U(±1/√fan_in) | U(±1/√fan_in) | U(±1/√fan_in) |
    | normal, the lecture's in the end | N(0, 0.02) | N(0, 0.02) | N(0, 0.02) | N(0, 0.02) |
    | scaled, GPT-2's and nanoGPT's | N(0, 0.02) | N(0, 0.02) | N(0, 0.02 / √(2·n_layer)) | N(0, 0.02) |
    | zero, the modern dialect's | N(0, 1) | U(±√(3 / n_embd)) | 0: a block starts as the identity | 0 |

    Learned positions start like the token embedding, in `zero` at N(0, 0.02), as does a table that the head shares.
    Biases start at 0 (in `torch` like their matrix), LayerNorm at weight 1 and bias 0.
    """
    config = model.config
    if config.init == "torch":
        return  # drawn when the layers were made
    std, zero = 0.02, config.init == "zero"
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Embedding):
            continue
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if name.endswith("c_proj") and config.init == "scaled":
            nn.init.normal_(module.weight, std=std / math.sqrt(2 * config.n_layer))
        elif zero and (name.endswith("c_proj") or (name == "lm_head" and not config.tie_weights)):
            nn.init.zeros_(module.weight)
        elif zero and name.startswith("transformer.h."):
            bound = math.sqrt(3 / config.n_embd)  # standard deviation 1 / √n_embd
            nn.init.uniform_(module.weight, -bound, bound)
        else:
            wide = zero and name == "transformer.wte" and not config.tie_weights
            nn.init.normal_(module.weight, std=1.0 if wide else std)
