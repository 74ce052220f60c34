"""The architecture: every switch of the transformer, with its range."""

from dataclasses import dataclass
from typing import Literal

from gptlit.errors import UserError, require

REGULARISATION = ("dropout", "attention_dropout", "embedding_dropout", "token_noise")
"""Fields of `GPTConfig` that act in training only; weights trained with one value fit any other."""


@dataclass(frozen=True)
class GPTConfig:
    """Architecture of a `GPT`: everything that determines its function, except the weights.

    The defaults are NanoChat's architecture, called the modern dialect. `configs/nanogpt.yaml` and `configs/lecture/`
    have the settings of nanoGPT and of the lecture "Let's build GPT".

    Raises:
        UserError: for a value out of range or a combination that does not exist.
    """

    vocab_size: int = 0
    """Size of the vocabulary, in tokens; 0 takes it from the tokenizer."""
    block_size: int = 64
    """Maximum context length, in tokens."""
    n_layer: int = 4
    """Number of transformer blocks; 0 leaves only embedding and head, which is the bigram model."""
    n_head: int = 4
    """Attention heads per block; must divide n_embd."""
    n_embd: int = 128
    """Channels of the residual stream."""
    dropout: float = 0.0
    """Dropout of the outputs of attention and MLP (on a CPU rounded to a multiple of 1/256)."""
    attention_dropout: float = 0.0
    """Dropout of the attention weights."""
    embedding_dropout: float = 0.0
    """Dropout of the embedding."""
    token_noise: float = 0.0
    """Probability that an input token is replaced by a random one in training, against overfitting (Xie et al. 2017,
    arXiv:1703.02573)."""
    bias: bool = False
    """Biases in projections and LayerNorm, and in the head if it is not tied."""
    qkv_bias: bool = False
    """Biases in the query, key and value projections: GPT-2 has them, the lecture does not."""
    position: Literal["none", "learned", "rope"] = "rope"
    """Position information: none, a learned table, or rotary embedding (RoFormer, arXiv:2104.09864)."""
    rope_base: float = 10_000.0
    """Base of the rotary angles; 1,000 suits contexts of a few hundred characters."""
    norm: Literal["none", "layernorm", "rmsnorm"] = "rmsnorm"
    """Normalisation before attention, before the MLP and before the head. rmsnorm has no weights, and is applied after
    the embedding too (arXiv:1910.07467)."""
    residual: bool = True
    """Residual connections: attention and MLP add to their input (true) or replace it (false)."""
    mlp_ratio: int = 4
    """Width of the MLP as a multiple of n_embd; 0 removes the MLP."""
    activation: Literal["relu", "gelu", "gelu_tanh", "relu2"] = "relu2"
    """Non-linearity of the MLP. relu2 is max(x, 0)² (Primer, arXiv:2109.08668)."""
    token_shift: int = 0
    """Number of earlier positions, 0 to 3, that each provide a quarter of the MLP's input channels; the other channels
    are the position's own (BlinkDL's time shift, https://github.com/BlinkDL/minGPT-tuned)."""
    qk_norm: bool = True
    """RMS normalisation of queries and keys (arXiv:2010.04245)."""
    tie_weights: bool = False
    """Share the weights of token embedding and head (arXiv:1608.05859)."""
    logit_softcap: float | None = None
    """If given, logits become c·tanh(logits / c) (Gemma 2, arXiv:2408.00118)."""
    init: Literal["torch", "normal", "scaled", "zero"] = "zero"
    """Initial weights; see the table at `gptlit.model.initialize.initialize`."""

    def __post_init__(self) -> None:
        for name in ("block_size", "n_head", "n_embd"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("vocab_size", "n_layer", "mlp_ratio"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in REGULARISATION:
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "at least 0 and less than 1")
        require(self.rope_base > 1, "rope_base", self.rope_base, "above 1")
        require(0 <= self.token_shift <= 3, "token_shift", self.token_shift, "0 (off), 1, 2 or 3")
        cap = self.logit_softcap
        require(cap is None or cap > 0, "logit_softcap", cap, "above 0, or null")
        if self.n_embd % self.n_head:
            raise UserError(
                f"is {self.n_embd}, which is not a multiple of n_head ({self.n_head}): change one of them", "n_embd"
            )
        if self.position == "rope" and self.head_dim % 2:
            raise UserError(
                f"is rope, which rotates pairs of channels, but a head has {self.head_dim} channels "
                "(n_embd / n_head): choose an even number",
                "position",
            )
        if self.token_shift and (self.mlp_ratio == 0 or self.n_embd < 4):
            raise UserError(
                f"is {self.token_shift}, which needs an MLP (mlp_ratio above 0) and 4 channels (n_embd) or more",
                "token_shift",
            )

    @property
    def draws_in_training(self) -> bool:
        """Whether a training step uses random numbers."""
        return any(getattr(self, name) for name in REGULARISATION)

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.n_embd // self.n_head

    @property
    def shifted_channels(self) -> int:
        """Channels of an MLP's input that come from earlier positions."""
        return self.n_embd // 4 * self.token_shift
