"""Byte-level byte-pair encoding through the `tokenizers` library, which is imported when needed."""

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gptlit.errors import UserError, require
from gptlit.tokenizer.characters import checked, dump, of, smallest_dtype

if TYPE_CHECKING:
    import numpy as np
    import tokenizers

SLICE = 2**16  # characters that one thread of the library takes
LONGEST_WORD = 1_000  # characters; learning takes time quadratic in the longest word, so longer ones are cut

# Places where a text may be cut and a byte-level BPE still finds the same tokens: before a single space, and after a
# single newline, between words. The patterns of GPT-2, Llama 3 and GPT-4 all end a word there.
SAFE_CUT = re.compile(r"(?<=\S)(?= \w)|(?<=\S\n)(?=\w)")

# GPT-2's words, with combining marks and joiners kept at their letters: without them every vowel sign of Hindi, Tamil
# or vocalised Arabic ends a word, and no token can span it.
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}[\p{L}\p{M}\x{200C}\x{200D}]*| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT4 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CONTRACTIONS = ("'(?i:[sdmt]|ll|ve|re)|", "(?i:'s|'t|'re|'ve|'m|'ll|'d)|")  # as GPT-4 and as Llama 3 write them
WORD_PATTERNS = frozenset(
    {
        WORDS,
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2
        *(start + GPT4 for start in CONTRACTIONS),
        *(start + GPT4.replace("{1,3}", "") for start in CONTRACTIONS),  # Qwen
    }
)


def _byte_alphabet() -> dict[str, int]:
    """Return GPT-2's spelling of bytes in JSON: printable Latin-1 as itself, the others from U+0100 on, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_alphabet()


class BPETokenizer:
    """Byte-level byte-pair encoding (GPT-2; Radford et al., 2019): merges over UTF-8 bytes, so no text is unknown.

    Everything that would change a text is switched off: normalizer, prefix space, truncation, padding, dropout, and
    template tokens around the text. `train` and `from_file` make one.

    Args:
        definition: content of a `tokenizer.json`.
        source: name of the text or file that it comes from, for messages.

    Raises:
        UserError: it is not a byte-level BPE.
    """

    kind: Literal["bpe"] = "bpe"

    def __init__(self, definition: dict[str, Any], source: str = "") -> None:
        self.source = source
        self._bpe = _lossless(definition, source)
        vocabulary = self._bpe.get_vocab(with_added_tokens=True)
        added = {token.content for token in self._bpe.get_added_tokens_decoder().values()}
        self._bytes = [b""] * (max(vocabulary.values()) + 1)  # id -> bytes; gaps between ids are empty
        for token, i in vocabulary.items():
            # an added token is written as it reads; the others in GPT-2's alphabet of 256 printable characters
            self._bytes[i] = token.encode() if token in added else bytes(BYTE_OF_CHARACTER[c] for c in token)
        probe = "".join(map(chr, range(0x250))) + " \n\n  a  1 23\t\r\n'Ll e\u0301 \u65e5\u672c \U0001f600 "
        if self.decode(self.encode(probe)) != probe:
            raise UserError(
                f"the tokenizer{of(source)} does not give back every text: use a byte-level BPE like GPT-2's"
            )
        self.splits_words = splits_words(self.definition)

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, source: str = "", show_progress: bool = False
    ) -> "BPETokenizer":
        """Learn merges until there are `vocab_size` tokens, or no pair is left to merge. Deterministic.

        Args:
            texts: to learn from, cut between words.
            vocab_size: number of tokens, at least 256.
            source: name of the text, for messages.
            show_progress: show the library's bars.

        Raises:
            UserError: `vocab_size` is below 256, the number of bytes.
        """
        require(
            vocab_size >= 256, "vocab_size", vocab_size, "256 or more for a byte-level BPE, one token for each byte"
        )
        library = _tokenizers()
        bpe = library.Tokenizer(library.models.BPE())
        bpe.pre_tokenizer = library.pre_tokenizers.Sequence(
            [
                library.pre_tokenizers.Split(library.Regex(WORDS), "isolated"),
                library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        bpe.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size,
            show_progress=show_progress,
            special_tokens=[],
            initial_alphabet=sorted(BYTE_OF_CHARACTER),
        )
        pieces = (part for text in ([texts] if isinstance(texts, str) else texts) for part in without_long_words(text))
        bpe.train_from_iterator(pieces, trainer)
        return cls(json.loads(bpe.to_str()), source)

    @classmethod
    def from_file(cls, path: str | Path) -> "BPETokenizer":
        """Read a `tokenizer.json`, as the `tokenizers` library and `transformers` write it.

        Raises:
            UserError: it cannot be read, or is not a byte-level BPE.
        """
        try:
            definition = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"cannot read the tokenizer {path}: {error.strerror}") from error
        except ValueError as error:
            raise UserError(f"{path} is not a tokenizer.json: {error}") from error
        return cls(definition, str(path))

    @property
    def vocab_size(self) -> int:
        """Number of ids: the highest one plus one."""
        return len(self._bytes)

    def encode(self, text: str, unknown: str = "error") -> list[int]:
        """Encode a text; `unknown` has no effect, since no text is unknown."""
        return self._bpe.encode(text, add_special_tokens=False).ids

    def encode_array(self, text: str) -> "np.ndarray":
        """Encode a text as `encode` does, on all cores where it may be cut.

        Returns:
            (N,) ids, in the narrowest of uint8, uint16 and uint32.
        """
        import numpy as np

        pieces = list(slices(text)) if self.splits_words else [text]
        dtype = smallest_dtype(self.vocab_size)
        found = [np.empty(0, dtype)]
        for start in range(0, len(pieces), 64):
            encodings = self._bpe.encode_batch_fast(pieces[start : start + 64], add_special_tokens=False)
            found += [np.array(encoding.ids, dtype) for encoding in encodings]
        return np.concatenate(found)

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids; bytes that are not UTF-8 become U+FFFD.

        Raises:
            UserError: an id is out of range.
        """
        return b"".join([self._bytes[i] for i in checked(ids, self.vocab_size)]).decode("utf-8", "replace")

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Decode ids while they arrive; the bytes of an incomplete character wait for the rest of it."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for i in ids:
            if piece := decoder.decode(self._bytes[checked([i], self.vocab_size)[0]]):
                yield piece
        if rest := decoder.decode(b"", final=True):
            yield rest

    def chars_per_token(self) -> list[int]:
        """Return how many characters begin in each token: their sum over a text is its number of characters."""
        return [sum(byte & 0xC0 != 0x80 for byte in token) for token in self._bytes]  # not 10xxxxxx: a first byte

    def bytes_per_token(self) -> list[int]:
        """Return the length of each token in UTF-8."""
        return [len(token) for token in self._bytes]

    @property
    def definition(self) -> dict[str, Any]:
        """The content of its `tokenizer.json`, which the `tokenizers` library and `transformers` read."""
        return json.loads(self._bpe.to_str())

    def to_json(self) -> str:
        """Return everything as one JSON string, for `from_json`."""
        return dump(kind=self.kind, source=self.source, definition=self.definition)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BPETokenizer) and self._bpe.to_str() == other._bpe.to_str()

    def __hash__(self) -> int:
        return hash(tuple(self._bytes))


def _tokenizers() -> Any:
    """The library, which takes a tenth of a second to import."""
    import tokenizers
    import tokenizers.decoders
    import tokenizers.models
    import tokenizers.pre_tokenizers
    import tokenizers.trainers

    return tokenizers


def slices(text: str, size: int = SLICE) -> Iterator[str]:
    """Yield a text in pieces of a little over `size` characters, cut where a BPE finds the same tokens."""
    start = 0
    while start < len(text):
        cut = SAFE_CUT.search(text, start + size)
        end = cut.start() if cut else len(text)
        yield text[start:end]
        start = end


def without_long_words(text: str) -> Iterator[str]:
    """Yield a text, cut inside words of more than LONGEST_WORD characters; only for learning."""
    start = 0
    for word in re.finditer(rf"\S{{{LONGEST_WORD + 1},}}", text):
        for cut in range(word.start() + LONGEST_WORD, word.end(), LONGEST_WORD):
            yield text[start:cut]
            start = cut
    yield text[start:]


def splits_words(definition: dict[str, Any]) -> bool:
    """Return whether a BPE is known to find the same tokens in a text that is cut at SAFE_CUT.

    True for pre-tokenizers that split words as GPT-2, GPT-4, Llama 3 or Qwen do. A BPE without such a pattern may
    merge across spaces.
    """
    part = definition.get("pre_tokenizer") or {}
    parts = part.get("pretokenizers", [part])
    kinds = {part.get("type") for part in parts}
    patterns = [part.get("pattern", {}).get("Regex", "") for part in parts if part.get("type") == "Split"]
    by_bytes = any(part.get("type") == "ByteLevel" and part.get("use_regex", True) for part in parts)
    known = all(pattern in WORD_PATTERNS for pattern in patterns)
    return kinds <= {"ByteLevel", "Digits", "Split"} and known and (by_bytes or bool(patterns))


def _lossless(definition: dict[str, Any], source: str) -> "tokenizers.Tokenizer":
    """Make a tokenizer of the library from a `tokenizer.json`, with everything that changes text switched off."""
    try:
        added = [{**token, "lstrip": False, "rstrip": False} for token in definition.get("added_tokens", [])]
        words = definition["model"]["vocab"].keys() - {token["content"] for token in added}
        byte_level = definition["model"]["type"] == "BPE" and words >= BYTE_OF_CHARACTER.keys() == set("".join(words))
    except (AttributeError, KeyError, TypeError):
        byte_level = False
    if not byte_level:
        raise UserError(f"the tokenizer{of(source)} is not a byte-level BPE like GPT-2's: only that kind loses no text")
    definition = {
        **definition,
        **dict.fromkeys(("normalizer", "truncation", "padding", "post_processor")),
        "model": {**definition["model"], "dropout": None},
        "pre_tokenizer": _without_prefix_space(definition.get("pre_tokenizer")),
        "added_tokens": added,
    }
    library = _tokenizers()
    try:
        return library.Tokenizer.from_str(json.dumps(definition))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"the tokenizer{of(source)} cannot be read: {error}") from error


def _without_prefix_space(part: Any) -> Any:
    """Return a pre-tokenizer, or a sequence of them, without a space before the text."""
    if isinstance(part, list):
        return [_without_prefix_space(member) for member in part]
    if not isinstance(part, dict):
        return part
    return {key: False if key == "add_prefix_space" else _without_prefix_space(value) for key, value in part.items()}
