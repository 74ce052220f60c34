"""Text to token ids and back: characters, as in the lecture, or byte-level BPE through the `tokenizers` library.

Both are lossless (`decode(encode(text)) == text`) and are stored as one JSON string, so that a checkpoint contains its
vocabulary.
"""

import json

from gptlit.errors import UserError
from gptlit.tokenizer.bpe import BPETokenizer
from gptlit.tokenizer.characters import JSON_VERSION, CharTokenizer

__all__ = ["BPETokenizer", "CharTokenizer", "Tokenizer", "from_json"]

Tokenizer = CharTokenizer | BPETokenizer


def from_json(text: str) -> Tokenizer:
    """Read the tokenizer that `to_json` wrote.

    Raises:
        UserError: it is something else.
    """
    try:
        fields = json.loads(text)
        kind, version, source = fields["kind"], fields["version"], fields["source"]
        if version > JSON_VERSION:
            raise UserError(f"this tokenizer has format {version}, newer than {JSON_VERSION}: use a newer gptlit")
        if kind == "char":
            return CharTokenizer(fields["symbols"], source)
        if kind == "bpe":
            return BPETokenizer(fields["definition"], source)
    except UserError:
        raise
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"not a gptlit tokenizer: {type(error).__name__}: {error}") from error
    raise UserError(f"this tokenizer is of the kind {kind!r}: gptlit knows 'char' and 'bpe'")
