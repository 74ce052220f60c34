"""From text to batches: `RandomChunks` (step number -> batch), the token file, and the DataModule around them."""

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
from gptlit.data.datamodule import TextDataModule
from gptlit.data.encode import EncodedText, TextSpec, encode_text
from gptlit.data.tokens import StoredTokens, TokenFile

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
