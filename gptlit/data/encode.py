"""A text as token ids: in memory when it is short, else in a token file that is kept.

Next to the token files `<cache>/tokens` holds the facts of long texts, so that a second start neither reads nor encodes
them again, and the BPE vocabularies that were learned.
"""

import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gptlit.data.cache import FORMAT, building, hash_of, read_record, token_folder, write_record
from gptlit.data.chunks import Tokens
from gptlit.data.corpus.load import Corpus, TextSpec, open_corpus, settings_from, together
from gptlit.data.encode_file import token_file, whole_parts
from gptlit.data.reading import Facts, Parts, read, split
from gptlit.errors import UserError, counted
from gptlit.tokenizer import BPETokenizer, CharTokenizer, Tokenizer
from gptlit.tokenizer.bpe import slices
from gptlit.tokenizer.characters import describe

IN_MEMORY_CHARACTERS = {"char": 2**26, "bpe": 2**23}  # a longer text goes into a token file: encoding takes seconds
BPE_CHARACTERS = 2**28  # of a longer text, so many characters spread over it are enough to learn a vocabulary from
SHOWN = 8  # characters that a notice shows


@dataclass(frozen=True)
class EncodedText:
    """A text as token ids in two parts.

    Attributes:
        name: short, for file names and messages.
        source: where the text comes from, in words.
        sha256: of both parts, the training part first, as UTF-8.
        notices: lines for the user, such as a fallback or characters that the training part lacks.
        used_fallback: whether this is the fallback, not the text that was named.
        document_start: text after which a document begins; None where the text is one document.
        tokenizer: of the ids.
        train: ids of the training part, (N,).
        val: ids of the validation part, (M,).
        train_characters: length of the training part.
        val_characters: length of the validation part.
    """

    name: str
    source: str
    sha256: str
    notices: tuple[str, ...]
    used_fallback: bool
    document_start: str | None
    tokenizer: Tokenizer
    train: Tokens
    val: Tokens
    train_characters: int
    val_characters: int


def encode_text(spec: TextSpec, tokenizer: Tokenizer | None, kind: str, vocab_size: int) -> EncodedText:
    """Read and encode both parts of a text.

    Args:
        spec: which text.
        tokenizer: of the model, if it has one already.
        kind: otherwise `char`, `bpe`, or the path of a tokenizer.json.
        vocab_size: of a BPE learned here.

    Raises:
        UserError: the text or the tokenizer cannot be read, or do not fit each other.
    """
    if tokenizer is None and kind not in ("char", "bpe"):
        if not Path(kind).is_file():
            raise UserError(f"is {kind!r}: it must be char, bpe, or the path of a tokenizer.json", "tokenizer")
        with settings_from("tokenizer"):
            tokenizer = BPETokenizer.from_file(kind)
    corpus = open_corpus(spec)
    facts, pieces = read(corpus, IN_MEMORY_CHARACTERS[tokenizer.kind if tokenizer else kind])
    train_characters = characters_to_train_on(corpus, facts)

    def parts() -> Iterator[tuple[int, str]]:
        return split(corpus.parts() if pieces is None else pieces, train_characters)

    wanted = None
    if tokenizer is None and kind == "bpe":
        wanted, fixed_by = vocab_size, (facts.sha256, train_characters, vocab_size)
        with settings_from("vocab_size"):
            tokenizer = learned_bpe(lambda: (t for part, t in parts() if not part), fixed_by, vocab_size, corpus.name)
    tokenizer = tokenizer or CharTokenizer(facts.symbols, source=corpus.name)
    with settings_from("corpus"):
        refuse_unknown_symbols(facts, tokenizer, corpus.words)
        if pieces is None:
            key = hash_of(facts.sha256, train_characters, identity(tokenizer), FORMAT)
            path = token_folder() / f"{key}.tokens"
            ids: tuple[Tokens, Tokens] = token_file(path, tokenizer, parts, sum(facts.characters)).parts
        else:
            ids = in_memory(tokenizer, parts())
    return EncodedText(
        name=corpus.name,
        source=corpus.words,
        sha256=facts.sha256,
        notices=(
            *corpus.notices,
            *facts.notices,
            *notices(facts, train_characters, tokenizer, sum(map(len, ids)), wanted),
        ),
        used_fallback=corpus.spec.corpus != spec.corpus,
        document_start=corpus.document_start,
        tokenizer=tokenizer,
        train=ids[0],
        val=ids[1],
        train_characters=train_characters,
        val_characters=sum(facts.characters) - train_characters,
    )


def characters_to_train_on(corpus: Corpus, facts: Facts) -> int:
    """Return the length of the training part: all of part 0, or of a text without part 1 all but its end.

    Raises:
        UserError: one of the parts would be empty.
    """
    total = sum(facts.characters)
    if not facts.symbols or facts.symbols.isspace():
        raise UserError(f"{corpus.words} holds no text", "corpus")
    if corpus.val_sources and not facts.characters[1]:
        raise UserError(
            f"{together([source.words for source in corpus.val_sources], ', ')} holds no text", "val_corpus"
        )
    text = facts.characters[0]
    train_characters = text if corpus.has_val_part else int(text * (1.0 - corpus.spec.val_fraction))
    if train_characters in (0, total):
        what = "documents" if corpus.spec.split == "documents" else "characters"
        raise UserError(
            f"{corpus.words} has only {counted(total, 'character')}: too few {what} for two parts", "corpus"
        )
    return train_characters


def notices(
    facts: Facts, train_characters: int, tokenizer: Tokenizer, tokens: int, wanted: int | None
) -> Iterator[str]:
    """Yield what the user should know before training on these parts.

    Args:
        facts: about the text.
        train_characters: length of the training part.
        tokenizer: of the text.
        tokens: of both parts.
        wanted: size of a vocabulary that was learned here.
    """
    if wanted is not None and tokenizer.vocab_size < wanted:
        yield (
            f"data.vocab_size is {wanted:,}, but the training part is too short for more than "
            f"{counted(tokenizer.vocab_size, 'token')}"
        )
    if lacking := facts.missing_before(train_characters):
        shown = ", ".join(ascii(symbol) for symbol in lacking[:SHOWN]) + (", …" if len(lacking) > SHOWN else "")
        yield (
            f"the validation part holds {len(lacking)} character{'s' * (len(lacking) > 1)} that the training part "
            f"lacks ({shown}): the model cannot learn {'them' if len(lacking) > 1 else 'it'}"
        )
    characters = sum(facts.characters)
    if isinstance(tokenizer, BPETokenizer) and tokens > characters:
        yield (
            f"BPE makes {tokens / characters:.2f} tokens of each character of this text: characters (data.tokenizer "
            "char) or a larger data.vocab_size are better"
        )


def in_memory(tokenizer: Tokenizer, parts: Parts) -> tuple[Tensor, Tensor]:
    """Encode a short text; (N,) ids of each part, as narrow as torch can index."""
    found: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    size = tokenizer.vocab_size
    dtype = np.uint8 if size <= 2**8 else np.int16 if size <= 2**15 else np.int32
    for part, text in whole_parts(parts, tokenizer):
        found[part].append(tokenizer.encode_array(text).astype(dtype))
    train, val = (torch.from_numpy(np.concatenate(ids)) for ids in found)
    return train, val


def learned_bpe(
    texts: Callable[[], Iterable[str]], fixed_by: tuple[str, int, int], vocab_size: int, source: str
) -> BPETokenizer:
    """Return the BPE vocabulary of a training part: the one that is kept, or else a new one.

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
    """Yield pieces spread evenly over a text of so many characters, that together hold about the wanted number.

    All of them when the text has no more. Learning takes time for every character, and memory for every new word.
    """
    seen = taken = 0
    for piece in pieces:
        if taken * characters <= seen * wanted:
            yield piece
            taken += len(piece)
        seen += len(piece)


def identity(tokenizer: Tokenizer) -> str:
    """Return what a tokenizer does, without the name of the text that it comes from."""
    return "".join(tokenizer.symbols) if isinstance(tokenizer, CharTokenizer) else json.dumps(tokenizer.definition)


def refuse_unknown_symbols(facts: Facts, tokenizer: Tokenizer, source: str) -> None:
    """Check, before a text is encoded, that it can be.

    Raises:
        UserError: a character is not in the vocabulary.
    """
    if not isinstance(tokenizer, CharTokenizer):
        return
    known = set(tokenizer.symbols)
    unknown = sorted((first, s) for s, first in zip(facts.symbols, facts.first, strict=True) if s not in known)
    if unknown:
        first, symbol = unknown[0]
        others = len(unknown) - 1
        more = f" (and {others} other character{'s' * (others > 1)})" if others else ""
        raise UserError(
            f"{source} holds {describe(symbol)} at character {first + 1:,}{more}, which is not in the vocabulary of "
            f"{tokenizer.source or 'the model'} ({counted(tokenizer.vocab_size, 'character')}): take it out of the "
            "text, or train a new model on this text"
        )
