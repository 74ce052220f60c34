"""The tokenizer of the lecture: one id for each character."""

import json
import unicodedata
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Literal

from gptlit.errors import UserError, counted

JSON_VERSION = 1
if TYPE_CHECKING:
    import numpy as np

BLOCK = 2**16  # characters that encode_array converts at a time: they stay in the second-level cache


class CharTokenizer:
    """One id for each distinct character (A. Karpathy, "Let's build GPT"). Equal when the characters are.

    Args:
        symbols: the characters in the order of their ids.
        source: name of the text that they come from, for messages.

    Raises:
        UserError: no characters, one given twice, or something that is not a single character.
    """

    kind: Literal["char"] = "char"

    def __init__(self, symbols: str | Iterable[str], source: str = "") -> None:
        self.symbols = tuple(symbols)
        self.source = source
        self._ids = {symbol: i for i, symbol in enumerate(self.symbols)}
        if not self.symbols:
            raise UserError(f"the vocabulary{of(source)} is empty: it needs a text with at least one character")
        if any(not isinstance(symbol, str) or len(symbol) != 1 for symbol in self.symbols):
            raise UserError(f"the vocabulary{of(source)} must be single characters")
        if len(self._ids) != len(self.symbols):
            twice = next(symbol for symbol in self.symbols if self.symbols.count(symbol) > 1)
            raise UserError(f"the vocabulary{of(source)} holds {describe(twice)} twice")
        if any("\ud800" <= symbol <= "\udfff" for symbol in self.symbols):
            raise UserError(f"the vocabulary{of(source)} holds half a surrogate pair: read the text as UTF-8")

    @classmethod
    def train(cls, text: str | Iterable[str], source: str = "") -> "CharTokenizer":
        """Make the vocabulary of a text, or of its pieces: its distinct characters, sorted."""
        symbols: set[str] = set()
        for piece in [text] if isinstance(text, str) else text:
            symbols.update(piece)
        return cls(sorted(symbols), source)

    @property
    def vocab_size(self) -> int:
        """Number of characters in the vocabulary."""
        return len(self.symbols)

    def encode(self, text: str, unknown: str = "error") -> list[int]:
        """Encode a text.

        Args:
            text: to encode.
            unknown: what becomes of a character outside the vocabulary: `error` raises, `skip` leaves it out,
                `replace:C` puts the character C of the vocabulary in its place.

        Raises:
            UserError: a character is not in the vocabulary, or `unknown` is none of these.
        """
        instead = self._instead_of_unknown(unknown)
        try:
            return list(map(self._ids.__getitem__, text))
        except KeyError:
            if unknown == "error":
                raise self._unknown(text, "leave it out, or add --unknown skip or --unknown replace:C") from None
        ids = (self._ids.get(character, instead) for character in text)
        return [i for i in ids if i is not None]

    def encode_array(self, text: str) -> "np.ndarray":
        """Encode a text as `encode` does, vectorised.

        Returns:
            (N,) ids, in the narrowest of uint8, uint16 and uint32.

        Raises:
            UserError: a character is not in the vocabulary.
        """
        import numpy as np

        missing = self.vocab_size
        last = max(map(ord, self.symbols)) + 1  # stands for every code point beyond the highest one
        table = np.full(last + 1, missing, dtype=smallest_dtype(missing + 1))
        table[[ord(symbol) for symbol in self.symbols]] = np.arange(self.vocab_size)
        ids = np.empty(len(text), dtype=table.dtype)
        for start in range(0, len(text), BLOCK):
            block = text[start : start + BLOCK].encode("utf-32-le", "surrogatepass")
            found = table.take(np.frombuffer(block, dtype="<u4"), out=ids[start : start + BLOCK], mode="clip")
            if (found == missing).any():
                raise self._unknown(text, "take it out of the text, or train a new model on this text")
        return ids.astype(smallest_dtype(self.vocab_size), copy=False)

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids.

        Raises:
            UserError: an id is out of range.
        """
        return "".join([self.symbols[i] for i in checked(ids, self.vocab_size)])

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Decode ids one by one while they arrive."""
        for i in ids:
            yield self.decode([i])

    def chars_per_token(self) -> list[int]:
        """Return the number of characters of each id: always one."""
        return [1] * self.vocab_size

    def bytes_per_token(self) -> list[int]:
        """Return the length of each character in UTF-8."""
        return [len(symbol.encode()) for symbol in self.symbols]

    def to_json(self) -> str:
        """Return everything as one JSON string, for `from_json`."""
        return dump(kind=self.kind, source=self.source, symbols="".join(self.symbols))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CharTokenizer) and self.symbols == other.symbols

    def __hash__(self) -> int:
        return hash(self.symbols)

    def _instead_of_unknown(self, unknown: str) -> int | None:
        if unknown in ("error", "skip"):
            return None
        action, _, character = unknown.partition(":")
        if action != "replace" or len(character) != 1:
            raise UserError(f"--unknown is {unknown!r}: it must be error, skip or replace:C, where C is one character")
        if character not in self._ids:
            raise UserError(
                f"--unknown {unknown}: {describe(character)} is not in the vocabulary{of(self.source)} either: "
                "choose a character that is"
            )
        return self._ids[character]

    def _unknown(self, text: str, remedy: str) -> UserError:
        at = next(i for i, character in enumerate(text) if character not in self._ids)
        others = len(set(text) - self._ids.keys()) - 1
        line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
        more = f" (and {others} other character{'s' * (others > 1)} of this text)" if others else ""
        return UserError(
            f"{describe(text[at])} at line {line}, column {column}{more} is not in the vocabulary{of(self.source)} "
            f"({counted(self.vocab_size, 'character')}): {remedy}"
        )


def describe(character: str) -> str:
    """Describe a character in ASCII, e.g. `'\\xe9' (U+00E9, LATIN SMALL LETTER E WITH ACUTE)`."""
    name = unicodedata.name(character, "")
    return f"the character {character!a} (U+{ord(character):04X}{', ' * bool(name)}{name})"


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
