"""The model read for sampling: logits of the next token alone, from the same weights laid out for short inputs.

Shapes as in `gptlit.model.gpt`: B sequences, T positions, C channels, H heads of D channels, V symbols.
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
from gptlit.model.gpt import GPT, activate, rms_norm, shift_tokens
from gptlit.model.kv_cache import KVCache

Norm = Callable[[Tensor], Tensor]
ERF_PAYS_BELOW = 4096  # numbers: torch's GELU takes 6 µs to begin on a CPU, and is then the faster one by far


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
    """The weights of one block; `fc` and `out` are the MLP's, None without one."""

    norm_1: Norm
    qkv: Affine
    proj: Affine
    norm_2: Norm
    fc: Affine | None
    out: Affine | None


class Decoder:
    """A GPT's forward pass for sampling: `Decoder(model)(ids)` is `model.eval()(ids)[:, -1]`, faster on short inputs.

    It has no gradients, no dropout and no module calls, and runs the last layer for the last position only. The
    model's training flag is neither read nor touched; its weights must not change while the decoder is in use.

    Args:
        model: whose weights are read.
        rows: of how many rows most products will be. Where that helps, on a CPU, the weights are laid out for them,
            which takes their memory once more, and the time of some ten tokens. 0 leaves them where they are.
    """

    def __init__(self, model: GPT, rows: int = 0) -> None:
        self.config = model.config
        parts: dict[str, Any] = dict(model.transformer.items())
        self.tokens: Tensor = parts["wte"].weight.detach()  # (V, C)
        self.places: Tensor | None = parts["wpe"].weight.detach() if "wpe" in parts else None  # (block_size, C)
        on_cpu = self.tokens.device.type == "cpu"
        affine = partial(Affine.of, rows=rows)
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
        self.lm_head = affine(model.lm_head)
        # Factors as tensors: a number would be made one for every product.
        self.scale = torch.tensor(self.config.head_dim**-0.5).to(self.tokens)
        self.sqrt_half = torch.tensor(math.sqrt(0.5)).to(self.tokens)
        # Of one position, on a CPU, torch's own GELU takes longer than a matrix product of a small model. In a coarser
        # type than float32, three operations would round between each other.
        coarse = self.tokens.dtype not in (torch.float32, torch.float64)
        self.doubled_gelu = self.config.activation == "gelu" and on_cpu and not coarse
        self.cos: Tensor | None = None
        self.sin: Tensor | None = None
        if self.config.position == "rope" and self.layers:
            cos, sin = model.rope_cos.to(self.tokens.dtype), model.rope_sin.to(self.tokens.dtype)
            self.cos = torch.cat((cos, cos), -1)[:, None, None]  # (block_size, 1, 1, D)
            self.sin = torch.cat((sin, -sin), -1)[:, None, None]

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """An empty cache on the weights' device, in their precision."""
        return KVCache(self.config, batch_size, self.tokens.device, self.tokens.dtype, capacity)

    def __call__(self, ids: Tensor, lengths: Tensor | None = None, cache: KVCache | None = None) -> Tensor:  # noqa: C901
        """Logits (B, V) of the token after the last of ids (B, T) int64.

        An empty cache is filled on the way; with one that holds tokens already, T must be 1. Rows padded on the right
        have their true `lengths` (B,), and the cache is told of them.

        Raises:
            UserError: when the context does not fit `block_size`.
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
        mask = None if positions is None else causal_bias(positions, start + 1, self.tokens.dtype)

        x = F.embedding(ids, self.tokens)  # (B, T, C)
        if self.places is not None:
            x = x + rows_at(self.places, start, T, positions)
        x = x.view(B * T, -1)  # (B · T, C)
        if self.config.norm == "rmsnorm":
            x = rms_norm(x)
        rotation = None
        if self.cos is not None and self.sin is not None:
            rotation = rows_at(self.cos, start, T, positions), rows_at(self.sin, start, T, positions)

        for i, layer in enumerate(self.layers):
            qkv = layer.qkv(layer.norm_1(x)).view(B, T, 3, self.config.n_head, -1)  # (B, T, 3, H, D)
            q, k, v = (part.transpose(1, 2) for part in self.split(qkv, rotation))  # (B, H, T, D) each
            if cache is not None:
                k, v = cache.extend(i, k, v)  # (B, H, length + T, D)
            causal = T > 1
            # Nobody reads the other positions of the last layer any more, but for an MLP that looks back.
            if causal and i == len(self.layers) - 1 and not self.config.token_shift:
                causal = False
                x = last_rows(x.view(B, T, -1), lengths)  # (B, C)
                q = last_rows(q.transpose(1, 2), lengths)[:, :, None]  # (B, H, 1, D)
                if lengths is not None:
                    mask = (torch.arange(T, device=ids.device) < lengths[:, None])[:, None, None]  # (B, 1, 1, T)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)  # (B, H, T, D)
            y = y.transpose(1, 2).reshape(x.shape)  # (B · T, C), or (B, C) at the end
            x = self.combine(layer, x, y, B, cache, i)

        if cache is not None:
            cache.advance(T)
            if lengths is not None:
                cache.truncate(lengths)
        return self.head(x if len(x) == B else last_rows(x.view(B, T, -1), lengths))

    def step(self, ids: Tensor, cache: KVCache) -> Tensor:
        """`self(ids[:, None], cache=cache)` for ids (B,): logits (B, V), with as few and small operations as possible.

        One token of a small model is over in the time of a hundred operations, so each of them counts; all layers'
        views of the cache are made at once, and attention of one query is two products.
        """
        n, B, H = cache.length, ids.size(0), self.config.n_head
        if cache.row_lengths is not None or not 0 < n < cache.capacity:
            return self(ids[:, None], cache=cache)
        new_keys, new_values = cache.keys.select(3, n).unbind(), cache.values.select(3, n).unbind()  # (B, H, D) each
        keys, values = (kept.flatten(1, 2).narrow(2, 0, n + 1) for kept in (cache.keys, cache.values))
        seen = zip(keys.transpose(2, 3).unbind(), values.unbind(), strict=True)  # (B · H, D, n + 1), (B · H, n + 1, D)
        rotation = None if self.cos is None or self.sin is None else (self.cos[n], self.sin[n])  # (1, 1, D) each

        x = F.embedding(ids, self.tokens)  # (B, C)
        if self.places is not None:
            x = x + self.places[n]
        if self.config.norm == "rmsnorm":
            x = rms_norm(x)
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

    def split(self, qkv: Tensor, rotation: tuple[Tensor, Tensor] | None) -> tuple[Tensor, ...]:
        """Queries, keys and values (…, H, D) of qkv (…, 3, H, D), rotated and normalised where the model does."""
        if rotation is None and not self.config.qk_norm:
            return qkv.unbind(-3)
        qk = qkv.narrow(-3, 0, 2)  # (…, 2, H, D)
        if rotation is not None:
            # Channel pair (i, i + D/2) turns; rolling by D/2 brings each channel its partner.
            qk = torch.addcmul(qk * rotation[0], qk.roll(self.config.head_dim // 2, -1), rotation[1])
        if self.config.qk_norm:
            qk = rms_norm(qk)
        return *qk.unbind(-3), qkv.select(-3, 2)

    def combine(self, layer: Layer, x: Tensor, y: Tensor, B: int, cache: KVCache | None, i: int) -> Tensor:
        """The output (N, C) of block number i from its input x (N, C) and what attention gathered, y (N, C); the N
        positions belong to B rows, and `cache` knows those before them.
        """
        x = self.join(x, y, layer.proj)
        if layer.fc is None or layer.out is None:
            return x
        h = layer.norm_2(x)  # (N, C)
        if reach := self.config.token_shift:
            h = shift_tokens(h.view(B, -1, h.size(1)), reach, self.config.shifted_channels, cache, i).view(h.shape)
        h = layer.fc(h)  # (N, mlp_ratio · C)
        if not self.doubled_gelu or h.numel() > ERF_PAYS_BELOW:
            return self.join(x, activate(h, self.config.activation), layer.out)
        # gelu(h) = ½ h (1 + erf(h / √2)); the half costs nothing in the product behind it.
        return self.join(x, torch.addcmul(h, h, torch.erf(h * self.sqrt_half)), layer.out, 0.5)

    def join(self, x: Tensor, h: Tensor, affine: Affine, factor: float = 1.0) -> Tensor:
        """Adds factor · h W + b to x, in place; in a model without residual connections, that instead of x."""
        if not self.config.residual:
            return affine(h * factor)
        affine.add_to(x, h, factor)
        return x

    def head(self, x: Tensor) -> Tensor:
        """Logits (B, V) of the residual stream (B, C)."""
        logits = self.lm_head(self.last_norm(x))
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)


def norm(module: nn.Module | None) -> Norm:
    """The function that a norm module computes, without the cost of calling a module."""
    if isinstance(module, nn.LayerNorm):
        return LayerNorm(module.weight.detach(), None if module.bias is None else module.bias.detach(), module.eps)
    return (lambda x: x) if module is None or isinstance(module, nn.Identity) else rms_norm


def causal_bias(positions: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """What the scores of queries at positions (B, 1) for the first `count` keys become greater by, (B, 1, 1, count):
    0 up to the query's own position, and -∞ behind it.
    """
    # In memory where each row begins at a multiple of 8 numbers: a GPU's attention would copy others in every layer.
    padded = (len(positions), -(-count // 8) * 8)
    bias = torch.full(padded, -math.inf, dtype=dtype, device=positions.device)[:, :count]
    seen = torch.arange(count, device=positions.device) <= positions  # (B, count)
    return bias.masked_fill_(seen, 0)[:, None, None]


def rows_at(table: Tensor, start: int, count: int, positions: Tensor | None) -> Tensor:
    """Rows start … start + count of a table, (count, …), or the rows at positions (B, T), (B, T, …)."""
    return table.narrow(0, start, count) if positions is None else table[positions]


def last_rows(x: Tensor, lengths: Tensor | None) -> Tensor:
    """The last position of each row of x (B, T, …): (B, …), counting `lengths` (B,) positions where they are given."""
    if lengths is None:
        return x[:, -1]
    return x[torch.arange(x.size(0), device=x.device), lengths - 1]
