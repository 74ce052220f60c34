"""The architecture: every switch of the transformer, and which settings it takes."""

from dataclasses import dataclass
from typing import Literal

from gptlit.errors import UserError

REGULARISATION = ("dropout", "attention_dropout", "embedding_dropout", "token_noise")
"""Fields of `GPTConfig` that act in training only: they may change at any time and leave the weights as they are."""


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

    def __post_init__(self) -> None:  # noqa: C901
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
        for name in REGULARISATION:
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
        return any(getattr(self, name) for name in REGULARISATION)

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.n_embd // self.n_head

    @property
    def shifted_channels(self) -> int:
        """Channels of an MLP's input that come from earlier positions."""
        return self.n_embd // 4 * self.token_shift
