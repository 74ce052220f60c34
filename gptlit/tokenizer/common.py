"""What both kinds of tokenizer share."""

import json
from collections.abc import Iterable

from gptlit.errors import UserError

JSON_VERSION = 1


def of(source: str) -> str:
    return f" of {source}" if source else ""


def dump(**fields: object) -> str:
    return json.dumps({"version": JSON_VERSION, **fields}, separators=(",", ":"))


def checked(ids: Iterable[int], vocab_size: int) -> list[int]:
    ids = list(ids)
    for i in (min(ids), max(ids)) if ids else ():
        if not 0 <= i < vocab_size:
            raise UserError(f"token id {int(i)} is outside the vocabulary: ids run from 0 to {vocab_size - 1}")
    return ids


def smallest_dtype(vocab_size: int) -> str:
    return "uint8" if vocab_size <= 2**8 else "uint16" if vocab_size <= 2**16 else "uint32"
