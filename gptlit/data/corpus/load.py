"""From one or more sources to one text, its split and its checksum."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from gptlit.data.corpus.download import NetworkError
from gptlit.data.corpus.sources import Source, resolve
from gptlit.data.corpus.text import join, recut
from gptlit.errors import UserError

PIECE = 2**22  # characters handled at a time, where the whole text would need too much memory


@dataclass(frozen=True)
class Corpus:
    """A text in two parts."""

    name: str
    """Short, for file names and messages: `tinyshakespeare`, `my`, `owner/name`."""
    train: str = field(repr=False)
    """The text to learn from."""
    val: str = field(repr=False)
    """The text to measure on."""
    sha256: str
    """Of both parts, the training part first, as UTF-8."""
    source: str
    """Where the text came from, in words."""
    notice: str | None = None
    """What the user must be told: the network was out of reach and this is the fallback. Null otherwise."""

    @property
    def used_fallback(self) -> bool:
        """Whether this is the fallback and not the text that was asked for."""
        return self.notice is not None


def load_corpus(
    spec: str | list[str],
    *,
    fallback: str | None = None,
    val: str | list[str] | None = None,
    val_fraction: float = 0.1,
    text_column: str = "text",
    cache_dir: Path | None = None,
) -> Corpus:
    """The text that `spec` names, in memory. What a spec may be stands at `gptlit.data.corpus.sources.resolve`.

    The text is UTF-8 without byte order mark, its line ends are `\\n`, and between two documents (files, or rows of a
    table) stands one blank line. Validation is `val`, or else the last `val_fraction` of the text, in order: of n
    characters the first int(n * (1 - val_fraction)) are for training, as in the lecture and in nanoGPT.

    `fallback` is loaded instead, with a `notice`, when the network is out of reach, and for no other reason.
    `cache_dir` holds what is downloaded; by default `$XDG_CACHE_HOME/gptlit`, and for hub data sets the cache of
    `datasets` (HF_HOME). What is there is not downloaded again.

    Raises `UserError` for a text that is missing, unreadable, not UTF-8, empty, or too short to be split.
    """
    if not 0.0 < val_fraction < 1.0:
        raise UserError(f"data.val_fraction is {val_fraction}: it must lie between 0 and 1")
    try:
        sources = resolve(spec, text_column=text_column, cache_dir=cache_dir)
        val_sources = [] if val is None else resolve(val, text_column=text_column, cache_dir=cache_dir)
    except NetworkError as error:
        if fallback is None:
            raise
        return stand_in(error, fallback, val_fraction)
    return read_corpus(sources, val_sources, val_fraction)


def stand_in(error: NetworkError, fallback: str, val_fraction: float) -> Corpus:
    """The text that takes the place of one that is out of reach, with a notice that says so."""
    corpus = load_corpus(fallback, val_fraction=val_fraction)
    notice = (
        f"{error.what} is out of reach ({error.reason}): {corpus.source} takes its place, "
        "and losses on it cannot be compared"
    )
    return replace(corpus, notice=notice)


def read_corpus(sources: Sequence[Source], val_sources: Sequence[Source], val_fraction: float) -> Corpus:
    """Reads a text, and the separate validation text if there is one, into memory; raises as `load_corpus`."""
    train = _read(sources)
    if not val_sources:
        cut = int(len(train) * (1.0 - val_fraction))
        train, held_out = train[:cut], train[cut:]
    else:
        held_out = _read(val_sources)
    if not train or not held_out:
        raise UserError(f"{sources[0].words} has only {len(train + held_out)} characters: too few for two parts")
    digest = hashlib.sha256()
    for part in (train, held_out):
        for start in range(0, len(part), PIECE):
            digest.update(part[start : start + PIECE].encode())
    return Corpus(
        name=together([source.name for source in sources], "+"),
        train=train,
        val=held_out,
        sha256=digest.hexdigest(),
        source=together([source.words for source in sources], ", "),
    )


def iter_text(
    spec: str | list[str], *, text_column: str = "text", cache_dir: Path | None = None, streaming: bool = False
) -> Iterator[str]:
    """The same text as `load_corpus`, in pieces of about four million characters: for texts larger than memory.

    The pieces put together are the text. They are cut between words, so that a BPE finds the same tokens in the pieces
    as in the whole. `streaming` reads a hub data set while it arrives, instead of first bringing it to disk.
    """
    sources = resolve(spec, text_column=text_column, cache_dir=cache_dir, streaming=streaming)
    return recut(join(document for source in sources for document in source.documents()), PIECE)


def _read(sources: Sequence[Source]) -> str:
    text = "".join(join(document for source in sources for document in source.documents()))
    if not text or text.isspace():
        raise UserError(f"{together([source.words for source in sources], ', ')} holds no text")
    return text


def together(words: list[str], separator: str) -> str:
    """The first three, and how many more there are."""
    return separator.join(words[:3]) + (f"{separator}{len(words) - 3} more" if len(words) > 3 else "")
