"""From what the user names to token ids: in memory when the text is small, else in a token file that is kept.

Beside the token file `<cache>/tokens` keeps what a text was found to hold (its checksum, length and characters), so
that a second start neither reads nor encodes it again, and the BPE vocabularies that were learned.
"""

import importlib.metadata
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from gptlit.data.cache import FORMAT, building, console, hash_of, progress, read_record, token_folder, write_record
from gptlit.data.chunks import Tokens
from gptlit.data.corpus.download import NetworkError
from gptlit.data.corpus.load import Corpus, read_corpus, stand_in, together
from gptlit.data.corpus.sources import Source, resolve
from gptlit.data.reading import facts_of, kept_text, split, text_bytes, text_of
from gptlit.data.tokens import DamagedFileError, TokenFile, TokenWriter
from gptlit.errors import UserError
from gptlit.tokenizer import BPETokenizer, CharTokenizer, Tokenizer
from gptlit.tokenizer.bpe import slices
from gptlit.tokenizer.characters import describe, smallest_dtype

IN_MEMORY_BYTES = {"char": 2**26, "bpe": 2**23}  # a larger text goes into a token file: encoding it takes seconds
BPE_CHARACTERS = 2**28  # of a larger text, as many spread over it are enough to learn a vocabulary from
NO_TEXT: tuple[Source, ...] = ()


@dataclass(frozen=True)
class TextSpec:
    """What the user named; the fields are those of `TextDataModule`."""

    corpus: str | list[str]
    val_corpus: str | list[str] | None = None
    val_fraction: float = 0.1
    fallback: str | None = None
    text_column: str = "text"
    streaming: bool = False


@dataclass(frozen=True)
class EncodedText:
    """A text as token ids, in two parts; `name`, `source`, `sha256` and `notice` are those of `Corpus`."""

    name: str
    source: str
    sha256: str
    notice: str | None
    tokenizer: Tokenizer
    train: Tokens
    val: Tokens
    train_characters: int
    val_characters: int


def encode_text(spec: TextSpec, tokenizer: Tokenizer | None, kind: str, vocab_size: int) -> EncodedText:
    """The ids of both parts of a text.

    Args:
        spec: which text.
        tokenizer: of the model, if it has one already.
        kind: otherwise `char`, `bpe`, or the path of a tokenizer.json.
        vocab_size: of a BPE learned here.

    Raises:
        UserError: when the text or the tokenizer cannot be had, or do not fit each other.
    """
    if tokenizer is None and kind not in ("char", "bpe"):
        if not Path(kind).is_file():
            raise UserError(f"data.tokenizer is {kind!r}: it must be char, bpe, or the path of a tokenizer.json")
        tokenizer = BPETokenizer.from_file(kind)
    try:
        sources, val_sources = (
            tuple(resolve(part, text_column=spec.text_column, cache_dir=None, streaming=spec.streaming))
            if part is not None
            else NO_TEXT
            for part in (spec.corpus, spec.val_corpus)
        )
    except NetworkError as error:
        if spec.fallback is None:
            raise
        return in_memory(stand_in(error, spec.fallback, spec.val_fraction), tokenizer, kind, vocab_size)
    sources, val_sources = (
        tuple(kept_text(source, spec.text_column) for source in part) for part in (sources, val_sources)
    )
    if sum(map(text_bytes, sources + val_sources)) <= IN_MEMORY_BYTES[tokenizer.kind if tokenizer else kind]:
        return in_memory(read_corpus(sources, val_sources, spec.val_fraction), tokenizer, kind, vocab_size)
    return on_disk(spec, sources, val_sources, tokenizer, kind, vocab_size)


def in_memory(corpus: Corpus, tokenizer: Tokenizer | None, kind: str, vocab_size: int) -> EncodedText:
    """A small text, as tensors."""
    if tokenizer is None and kind == "bpe":
        fixed_by = (corpus.sha256, len(corpus.train), vocab_size)
        tokenizer = learned_bpe(lambda: [corpus.train], fixed_by, vocab_size, corpus.name)
    tokenizer = tokenizer or CharTokenizer.train([corpus.train, corpus.val], source=corpus.name)
    train, val = (
        torch.from_numpy(tokenizer.encode_array(part).astype(np.int32)) for part in (corpus.train, corpus.val)
    )
    return EncodedText(
        name=corpus.name,
        source=corpus.source,
        sha256=corpus.sha256,
        notice=corpus.notice,
        tokenizer=tokenizer,
        train=train,
        val=val,
        train_characters=len(corpus.train),
        val_characters=len(corpus.val),
    )


def on_disk(
    spec: TextSpec,
    sources: tuple[Source, ...],
    val_sources: tuple[Source, ...],
    tokenizer: Tokenizer | None,
    kind: str,
    vocab_size: int,
) -> EncodedText:
    """A large text, in a token file: the one that is kept, or else a new one."""
    facts = facts_of(sources, val_sources, spec.text_column)
    characters, val_characters = facts.characters
    train_characters = characters if val_sources else int(characters * (1.0 - spec.val_fraction))
    name = together([source.name for source in sources], "+")
    source = together([source.words for source in sources], ", ")
    if not train_characters or characters + val_characters == train_characters:
        raise UserError(f"{source} has only {characters + val_characters} characters: too few for two parts")

    def parts() -> Iterator[tuple[int, str]]:
        return split(text_of(sources), train_characters, text_of(val_sources))

    if tokenizer is None and kind == "bpe":
        fixed_by = (facts.sha256, train_characters, vocab_size)
        tokenizer = learned_bpe(lambda: (text for part, text in parts() if part == 0), fixed_by, vocab_size, name)
    tokenizer = tokenizer or CharTokenizer(facts.symbols, source=name)
    refuse_unknown_symbols(facts.symbols, tokenizer, source)
    key = hash_of(facts.sha256, train_characters, identity(tokenizer), FORMAT)
    file = token_file(token_folder() / f"{key}.tokens", tokenizer, parts, characters + val_characters)
    return EncodedText(
        name=name,
        source=source,
        sha256=facts.sha256,
        notice=None,
        tokenizer=tokenizer,
        train=file.parts[0],
        val=file.parts[1],
        train_characters=train_characters,
        val_characters=characters + val_characters - train_characters,
    )


def learned_bpe(
    texts: Callable[[], Iterable[str]], fixed_by: tuple[str, int, int], vocab_size: int, source: str
) -> BPETokenizer:
    """The BPE vocabulary of a training part: the one that is kept, or else a new one.

    Args:
        texts: opens the training part, in pieces that are cut between words.
        fixed_by: what fixes the result: checksum of the text, characters of the training part, size of the vocabulary.
        vocab_size: number of tokens.
        source: name of the text.
    """
    library = "".join(d.version for d in importlib.metadata.distributions(name="tokenizers"))  # may be missing
    path = token_folder() / f"{hash_of(*fixed_by, BPE_CHARACTERS, library, FORMAT)}.bpe"
    if fields := read_record(path):
        return BPETokenizer(fields["definition"], source)
    with building(path):
        if fields := read_record(path):  # another process made it meanwhile
            return BPETokenizer(fields["definition"], source)
        pieces = sample((piece for text in texts() for piece in slices(text)), fixed_by[1], BPE_CHARACTERS)
        tokenizer = BPETokenizer.train(pieces, vocab_size, source=source, show_progress=sys.stderr.isatty())
        write_record(path, {"definition": tokenizer.definition})
        return tokenizer


def sample(pieces: Iterable[str], characters: int, wanted: int) -> Iterator[str]:
    """Some pieces, spread evenly over a text of so many characters, that hold about the wanted number of them.

    All of them when the text has no more. Learning takes time for every character, and memory for every new word.
    """
    seen = kept = 0
    for piece in pieces:
        if kept * characters <= seen * wanted:
            yield piece
            kept += len(piece)
        seen += len(piece)


def identity(tokenizer: Tokenizer) -> str:
    """What a tokenizer does, without the name of the text that it comes from."""
    return "".join(tokenizer.symbols) if isinstance(tokenizer, CharTokenizer) else json.dumps(tokenizer.definition)


def refuse_unknown_symbols(symbols: str, tokenizer: Tokenizer, source: str) -> None:
    """Says before a long text is encoded that it cannot be.

    Raises:
        UserError: for a character that is not in the vocabulary.
    """
    unknown = sorted(set(symbols) - set(tokenizer.symbols)) if isinstance(tokenizer, CharTokenizer) else []
    if unknown:
        more = f" (and {len(unknown) - 1} others)" if len(unknown) > 1 else ""
        raise UserError(
            f"{describe(unknown[0])}{more} of {source} is not in the vocabulary of {tokenizer.source or 'the model'}: "
            "take it out of the text, or train a new model on this text"
        )


def token_file(
    path: Path, tokenizer: Tokenizer, parts: Callable[[], Iterator[tuple[int, str]]], characters: int
) -> TokenFile:
    """The token file at `path`; made, or made anew, when it is not there or damaged.

    Encoding uses all cores and needs memory for a few pieces. One that was interrupted goes on where it was.
    """
    if file := opened(path):
        return file
    with building(path):
        if file := opened(path):  # another process made it meanwhile
            return file
        try:
            with progress("encoding", characters) as advance:
                write_tokens(path, tokenizer, parts(), characters, advance)
        except (KeyboardInterrupt, SystemExit):
            console().print("stopped while encoding: the next start goes on from there", style="yellow")
            raise
        except OSError as error:
            raise UserError(
                f"cannot write {path} ({error.strerror or error}): make room, or set XDG_CACHE_HOME to another folder"
            ) from error
    console().print(f"token file {path} ({path.stat().st_size / 1e6:,.1f} MB)")
    return TokenFile(path)


def opened(path: Path) -> TokenFile | None:
    """The token file, or None when there is none; a damaged one is removed, with a line that says so."""
    try:
        return TokenFile(path)
    except FileNotFoundError:
        return None
    except DamagedFileError as error:
        console().print(f"the token file {path} is damaged ({error}): it is made anew", style="yellow")
        path.unlink(missing_ok=True)
        return None


def write_tokens(
    path: Path,
    tokenizer: Tokenizer,
    parts: Iterable[tuple[int, str]],
    characters: int,
    advance: Callable[[int], None],
) -> None:
    """Encodes pieces into a token file, in order; several at once, since both tokenizers work outside of the GIL.

    Raises:
        UserError: when they do not have as many characters as the text was found to have.
    """
    threads = max(2, (os.cpu_count() or 1) // 8)  # the BPE library has threads of its own for each piece
    waiting: deque[tuple[int, int, Future[np.ndarray]]] = deque()
    with TokenWriter(path, smallest_dtype(tokenizer.vocab_size)) as writer, ThreadPoolExecutor(threads) as pool:

        def write_one() -> None:
            part, length, ids = waiting.popleft()
            writer.append(part, ids.result())
            advance(length)

        done = writer.pieces
        for number, (part, text) in enumerate(parts):
            characters -= len(text)
            if number < done:
                advance(len(text))
                continue
            waiting.append((part, len(text), pool.submit(tokenizer.encode_array, text)))
            if len(waiting) > threads:
                write_one()
        while waiting:
            write_one()
        if characters:
            raise UserError("the text has changed while it was read: start again when it is complete")
        writer.finish()
