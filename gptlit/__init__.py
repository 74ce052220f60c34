"""gptlit: the GPT of the lecture "Let's build GPT", as a PyTorch Lightning application.

The public names are loaded on first use, so that `import gptlit` (and `gptlit --version`) does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from gptlit.version import __version__

if TYPE_CHECKING:
    from gptlit.data import RandomChunks, TextDataModule
    from gptlit.errors import UserError
    from gptlit.generation import Sampling, generate, next_token_probabilities
    from gptlit.model import GPT, GPTConfig, KVCache
    from gptlit.optim import MuonAdamW, OptimizerConfig, ScheduleConfig
    from gptlit.tokenizer import BPETokenizer, CharTokenizer
    from gptlit.training import LitGPT

_HOMES = {
    "BPETokenizer": "tokenizer",
    "CharTokenizer": "tokenizer",
    "GPT": "model",
    "GPTConfig": "model",
    "KVCache": "model",
    "LitGPT": "training",
    "MuonAdamW": "optim",
    "OptimizerConfig": "optim",
    "RandomChunks": "data",
    "Sampling": "generation",
    "ScheduleConfig": "optim",
    "TextDataModule": "data",
    "UserError": "errors",
    "generate": "generation",
    "next_token_probabilities": "generation",
}
__all__ = [
    "GPT",
    "BPETokenizer",
    "CharTokenizer",
    "GPTConfig",
    "KVCache",
    "LitGPT",
    "MuonAdamW",
    "OptimizerConfig",
    "RandomChunks",
    "Sampling",
    "ScheduleConfig",
    "TextDataModule",
    "UserError",
    "__version__",
    "generate",
    "next_token_probabilities",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'gptlit' has no attribute {name!r}")
    return getattr(import_module(f"gptlit.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
