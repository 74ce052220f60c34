"""Facts about a text, found by reading it once, and kept for files that have not changed since."""

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import accumulate

import numpy as np

from gptlit.data.cache import FORMAT, hash_of, progress, read_record, token_folder, write_record
from gptlit.data.corpus.files import ending, inner_name
from gptlit.data.corpus.load import Corpus
from gptlit.data.corpus.source import Source

FACTS = 2  # format of the facts; a new number puts older ones out of use
SAMPLES, SAMPLE = 64, 2**16  # places of a text whose bytes tell that it is unchanged, and bytes read at each

Parts = Iterable[tuple[int, str]]
"""Pieces of a text, each with the number of its part."""


@dataclass(frozen=True)
class Facts:
    """What reading a text once tells.

    Attributes:
        sha256: of the text as UTF-8, part 0 and then part 1.
        characters: of part 0 and of part 1, as `Corpus.parts` numbers them.
        symbols: every character, once, in order.
        first: place of each symbol in the text, counted in characters from 0.
        notices: rows without text, for the user.
    """

    sha256: str
    characters: tuple[int, int]
    symbols: str
    first: tuple[int, ...]
    notices: tuple[str, ...] = ()

    def missing_before(self, characters: int) -> str:
        """Return the symbols that the first so many characters lack."""
        return "".join(s for s, first in zip(self.symbols, self.first, strict=True) if first >= characters)


class FactsReader:
    """Collects the facts of pieces that pass through it."""

    def __init__(self) -> None:
        self.characters = [0, 0]
        self._digest = hashlib.sha256()
        self._first: dict[str, int] = {}
        self._ascii = b""  # the ASCII characters seen so far

    def add(self, part: int, piece: str) -> int:
        """Take in the next piece; returns its number of bytes."""
        utf8 = piece.encode()
        self._digest.update(utf8)
        # Known characters are removed first, which is ten times faster than looking at every character.
        found = set(utf8.translate(None, self._ascii).decode()) if piece.isascii() else set(distinct(piece))
        start = sum(self.characters)
        for symbol in found - self._first.keys():
            self._first[symbol] = start + piece.index(symbol)
            if symbol.isascii():
                self._ascii += symbol.encode()
        self.characters[part] += len(piece)
        return len(utf8)

    def facts(self) -> Facts:
        """Return the facts of all pieces so far."""
        symbols = sorted(self._first)
        first = tuple(self._first[symbol] for symbol in symbols)
        return Facts(self._digest.hexdigest(), (self.characters[0], self.characters[1]), "".join(symbols), first)


def read(corpus: Corpus, limit: int) -> tuple[Facts, list[tuple[int, str]] | None]:
    """Read a text once.

    Args:
        corpus: what to read. Facts of a long one are kept, so that a second start does not read it again.
        limit: characters that may be held in memory.

    Returns:
        Facts, and the pieces of the text, or None when it is longer than the limit.

    Raises:
        UserError: it cannot be read.
    """
    path = token_folder() / f"{key_of(corpus)}.facts"
    if fields := read_record(path):
        several = {key: tuple(value) for key, value in fields.items() if isinstance(value, list)}
        facts = Facts(**{**fields, **several})
        if sum(facts.characters) > limit:
            return facts, None
    reader, pieces, bytes_read = FactsReader(), list[tuple[int, str]](), 0
    advance: Callable[[int], None] | None = None
    with ExitStack() as stack:
        for part, piece in corpus.parts():
            size = reader.add(part, piece)
            bytes_read += size
            if advance is not None:
                advance(size)
                continue
            pieces.append((part, piece))
            if sum(reader.characters) > limit:
                pieces.clear()
                advance = stack.enter_context(progress("reading", plain_bytes(corpus.sources + corpus.val_sources)))
                advance(bytes_read)
    facts = replace(reader.facts(), notices=corpus.rows_notices)
    if advance is None:
        return facts, pieces
    write_record(path, asdict(facts))
    return facts, None


def split(parts: Parts, train_characters: int) -> Iterator[tuple[int, str]]:
    """Yield pieces with part 0 for the first `train_characters` of the text, and part 1 for all that follow."""
    left = train_characters
    for _, piece in parts:
        if left:
            yield 0, piece[:left]
        if len(piece) > left:
            yield 1, piece[left:]
        left = max(0, left - len(piece))


def distinct(text: str) -> str:
    """Return every character of a text, once, in order."""
    seen = np.zeros(sys.maxunicode + 1, bool)
    seen[np.frombuffer(text.encode("utf-32-le"), "<u4")] = True
    return "".join(map(chr, np.flatnonzero(seen).tolist()))


def plain_bytes(sources: tuple[Source, ...]) -> int | None:
    """Return the size of plain text files; None where the size of the text is not known."""
    files = [path for source in sources for path in source.files]
    plain = all(inner_name(path.name)[1] is None and ending(path.name) in ("", ".txt", ".md") for path in files)
    return sum(path.stat().st_size for path in files) if plain else None


def key_of(corpus: Corpus) -> str:
    """Return a hash that changes when the text may have changed: files, and the settings that make text of them."""
    spec = corpus.spec
    settings = [spec.text_column, spec.documents, spec.separator, corpus.separator, spec.split]
    if spec.split == "documents":
        settings += [str(spec.val_fraction), str(spec.split_seed)]
    return hash_of(signature(corpus.sources), signature(corpus.val_sources), settings, FORMAT, FACTS)


def signature(sources: tuple[Source, ...]) -> list[list[object]]:
    """Tell unchanged files without reading them: path, size, time, and samples of their bytes."""
    files = [path.resolve() for source in sources for path in source.files]
    stats = [path.stat() for path in files]
    wanted = iter(np.linspace(0, max(0, sum(stat.st_size for stat in stats) - 1), SAMPLES).astype(np.int64).tolist())
    found: list[list[object]] = []
    place = next(wanted)
    ends = list(accumulate(stat.st_size for stat in stats))
    for path, stat, end in zip(files, stats, ends, strict=True):
        sample = hashlib.sha256()
        with path.open("rb") as stream:
            while place is not None and place < end:
                stream.seek(place - end + stat.st_size)
                sample.update(stream.read(SAMPLE))
                place = next(wanted, None)
        found.append([str(path), stat.st_size, stat.st_mtime_ns, sample.hexdigest()])
    return [[source.words for source in sources], *found]
