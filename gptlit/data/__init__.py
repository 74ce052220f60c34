"""From text to batches: corpora, token files, `RandomChunks` (step -> batch) and the DataModule.

The public names are loaded on first use, so that `gptlit.data.corpus` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptlit.data.chunks import (
        IGNORED,
        Batch,
        LossEstimate,
        RandomChunks,
        Tokens,
        TrainingBatches,
        ValidationWindows,
        share_of_batch,
    )
    from gptlit.data.corpus.load import TextSpec
    from gptlit.data.datamodule import TextDataModule
    from gptlit.data.encode import EncodedText, encode_text
    from gptlit.data.tokens import StoredTokens, TokenFile

_HOMES = {
    "IGNORED": "chunks",
    "Batch": "chunks",
    "EncodedText": "encode",
    "LossEstimate": "chunks",
    "RandomChunks": "chunks",
    "StoredTokens": "tokens",
    "TextDataModule": "datamodule",
    "TextSpec": "corpus.load",
    "TokenFile": "tokens",
    "Tokens": "chunks",
    "TrainingBatches": "chunks",
    "ValidationWindows": "chunks",
    "encode_text": "encode",
    "share_of_batch": "chunks",
}
__all__ = [
    "IGNORED",
    "Batch",
    "EncodedText",
    "LossEstimate",
    "RandomChunks",
    "StoredTokens",
    "TextDataModule",
    "TextSpec",
    "TokenFile",
    "Tokens",
    "TrainingBatches",
    "ValidationWindows",
    "encode_text",
    "share_of_batch",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'gptlit.data' has no attribute {name!r}")
    return getattr(import_module(f"gptlit.data.{_HOMES[name]}"), name)
