"""The transformer: token ids (B, T) in, logits (B, T, V) out. Its parts are switches of `GPTConfig`.

Shapes are written with B sequences, T positions, C = n_embd channels, H = n_head heads of D = C / H channels,
and V = vocab_size symbols.
"""

import math
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gptlit.errors import UserError

RMS_NORM_EPS = 1e-6


@dataclass(frozen=True)
class GPTConfig:
    """Everything that fixes the function that a GPT computes, apart from its weights.

    The defaults are the modern dialect (NanoChat's architecture); `configs/nanogpt.yaml` and `configs/lecture/` hold
    the settings of nanoGPT and of the lecture "Let's build GPT".
    """

    vocab_size: int = 0
    """Number of symbols; 0 takes it from the tokenizer."""
    block_size: int = 64
    """Longest context, in tokens."""
    n_layer: int = 4
    """Transformer blocks; 0 leaves embedding and head alone, which is the bigram model."""
    n_head: int = 4
    """Attention heads of a block; must divide n_embd."""
    n_embd: int = 128
    """Channels of the residual stream."""
    dropout: float = 0.0
    """Probability of dropping a channel of what attention and MLP add (on a CPU to the nearest 256th)."""
    attention_dropout: float = 0.0
    """Probability of dropping an attention weight."""
    embedding_dropout: float = 0.0
    """Probability of dropping a channel of the embedding."""
    token_noise: float = 0.0
    """Probability that training reads another token, any of the vocabulary, in the place of the true one: a model that
    cannot trust any single token learns less by heart (Xie et al. 2017, arXiv:1703.02573)."""
    bias: bool = False
    """Biases in projections and LayerNorm, and in the head when it is not tied."""
    qkv_bias: bool = False
    """Biases of the query, key and value projections, as GPT-2 has them and the lecture has not."""
    position: Literal["none", "learned", "rope"] = "rope"
    """How a position is told: not at all, a learned table, or rotary embedding (RoFormer, arXiv:2104.09864)."""
    rope_base: float = 10_000.0
    """Base of the rotary angles. A smaller one turns faster: 1,000 suits contexts of a few hundred characters."""
    norm: Literal["none", "layernorm", "rmsnorm"] = "rmsnorm"
    """Normalisation before attention, before the MLP and before the head. rmsnorm has no weights, and stands once
    more after the embedding (arXiv:1910.07467)."""
    residual: bool = True
    """Whether attention and MLP add to their input (true) or replace it (false)."""
    mlp_ratio: int = 4
    """Width of the MLP as a multiple of n_embd; 0 leaves the MLP out."""
    activation: Literal["relu", "gelu", "gelu_tanh", "relu2"] = "relu2"
    """Non-linearity of the MLP. relu2 is max(x, 0)² (Primer, arXiv:2109.08668)."""
    token_shift: int = 0
    """From how many positions back the MLP sees a quarter of its input channels each, 0 to 3; the other channels are
    its own position's (BlinkDL's time shift, https://github.com/BlinkDL/minGPT-tuned)."""
    qk_norm: bool = True
    """RMS-normalise queries and keys (arXiv:2010.04245)."""
    tie_weights: bool = False
    """The head shares the table of the token embedding (arXiv:1608.05859)."""
    logit_softcap: float | None = None
    """c·tanh(logits / c) when given (Gemma 2, arXiv:2408.00118)."""
    init: Literal["torch", "normal", "scaled", "zero"] = "zero"
    """How weights start; the table stands at `initialize`."""

    def __post_init__(self) -> None:
        for name in ("block_size", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise UserError(f"model.gpt.{name} is {getattr(self, name)}: it must be 1 or more")
        for name in ("vocab_size", "n_layer", "mlp_ratio"):
            if getattr(self, name) < 0:
                raise UserError(f"model.gpt.{name} is {getattr(self, name)}: it must be 0 or more")
        if self.n_embd % self.n_head:
            raise UserError(
                f"model.gpt.n_embd ({self.n_embd}) must be a multiple of model.gpt.n_head ({self.n_head}): "
                "change one of them"
            )
        for name in ("dropout", "attention_dropout", "embedding_dropout", "token_noise"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserError(f"model.gpt.{name} is {getattr(self, name)}: it must be at least 0 and less than 1")
        if self.position == "rope" and self.head_dim % 2:
            raise UserError(
                f"model.gpt.position is rope, which turns pairs of channels, but a head has {self.head_dim} channels "
                "(n_embd / n_head): choose an even number"
            )
        if not self.rope_base > 1:
            raise UserError(f"model.gpt.rope_base is {self.rope_base}: it must be above 1")
        if not 0 <= self.token_shift <= 3:
            raise UserError(f"model.gpt.token_shift is {self.token_shift}: it must be 0 (off), 1, 2 or 3")
        if self.token_shift and (self.mlp_ratio == 0 or self.n_embd < 4):
            raise UserError(
                f"model.gpt.token_shift is {self.token_shift}, which needs an MLP (model.gpt.mlp_ratio above 0) and "
                "4 channels (model.gpt.n_embd) or more"
            )
        if self.logit_softcap is not None and not self.logit_softcap > 0:
            raise UserError(f"model.gpt.logit_softcap is {self.logit_softcap}: it must be above 0, or null")

    @property
    def draws_in_training(self) -> bool:
        """Whether a training step draws random numbers."""
        return any((self.dropout, self.attention_dropout, self.embedding_dropout, self.token_noise))

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.n_embd // self.n_head

    @property
    def shifted_channels(self) -> int:
        """Channels of an MLP's input that come from earlier positions."""
        return self.n_embd // 4 * self.token_shift


class KVCache:
    """Keys and values of the positions already read, so that a new token costs one position and not T.

    The caller makes it and hands it to `GPT.forward`, which fills it; the model itself stays without state. Rows may
    hold prompts of different lengths: prefill them padded on the right, then call `truncate` with their true lengths.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        capacity: int | None = None,
    ) -> None:
        self.capacity = config.block_size if capacity is None else min(capacity, config.block_size)
        self.batch_size = batch_size
        shape = (config.n_layer, batch_size, config.n_head, self.capacity, config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)  # (n_layer, B, H, T, D)
        self.values = torch.empty_like(self.keys)
        # What the MLPs read from earlier positions; position p in row token_shift + p, behind rows of zeros.
        earlier = (config.n_layer, batch_size, config.token_shift + self.capacity, config.shifted_channels)
        self.earlier = torch.zeros(earlier, device=device, dtype=dtype) if config.token_shift else None
        self.length = 0  # positions filled in the longest row
        self.row_lengths: Tensor | None = None  # (B,), only when rows differ in length
        self._slots: tuple[Tensor, Tensor] | None = None  # where the next tokens go, the same in every layer

    def truncate(self, row_lengths: Tensor) -> None:
        """Declares how many positions of each row are real, (B,) int64; later tokens overwrite the rest."""
        longest = int(row_lengths.max())
        if longest > self.length:
            raise ValueError(f"a row of {longest} positions cannot be kept of a cache that holds {self.length}")
        self.length = longest
        self.row_lengths = None if bool((row_lengths == longest).all()) else row_lengths.clone()
        if self.row_lengths is not None:
            # What a shorter row has not reached is masked by a weight of 0; but 0 times garbage may be NaN.
            self.keys[:, :, :, longest:] = self.values[:, :, :, longest:] = 0

    def expand(self, rows: Tensor) -> "KVCache":
        """A cache whose row i is a copy of row `rows[i]` of this one: one prefilled prompt, many samples."""
        copy = object.__new__(KVCache)
        copy.batch_size, copy.capacity, copy.length, copy._slots = len(rows), self.capacity, self.length, None
        shape = (self.keys.size(0), len(rows), *self.keys.shape[2:])
        copy.keys, copy.values = self.keys.new_empty(shape), self.keys.new_empty(shape)
        copy.keys[:, :, :, : self.length] = self.keys[:, rows, :, : self.length]
        copy.values[:, :, :, : self.length] = self.values[:, rows, :, : self.length]
        copy.earlier = None if self.earlier is None else self.earlier[:, rows]
        copy.row_lengths = None
        if self.row_lengths is not None:
            copy.truncate(self.row_lengths[rows])
        return copy

    def replace(self, rows: Tensor, other: "KVCache") -> None:
        """Makes row `rows[i]` (int64) a copy of row i of `other`, which may hold less; the other rows stay."""
        held = other.length
        self.keys[:, rows, :, :held] = other.keys[:, :, :, :held]
        self.values[:, rows, :, :held] = other.values[:, :, :, :held]
        if self.earlier is not None and other.earlier is not None:
            self.earlier[:, rows, : other.earlier.size(2)] = other.earlier
        row_lengths = self.row_lengths
        if row_lengths is None:
            row_lengths = torch.full((self.batch_size,), self.length, device=rows.device)
        row_lengths[rows] = held if other.row_lengths is None else other.row_lengths
        self.length = max(self.length, held)
        self.truncate(row_lengths)

    def positions(self, new: int, device: torch.device) -> Tensor:
        """Positions of the next `new` tokens: (new,), or (B, new) when rows differ in length."""
        if self.row_lengths is None:
            return torch.arange(self.length, self.length + new, device=device)
        # One token's are at hand: each operation spared counts for sampling.
        return self.row_lengths[:, None] if new == 1 else self.row_lengths[:, None] + torch.arange(new, device=device)

    def mask(self, new: int, device: torch.device) -> Tensor | None:
        """What the next `new` queries may see, broadcastable to (B, H, new, length + new); None where all is seen.

        Only needed after position 0: `is_causal=True` aligns a query shorter than its keys at the top left.
        """
        if self.row_lengths is None:
            if new == 1 or self.length == 0:
                return None
            columns = torch.arange(self.length + new, device=device)
            return columns[None, :] <= self.positions(new, device)[:, None]  # (new, length + new)
        columns = torch.arange(self.length + new, device=device)
        return (columns[None, None, :] <= self.positions(new, device)[:, :, None])[:, None]  # (B, 1, new, length + new)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes k and v (B, H, new, D) behind what is there; returns all of the layer's (B, H, length + new, D)."""
        keys, values, new = self.keys[layer], self.values[layer], k.size(2)
        end = self.length + new
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} positions; {end} were asked for")
        if self.row_lengths is None:
            keys.narrow(2, self.length, new).copy_(k)
            values.narrow(2, self.length, new).copy_(v)
        else:
            if self._slots is None:
                rows = torch.arange(self.batch_size, device=k.device)[:, None]
                self._slots = rows, self.positions(new, k.device)  # (B, 1), (B, new)
            rows, columns = self._slots
            keys[rows, :, columns] = k.transpose(1, 2)
            values[rows, :, columns] = v.transpose(1, 2)
        return keys.narrow(2, 0, end), values.narrow(2, 0, end)

    def remember(self, layer: int, x: Tensor) -> Tensor:
        """Writes x (B, new, S) behind what is there; returns it behind the `reach` rows before it, (B, reach + new, S).

        S channels of an MLP's input are kept, and `reach` is the model's `token_shift`.
        """
        assert self.earlier is not None
        kept, new = self.earlier[layer], x.size(1)  # (B, reach + capacity, S)
        reach = kept.size(1) - self.capacity
        if self.row_lengths is None:
            kept.narrow(1, reach + self.length, new).copy_(x)
            return kept.narrow(1, self.length, reach + new)
        rows = torch.arange(self.batch_size, device=x.device)[:, None]
        columns = self.row_lengths[:, None] + torch.arange(reach + new, device=x.device)  # (B, reach + new)
        kept[rows, columns[:, reach:]] = x
        return kept[rows, columns]

    def advance(self, new: int) -> None:
        """Counts `new` more positions as filled."""
        self.length += new
        self._slots = None
        if self.row_lengths is not None:
            self.row_lengths += new


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
        causal = mask is None and T > 1
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
    low = x.dtype == torch.bfloat16 or (x.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest")
    return low and x.device.type == "cpu"


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
        self.loss_of = next_token_loss  # or the same, compiled
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
        return self.head(self.transformer["ln_f"](x)) if targets is None else self.loss_of(self, x, targets)

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
