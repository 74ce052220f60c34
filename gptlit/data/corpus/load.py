"""A corpus: sources, the documents in them, and two parts, training and validation."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

from gptlit.data.corpus.documents import HOW, Pieces, documents_of, joined, part_of, separator_between
from gptlit.data.corpus.download import NetworkError
from gptlit.data.corpus.kept import kept
from gptlit.data.corpus.source import Source
from gptlit.data.corpus.sources import resolve
from gptlit.data.corpus.text import recut
from gptlit.errors import UserError, require
from gptlit.tokenizer.bpe import slices

PIECE = 2**20  # characters read and encoded at a time
SPLITS = ("tail", "documents")
OF_THE_TEXT = ("val_corpus", "documents", "separator", "split")  # settings that a fallback has its own values of


@dataclass(frozen=True)
class TextSpec:
    """What the user named; the fields are those of `TextDataModule`.

    Raises:
        UserError: a value is out of range, or two of them exclude each other.
    """

    corpus: str | list[str]
    val_corpus: str | list[str] | None = None
    val_fraction: float = 0.1
    fallback: Literal["sample"] | None = None
    text_column: str = "text"
    streaming: bool = False
    documents: str | None = None
    separator: str | None = None
    split: str = "tail"
    split_seed: int = 1337

    def __post_init__(self) -> None:
        for setting, value, allowed in (
            ("fallback", self.fallback, (None, "sample")),
            ("documents", self.documents, (None, *HOW)),
            ("split", self.split, SPLITS),
        ):
            require(value in allowed, setting, repr(value), ", ".join("null" if a is None else a for a in allowed))
        require(0.0 < self.val_fraction < 1.0, "val_fraction", self.val_fraction, "above 0 and below 1")
        require(self.separator != "", "separator", "empty", "a text, or null")
        if self.split == "documents" and self.val_corpus is not None:
            raise UserError("is 'documents', but val_corpus is a validation text of its own: drop one", "split")

    def of_fallback(self) -> "TextSpec":
        """Return what is read in place of a text that is out of reach: one text, whose end is held out."""
        assert self.fallback is not None
        return TextSpec(self.fallback, val_fraction=self.val_fraction)


@dataclass(frozen=True)
class Corpus:
    """A text that can be read again and again.

    Attributes:
        spec: what the user named.
        sources: of the text.
        val_sources: of a separate validation text, if there is one.
        separator: between documents; None for a blank line.
        notices: for the user: a fallback, files left out.
    """

    spec: TextSpec
    sources: tuple[Source, ...]
    val_sources: tuple[Source, ...]
    separator: str | None
    notices: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Short, for file names and messages: `tinyshakespeare`, `my`, `owner/name`."""
        return together([source.name for source in self.sources], "+")

    @property
    def words(self) -> str:
        """Where the text comes from."""
        return together([source.words for source in self.sources], ", ")

    @property
    def has_val_part(self) -> bool:
        """Whether `parts` gives a part 1; otherwise validation is the end of part 0."""
        return bool(self.val_sources) or self.spec.split == "documents"

    @property
    def document_start(self) -> str | None:
        """Text after which a document begins; None where the text is one document."""
        how = document_kind(self.spec, self.sources)
        if how == "whole" and self.spec.separator is None:
            return None
        return "\n\n" if self.separator is None else self.separator

    @property
    def rows_notices(self) -> tuple[str, ...]:
        """For the user: rows of tables that have no text. Known when the text was read once."""
        found = (source.rows_notice for source in (*self.sources, *self.val_sources))
        return tuple(filter(None, found))

    def parts(self) -> Iterator[tuple[int, str]]:
        """Yield the text in pieces of about a million characters, each with the number of its part.

        Part 0 comes first. With a split by documents, or a validation text of its own, part 1 follows; otherwise all
        is part 0, and the end of it is validation. Pieces are cut where a BPE finds the same tokens as in the whole.

        Raises:
            UserError: a source cannot be read.
        """
        with settings_from("corpus"):
            if self.spec.split == "documents":
                for part in (0, 1):
                    texts = documents(self.spec, self.sources)
                    yield from self._pieces(part, part_of(texts, part, self.spec.val_fraction, self.spec.split_seed))
                return
            yield from self._pieces(0, documents(self.spec, self.sources))
        if self.val_sources:
            with settings_from("val_corpus"):
                yield from self._pieces(1, documents(self.spec, self.val_sources))

    def _pieces(self, part: int, texts: Iterator[Pieces]) -> Iterator[tuple[int, str]]:
        for piece in recut(joined(texts, self.separator), PIECE):
            yield from ((part, text) for text in slices(piece, PIECE))


def open_corpus(spec: TextSpec) -> Corpus:
    """Find the sources of a text, or of the fallback when the network is out of reach.

    Raises:
        UserError: a source is missing, or its documents are not what the settings say.
        NetworkError: the network is out of reach, and there is no fallback.
    """
    try:
        with settings_from("corpus"):
            sources = resolved(spec, spec.corpus)
        with settings_from("val_corpus"):
            val_sources = resolved(spec, spec.val_corpus) if spec.val_corpus is not None else ()
    except NetworkError as error:
        if spec.fallback is None:
            raise
        instead = spec.of_fallback()
        corpus = open_corpus(instead)
        notice = (
            f"{error.what} is out of reach ({error.reason}): {corpus.words} takes its place, and losses on it cannot "
            "be compared"
        )
        unused = [f"data.{name}" for name in OF_THE_TEXT if getattr(spec, name) != getattr(instead, name)]
        if unused:
            notice += (
                f"; it is one text, for which {' and '.join(unused)} {'is' if len(unused) == 1 else 'are'} left out"
            )
        return replace(corpus, notices=(notice,))
    check_settings_of_sources(spec, (*sources, *val_sources))
    return with_separator(Corpus(spec, sources, val_sources, spec.separator))


def resolved(spec: TextSpec, named: str | list[str]) -> tuple[Source, ...]:
    """Find the sources that one setting names; what streams is fetched once and kept."""
    found = resolve(named, text_column=spec.text_column, streaming=spec.streaming)
    return tuple(kept(source, spec.text_column) for source in found)


def check_settings_of_sources(spec: TextSpec, sources: tuple[Source, ...]) -> None:
    """Refuse settings that none of the sources reads.

    Raises:
        UserError: a column where there is no table, or streaming where there is no data set of the hub.
    """
    named = together([source.words for source in sources], ", ")
    if spec.text_column != TextSpec.text_column and not any(source.tables for source in sources):
        raise UserError(
            f"is {spec.text_column!r}, but {named} is not a table: leave it out, or set it to {TextSpec.text_column}",
            "text_column",
        )
    if spec.streaming and not any(source.streamed for source in sources):
        raise UserError(
            f"is true, but {named} is not a data set of the Hugging Face Hub: leave it out, or set it to false",
            "streaming",
        )


def with_separator(corpus: Corpus) -> Corpus:
    """Check the settings of documents against the sources, and settle what stands between documents.

    Raises:
        UserError: rows of something that is not a table, or a split of a text that is one document.
    """
    spec, sources = corpus.spec, corpus.sources
    texts = [source.words for source in (*sources, *corpus.val_sources) if not source.rows]
    if spec.documents == "rows" and texts:
        raise UserError(f"is 'rows', but {texts[0]} is not a table: use lines, blank_lines or files", "documents")
    if spec.split == "documents" and document_kind(spec, sources) == "whole" and spec.separator is None:
        raise UserError(
            f"is 'documents', but {corpus.words} is one document: set documents to lines or blank_lines, or set the "
            "separator that stands between documents",
            "split",
        )
    notices = tuple(source.notice for source in (*sources, *corpus.val_sources) if source.notice)
    with settings_from("corpus"):
        rows = not texts and spec.documents in (None, "rows")
        separator = separator_between(documents(spec, sources), rows, spec.documents, spec.separator)
    return replace(corpus, separator=separator, notices=notices)


def documents(spec: TextSpec, sources: tuple[Source, ...]) -> Iterator[Pieces]:
    """Open the documents of sources."""
    how = "rows" if document_kind(spec, sources) == "rows" else spec.documents
    return documents_of(itertools.chain.from_iterable(source.open() for source in sources), how, spec.separator)


def document_kind(spec: TextSpec, sources: tuple[Source, ...]) -> str:
    """Return what a document is, where the user left it to the sources: rows, files, or the whole text."""
    if spec.documents is not None:
        return spec.documents
    if all(source.rows for source in sources):
        return "rows"
    return "files" if len(sources) > 1 or sources[0].several else "whole"


@contextmanager
def settings_from(setting: str) -> Iterator[None]:
    """Give a `UserError` raised inside the name of a setting, unless it has one."""
    try:
        yield
    except UserError as error:
        error.setting = error.setting or setting
        raise


def together(words: list[str], separator: str) -> str:
    """Return the first three, and how many more there are."""
    return separator.join(words[:3]) + (f"{separator}{len(words) - 3} more" if len(words) > 3 else "")
