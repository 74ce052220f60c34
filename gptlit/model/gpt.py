"""The transformer: token ids (B, T) -> logits (B, T, V). Its parts are switches of `GPTConfig`.

Shapes: B sequences, T positions, C = n_embd channels, H = n_head heads of D = C / H channels, V = vocab_size tokens.
"""

import math
from collections.abc import Callable
from typing import Self, cast

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gptlit.errors import UserError
from gptlit.model.block import Block, make_norm, rms_norm
from gptlit.model.config import GPTConfig
from gptlit.model.initialize import initialize
from gptlit.model.kv_cache import KVCache
from gptlit.model.loss import cross_entropy
from gptlit.model.noise import with_noise
from gptlit.model.rope import rope_angles


class GPT(nn.Module):
    """Decoder-only transformer over token ids.

    Called with ids (B, T) int64 it returns logits (B, T, V); with `targets` it returns the mean loss in nats.
    `torch.export.export` and `torch.jit.trace` take it in evaluation mode, without a cache.

    On the meta device it has shapes only. `to_empty` allocates the weights and computes the tables of RoPE, which no
    checkpoint holds; after `load_state_dict(…, assign=True)` call `make_rope_tables`.

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
        self.make_rope_tables()
        initialize(self, config)

    def make_rope_tables(self, device: torch.device | None = None) -> None:
        """Compute the cosines and sines of all positions, (block_size, D / 2) each, as buffers; none without RoPE.

        Args:
            device: of the buffers; None is torch's default device.
        """
        if self.config.position != "rope" or not self.config.n_layer:
            return
        positions = torch.arange(self.config.block_size, device=device)
        cos, sin = rope_angles(positions, self.config.head_dim, self.config.rope_base, torch.float32)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Compute the tables of RoPE once they leave the meta device: `to_empty` would leave them uninitialised."""
        missing = "rope_cos" in self._buffers and self.rope_cos.is_meta
        super()._apply(fn, recurse)
        if missing and not self.rope_cos.is_meta:
            self.make_rope_tables(self.rope_cos.device)
        return self

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
            if x.device.type not in ("cpu", "meta") and torch.is_autocast_enabled(x.device.type):
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
    """Return the model on the meta device, for names and shapes of its parameters: nothing is allocated."""
    with torch.device("meta"):
        return GPT(config)
