"""Byte-level byte-pair encoding, learnt, read and applied by the `tokenizers` library; that is imported when needed."""

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gptlit.errors import UserError
from gptlit.tokenizer.characters import checked, dump, of, smallest_dtype

if TYPE_CHECKING:
    import numpy as np
    import tokenizers

SLICE = 2**16  # characters that one thread of the library takes

# Places where a text may be cut and a byte-level BPE still finds the same tokens: before a single space, and after a
# single newline, between words. The patterns of GPT-2, Llama 3 and GPT-4 all end a word there.
SAFE_CUT = re.compile(r"(?<=\S)(?= \w)|(?<=\S\n)(?=\w)")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's way of writing bytes in JSON: a printable Latin-1 byte as itself, the others from U+0100 on, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_alphabet()


class BPETokenizer:
    """Byte-level byte-pair encoding (GPT-2): merges over UTF-8 bytes, so that no text is unknown.

    `definition` is the content of a `tokenizer.json`. Whatever in it would change text is switched off: normalizer,
    prefix space, truncation, padding, dropout, and template tokens around the text. `train` and `from_file` make one.
    Raises `UserError` for anything that is not a byte-level BPE.
    """

    kind: Literal["bpe"] = "bpe"

    def __init__(self, definition: dict[str, Any], source: str = "") -> None:
        self.source = source
        self._bpe = _lossless(definition, source)
        vocabulary = self._bpe.get_vocab(with_added_tokens=True)
        added = {token.content for token in self._bpe.get_added_tokens_decoder().values()}
        self._bytes = [b""] * (max(vocabulary.values()) + 1)  # id -> bytes; ids may have gaps, which stand for nothing
        for token, i in vocabulary.items():
            # an added token is written as it reads; the others in GPT-2's alphabet of 256 printable characters
            self._bytes[i] = token.encode() if token in added else bytes(BYTE_OF_CHARACTER[c] for c in token)
        probe = "".join(map(chr, range(0x250))) + " \n\n  a  1 23\t\r\n'Ll e\u0301 \u65e5\u672c \U0001f600 "
        if self.decode(self.encode(probe)) != probe:
            raise UserError(
                f"the tokenizer{of(source)} does not give back every text: use a byte-level BPE like GPT-2's"
            )

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, source: str = "", show_progress: bool = False
    ) -> "BPETokenizer":
        """Learn merges until there are `vocab_size` tokens, or no pair is left to merge. Deterministic.

        Raises `UserError` for a `vocab_size` below 256, the number of bytes.
        """
        if vocab_size < 256:
            raise UserError(
                f"the vocabulary of a byte-level BPE has at least 256 tokens, one for a byte: not {vocab_size}"
            )
        library = _tokenizers()
        bpe = library.Tokenizer(library.models.BPE())
        bpe.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size,
            show_progress=show_progress,
            special_tokens=[],
            initial_alphabet=sorted(BYTE_OF_CHARACTER),
        )
        bpe.train_from_iterator([texts] if isinstance(texts, str) else texts, trainer)
        return cls(json.loads(bpe.to_str()), source)

    @classmethod
    def from_file(cls, path: str | Path) -> "BPETokenizer":
        """From a `tokenizer.json`, as the `tokenizers` library and `transformers` write it."""
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
        """The ids of the text; `unknown` has no effect, since no text is unknown."""
        return self._bpe.encode(text, add_special_tokens=False).ids

    def encode_array(self, text: str) -> "np.ndarray":
        """`encode`, in slices on all cores: the ids in the smallest of uint8, uint16 and uint32 that holds them all."""
        import numpy as np

        pieces, dtype = list(slices(text)), smallest_dtype(self.vocab_size)
        found = [np.empty(0, dtype)]
        for start in range(0, len(pieces), 64):
            encodings = self._bpe.encode_batch_fast(pieces[start : start + 64], add_special_tokens=False)
            found += [np.array(encoding.ids, dtype) for encoding in encodings]
        return np.concatenate(found)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; bytes that are no UTF-8 become U+FFFD. Raises `UserError` for an id out of range."""
        return b"".join([self._bytes[i] for i in checked(ids, self.vocab_size)]).decode("utf-8", "replace")

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of the ids while they arrive; the bytes of an incomplete character wait for the rest of it."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for i in ids:
            if piece := decoder.decode(self._bytes[checked([i], self.vocab_size)[0]]):
                yield piece
        if rest := decoder.decode(b"", final=True):
            yield rest

    def chars_per_token(self) -> list[int]:
        """How many characters begin in each token: their sum over a text is its exact number of characters."""
        return [sum(byte & 0xC0 != 0x80 for byte in token) for token in self._bytes]  # not 10xxxxxx: a first byte

    def bytes_per_token(self) -> list[int]:
        """Return the length of each token in UTF-8."""
        return [len(token) for token in self._bytes]

    @property
    def definition(self) -> dict[str, Any]:
        """The content of its `tokenizer.json`, which the `tokenizers` library and `transformers` read."""
        return json.loads(self._bpe.to_str())

    def to_json(self) -> str:
        """All of it as one JSON string, for `from_json`."""
        return dump(kind=self.kind, source=self.source, definition=self.definition)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BPETokenizer) and self._bpe.to_str() == other._bpe.to_str()

    def __hash__(self) -> int:
        return hash(tuple(self._bytes))


def _tokenizers() -> Any:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError as error:
        raise UserError("a BPE vocabulary needs the tokenizers library: pip install 'gptlit[hf]'") from error
    return tokenizers


def slices(text: str, size: int = SLICE) -> Iterator[str]:
    """A text in pieces of a little over `size` characters, in which a BPE finds the same tokens as in the whole."""
    start = 0
    while start < len(text):
        cut = SAFE_CUT.search(text, start + size)
        end = cut.start() if cut else len(text)
        yield text[start:end]
        start = end


def _lossless(definition: dict[str, Any], source: str) -> "tokenizers.Tokenizer":
    """A tokenizer of the library from the content of a `tokenizer.json`, with all that changes text switched off."""
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
    """A pre-tokenizer, or a sequence of them, that puts no space before the text."""
    if isinstance(part, list):
        return [_without_prefix_space(member) for member in part]
    if not isinstance(part, dict):
        return part
    return {key: False if key == "add_prefix_space" else _without_prefix_space(value) for key, value in part.items()}
