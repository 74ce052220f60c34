"""The forward pass for sampling: logits of the next token only, from the weights of a `GPT`.

Shapes as in `gptlit.model.gpt`: B sequences, T positions, C channels, H heads of D channels, V tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

from gptlit.errors import UserError
from gptlit.generation.engine.affine import Affine
from gptlit.generation.engine.limits import ERF_BELOW
from gptlit.generation.engine.small_weights import WeightsDtype
from gptlit.model.block import activate, rms_norm, shift_tokens
from gptlit.model.gpt import GPT
from gptlit.model.kv_cache import KVCache

Norm = Callable[[Tensor], Tensor]
Rotation = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """Layer normalisation of x (N, C)."""

    weight: Tensor
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return torch.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of one block. `fc` and `out` belong to the MLP; None without one."""

    norm_1: Norm
    qkv: Affine
    proj: Affine
    norm_2: Norm
    fc: Affine | None
    out: Affine | None


class Decoder:
    """Forward pass of a GPT for sampling: `Decoder(model)(ids)` equals `model.eval()(ids)[:, -1]`.

    Faster than the model on short inputs: no autograd, no dropout, no module calls, and the last layer runs for the
    last position only. The model's training flag is ignored. Its weights must not change while the decoder is in use.

    Args:
        model: the model that owns the weights.
        rows: rows of the input of most matmuls (sequences × positions). On a CPU the weights are copied into the
            layout that is fastest for it, where that pays; this costs the time of about ten tokens. 0 copies nothing.
        weights_dtype: type of the large matrices of the blocks, see `small_weights`; None for that of the model.
    """

    def __init__(self, model: GPT, rows: int = 0, weights_dtype: WeightsDtype | None = None) -> None:
        self.config = model.config
        parts: dict[str, Any] = dict(model.transformer.items())
        self.token_embedding: Tensor = parts["wte"].weight.detach()  # (V, C)
        self.position_embedding: Tensor | None = None  # (block_size, C)
        if "wpe" in parts:
            self.position_embedding = parts["wpe"].weight.detach()
        on_cpu = self.device.type == "cpu"
        affine = partial(Affine.of, rows=rows, dtype=weights_dtype)
        self.layers = [
            Layer(
                norm_1=norm(block.ln_1),
                qkv=affine(block.attn.c_attn),
                proj=affine(block.attn.c_proj),
                norm_2=norm(block.ln_2),
                fc=None if block.mlp is None else affine(block.mlp.c_fc),
                out=None if block.mlp is None else affine(block.mlp.c_proj),
            )
            for block in parts["h"]
        ]
        self.last_norm = norm(parts["ln_f"])
        self.lm_head = Affine.of(model.lm_head, rows)
        # As tensors: a Python number would be converted at every use.
        self.scale = torch.tensor(self.config.head_dim**-0.5).to(self.token_embedding)
        self.sqrt_half = torch.tensor(math.sqrt(0.5)).to(self.token_embedding)
        # In half precision three operations would round three times.
        half = self.dtype not in (torch.float32, torch.float64)
        self.gelu_by_erf = self.config.activation == "gelu" and on_cpu and not half
        self.cos: Tensor | None = None
        self.sin: Tensor | None = None
        if self.config.position == "rope" and self.layers:
            cos, sin = model.rope_cos.to(self.dtype), model.rope_sin.to(self.dtype)
            self.cos = torch.cat((cos, cos), -1)[:, None, None]  # (block_size, 1, 1, D)
            self.sin = torch.cat((sin, -sin), -1)[:, None, None]

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.token_embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return self.token_embedding.dtype

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """Return an empty cache on the weights' device and in their precision."""
        return KVCache(self.config, batch_size, self.device, self.dtype, capacity)

    def __call__(self, ids: Tensor, lengths: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Compute the logits (B, V) of the token after the last of ids (B, T) int64.

        Args:
            ids: token ids; T must be 1 if the cache holds tokens already.
            lengths: true lengths (B,) of rows that are padded on the right; None if all have length T.
            cache: filled with the new keys and values, and truncated to `lengths`.

        Raises:
            UserError: if the context does not fit `block_size`.
        """
        B, T = ids.shape
        start = 0 if cache is None else cache.length
        if start + T > self.config.block_size:
            raise UserError(
                f"a context of {start + T} tokens does not fit block_size {self.config.block_size}: crop it first"
            )
        if start and T > 1:
            raise ValueError("a cache that holds tokens takes one new token at a time")
        positions = None if cache is None or cache.row_lengths is None else cache.positions(T, ids.device)  # (B, T)
        mask = None if positions is None else causal_bias(positions, start + 1, self.dtype)
        x = self.embed(ids, start, positions)  # (B · T, C)
        rotation = None
        if self.cos is not None and self.sin is not None:
            rotation = rows_at(self.cos, start, T, positions), rows_at(self.sin, start, T, positions)

        for i, layer in enumerate(self.layers):
            qkv = layer.qkv(layer.norm_1(x)).view(B, T, 3, self.config.n_head, -1)  # (B, T, 3, H, D)
            q, k, v = (part.transpose(1, 2) for part in self.split(qkv, rotation))  # (B, H, T, D) each
            if cache is not None:
                k, v = cache.extend(i, k, v)  # (B, H, length + T, D)
            causal = T > 1
            # Other positions of the last layer are unused after this point, unless the MLP looks back.
            if causal and i == len(self.layers) - 1 and not self.config.token_shift:
                causal = False
                x = last_rows(x.view(B, T, -1), lengths)  # (B, C)
                q = last_rows(q.transpose(1, 2), lengths)[:, :, None]  # (B, H, 1, D)
                if lengths is not None:
                    mask = (torch.arange(T, device=ids.device) < lengths[:, None])[:, None, None]  # (B, 1, 1, T)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)  # (B, H, T, D)
            y = y.transpose(1, 2).reshape(x.shape)  # (B · T, C), or (B, C) in the last layer
            x = self.combine(layer, x, y, B, cache, i)

        if cache is not None:
            cache.advance(T)
            if lengths is not None:
                cache.truncate(lengths)
        return self.head(x if len(x) == B else last_rows(x.view(B, T, -1), lengths))

    def step(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Equals `self(ids[:, None], cache=cache)` for ids (B,): logits (B, V), in fewer and smaller operations.

        A token of a small model is about a hundred operations, and their overhead dominates. All layers' views of the
        cache are made at once, and attention of a single query is two batched matmuls.
        """
        n, B, H = cache.length, ids.size(0), self.config.n_head
        if cache.row_lengths is not None or not 0 < n < cache.capacity:
            return self(ids[:, None], cache=cache)
        new_keys, new_values = cache.keys.select(3, n).unbind(), cache.values.select(3, n).unbind()  # (B, H, D) each
        keys, values = (part.flatten(1, 2).narrow(2, 0, n + 1) for part in (cache.keys, cache.values))
        seen = zip(keys.transpose(2, 3).unbind(), values.unbind(), strict=True)  # (B · H, D, n + 1), (B · H, n + 1, D)
        rotation = None if self.cos is None or self.sin is None else (self.cos[n], self.sin[n])  # (1, 1, D) each

        x = self.embed(ids[:, None], n, None)  # (B, C)
        for i, (layer, new_key, new_value, (keys, values)) in enumerate(
            zip(self.layers, new_keys, new_values, seen, strict=True)
        ):
            qkv = layer.qkv(layer.norm_1(x)).view(B, 3, H, -1)  # (B, 3, H, D)
            q, k, v = self.split(qkv, rotation)  # (B, H, D) each
            new_key.copy_(k)
            new_value.copy_(v)
            scores = torch.bmm((q * self.scale).view(B * H, 1, -1), keys)  # (B · H, 1, n + 1)
            y = torch.bmm(scores.softmax(-1), values)  # (B · H, 1, D)
            x = self.combine(layer, x, y.view(x.shape), B, cache, i)  # (B, C)
        cache.advance(1)
        return self.head(x)

    def embed(self, ids: Tensor, start: int, positions: Tensor | None) -> Tensor:
        """Return the residual stream (B · T, C) of ids (B, T) at `start` and after, or at positions (B, T)."""
        x = F.embedding(ids, self.token_embedding)  # (B, T, C)
        if self.position_embedding is not None:
            x = x + rows_at(self.position_embedding, start, ids.size(1), positions)
        x = x.view(ids.numel(), -1)
        return rms_norm(x) if self.config.norm == "rmsnorm" else x

    def split(self, qkv: Tensor, rotation: Rotation | None) -> tuple[Tensor, ...]:
        """Split qkv (…, 3, H, D) into queries, keys and values (…, H, D); apply RoPE and QK-norm if used."""
        if rotation is None and not self.config.qk_norm:
            return qkv.unbind(-3)
        qk = qkv.narrow(-3, 0, 2)  # (…, 2, H, D)
        if rotation is not None:
            # RoPE rotates channel pairs (i, i + D/2); rolling by D/2 swaps the two halves.
            qk = torch.addcmul(qk * rotation[0], qk.roll(self.config.head_dim // 2, -1), rotation[1])
        if self.config.qk_norm:
            qk = rms_norm(qk)
        return *qk.unbind(-3), qkv.select(-3, 2)

    def combine(self, layer: Layer, x: Tensor, y: Tensor, B: int, cache: KVCache | None, i: int) -> Tensor:
        """Return the output (N, C) of block i, from its input x (N, C) and the output of attention y (N, C).

        The N positions belong to B rows; `cache` holds earlier inputs of the MLP for token shift.
        """
        x = self.join(x, y, layer.proj)
        if layer.fc is None or layer.out is None:
            return x
        h = layer.norm_2(x)  # (N, C)
        if reach := self.config.token_shift:
            h = shift_tokens(h.view(B, -1, h.size(1)), reach, self.config.shifted_channels, cache, i).view(h.shape)
        h = layer.fc(h)  # (N, mlp_ratio · C)
        if not self.gelu_by_erf or h.numel() > ERF_BELOW:
            return self.join(x, activate(h, self.config.activation), layer.out)
        # gelu(h) = ½ h (1 + erf(h / √2)); the factor ½ is free in the matmul that follows.
        return self.join(x, torch.addcmul(h, h, torch.erf(h * self.sqrt_half)), layer.out, 0.5)

    def join(self, x: Tensor, h: Tensor, affine: Affine, factor: float = 1.0) -> Tensor:
        """Add factor · h W + b to x in place; without residual connections, return it instead of x."""
        if not self.config.residual:
            return affine(h * factor)
        affine.add_to(x, h, factor)
        return x

    def head(self, x: Tensor) -> Tensor:
        """Return the logits (B, V) of the residual stream (B, C)."""
        logits = self.lm_head(self.last_norm(x))
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)


def norm(module: nn.Module | None) -> Norm:
    """Return the function of a norm module, without the overhead of a module call."""
    if isinstance(module, nn.LayerNorm):
        return LayerNorm(module.weight.detach(), None if module.bias is None else module.bias.detach(), module.eps)
    return (lambda x: x) if module is None or isinstance(module, nn.Identity) else rms_norm


def causal_bias(positions: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Return the attention bias (B, 1, 1, count) of queries at positions (B, 1) over the first `count` keys.

    0 up to the query's own position, -∞ after it.
    """
    # Rows start at multiples of 8 elements: attention kernels on a GPU would copy other layouts in every layer.
    padded = (len(positions), -(-count // 8) * 8)
    bias = torch.full(padded, -math.inf, dtype=dtype, device=positions.device)[:, :count]
    seen = torch.arange(count, device=positions.device) <= positions  # (B, count)
    return bias.masked_fill_(seen, 0)[:, None, None]


def rows_at(table: Tensor, start: int, count: int, positions: Tensor | None) -> Tensor:
    """Return rows start … start + count of a table (count, …), or the rows at positions (B, T) as (B, T, …)."""
    return table.narrow(0, start, count) if positions is None else table[positions]


def last_rows(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Return the last position (B, …) of each row of x (B, T, …), or position `lengths - 1` (B,) if given."""
    if lengths is None:
        return x[:, -1]
    return x[torch.arange(x.size(0), device=x.device), lengths - 1]
