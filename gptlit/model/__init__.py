"""The transformer: token ids (B, T) -> logits (B, T, V). Needs torch only."""

from gptlit.model.config import GPTConfig
from gptlit.model.gpt import GPT
from gptlit.model.kv_cache import KVCache

__all__ = ["GPT", "GPTConfig", "KVCache"]
