"""gptlit: the GPT of the lecture "Let's build GPT", as a PyTorch Lightning application.

The public names are loaded on first use, so that `import gptlit` (and `gptlit --version`) does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from gptlit.config import GPTConfig
    from gptlit.data import RandomChunks, TextDataModule
    from gptlit.errors import UserError
    from gptlit.kv_cache import KVCache
    from gptlit.model import GPT
    from gptlit.module import LitGPT
    from gptlit.optim import MuonAdamW, OptimizerConfig, ScheduleConfig
    from gptlit.sampling import Sampling, generate
    from gptlit.tokenizer import BPETokenizer, CharTokenizer

_HOMES = {
    "BPETokenizer": "tokenizer",
    "CharTokenizer": "tokenizer",
    "GPT": "model",
    "GPTConfig": "config",
    "KVCache": "kv_cache",
    "LitGPT": "module",
    "MuonAdamW": "optim",
    "OptimizerConfig": "optim",
    "RandomChunks": "data",
    "Sampling": "sampling",
    "ScheduleConfig": "optim",
    "TextDataModule": "data",
    "UserError": "errors",
    "generate": "sampling",
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
    "generate",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'gptlit' has no attribute {name!r}")
    return getattr(import_module(f"gptlit.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
