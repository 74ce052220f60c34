"""A text that may be larger than memory: read piece by piece, and told unchanged without being read."""

import hashlib
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from gptlit.data.cache import FORMAT, building, hash_of, progress, read_record, token_folder, write_record
from gptlit.data.corpus.sources import Source
from gptlit.data.corpus.text import file_document, join, recut
from gptlit.tokenizer.bpe import slices

PIECE = 2**20  # characters read and encoded at a time
EXPANSION = {".gz": 4, ".bz2": 5, ".zst": 4, ".parquet": 3}  # typical bytes of text in a byte of the file
SAMPLES, SAMPLE = 64, 2**16  # how many places of a text tell that it is unchanged, and bytes read at each


@dataclass(frozen=True)
class Facts:
    """What reading a text through once tells of it."""

    sha256: str
    characters: tuple[int, int]
    """Of the text, and of the separate validation text."""
    symbols: str
    """Every character of both, once, in order."""


def text_of(sources: Iterable[Source], size: int = PIECE) -> Iterator[str]:
    """The text of sources, documents joined as in memory, in pieces cut where a BPE finds the same tokens."""
    for piece in recut(join(document for source in sources for document in source.documents()), size):
        yield from slices(piece, size)


def split(text: Iterator[str], train_characters: int, val_text: Iterator[str]) -> Iterator[tuple[int, str]]:
    """Pieces with the number of their part: 0 for the first `train_characters` of the text, 1 for all behind them."""
    left = train_characters
    for piece in text:
        if left:
            yield 0, piece[:left]
        if len(piece) > left:
            yield 1, piece[left:]
        left = max(0, left - len(piece))
    yield from ((1, piece) for piece in val_text)


def text_bytes(source: Source) -> int:
    """About how many bytes of text a source holds, without reading it."""
    return sum(path.stat().st_size * EXPANSION.get(path.suffix.lower(), 1) for path in source.files)


def kept_text(source: Source, text_column: str) -> Source:
    """A source that can be read again: of one that streams from the hub, its text is kept as one file."""
    if not source.streamed:
        return source
    path = token_folder() / f"{hash_of(source.words, text_column, FORMAT)}.txt"
    if not path.is_file():
        with building(path):
            if not path.is_file():
                temporary = path.with_suffix(".part")
                with progress("streaming", None) as advance, temporary.open("wb") as stream:
                    for piece in text_of([source]):
                        advance(stream.write(piece.encode()))
                os.replace(temporary, path)
    return Source(source.name, source.words, lambda: iter([file_document(path, None, source.words)]), (path,))


def facts_of(sources: tuple[Source, ...], val_sources: tuple[Source, ...], text_column: str) -> Facts:
    """Checksum, lengths and symbols of a text: as kept for the same unchanged files, or else by reading it through."""
    folder = token_folder()
    path = folder / f"{hash_of(signature(sources), signature(val_sources), text_column, FORMAT)}.facts"
    if fields := read_record(path):
        return Facts(fields["sha256"], tuple(fields["characters"]), fields["symbols"])
    digest, symbols, known, characters = hashlib.sha256(), set[str](), b"", []
    everything = sources + val_sources
    plain = all(path.suffix.lower() not in EXPANSION for source in everything for path in source.files)
    total = sum(map(text_bytes, everything)) if plain else None
    with progress("reading", total) as advance:
        for part in (sources, val_sources):
            length = 0
            for piece in text_of(part):
                utf8 = piece.encode()
                digest.update(utf8)
                # What is known already is taken out first, which is ten times faster than to look at every character.
                symbols.update(utf8.translate(None, known).decode() if piece.isascii() else distinct(piece))
                known = bytes(ord(symbol) for symbol in symbols if symbol.isascii())
                length += len(piece)
                advance(len(utf8))
            characters.append(length)
    facts = Facts(digest.hexdigest(), (characters[0], characters[1]), "".join(sorted(symbols)))
    write_record(path, {"sha256": facts.sha256, "characters": facts.characters, "symbols": facts.symbols})
    return facts


def distinct(text: str) -> str:
    """Every character of a text, once, in order."""
    seen = np.zeros(sys.maxunicode + 1, bool)
    seen[np.frombuffer(text.encode("utf-32-le"), "<u4")] = True
    return "".join(map(chr, np.flatnonzero(seen).tolist()))


def signature(sources: tuple[Source, ...]) -> list[list[object]]:
    """What tells that files are unchanged without reading them whole: place, size, time, and samples of their bytes."""
    files = [path.resolve() for source in sources for path in source.files]
    stats = [path.stat() for path in files]
    wanted = iter(np.linspace(0, max(0, sum(stat.st_size for stat in stats) - 1), SAMPLES).astype(np.int64).tolist())
    found, start, place = [], 0, next(wanted)
    for path, stat in zip(files, stats, strict=True):
        sample = hashlib.sha256()
        with path.open("rb") as stream:
            while place is not None and place < start + stat.st_size:
                stream.seek(place - start)
                sample.update(stream.read(SAMPLE))
                place = next(wanted, None)
        start += stat.st_size
        found.append([str(path), stat.st_size, stat.st_mtime_ns, sample.hexdigest()])
    return found
