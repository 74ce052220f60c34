"""Documents: where one ends and the next begins, what stands between them, and which are held out for validation."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator

from gptlit.data.corpus.text import lines_of
from gptlit.errors import UserError

HOW = ("whole", "lines", "blank_lines", "rows", "files")
ROWS_LOOKED_AT = 1000  # of a table, to see whether its texts are lines

Pieces = Iterable[str]
"""A text in pieces, so that a large one is never in memory as a whole."""


def documents_of(files: Iterable[Iterable[Pieces]], how: str | None, separator: str | None) -> Iterator[Pieces]:
    """Yield the documents of files; a text file is one unit, a row of a table another.

    Args:
        files: units of each file.
        how: `lines` or `blank_lines` cut every unit there; `files` joins the units of a file with line ends; for
            `rows` a document is a unit. With `whole` or None a unit is cut at `separator`, if there is one.
        separator: text between documents.

    Raises:
        UserError: the separator is not in the text.
    """
    if how == "files":
        yield from (joined(units, "\n") for units in files)
        return
    units = itertools.chain.from_iterable(files)
    if how == "lines":
        yield from ([line] for unit in units for line in split_at(unit, "\n"))
    elif how == "blank_lines":
        yield from ([text] for unit in units for text in paragraphs(unit))
    elif separator is None or how == "rows":
        yield from units
    else:
        count = 0
        for unit in units:
            for text in split_at(unit, separator):
                count += 1
                yield [text]
        if count == 1:
            raise UserError(f"is {separator!r}, which is not in the text: in a shell a line end is $'\\n'", "separator")


def split_at(pieces: Pieces, separator: str) -> Iterator[str]:
    """Yield the texts between separators, without blank ones."""
    rest = ""
    for piece in pieces:
        *texts, rest = (rest + piece).split(separator)
        yield from (text for text in texts if text and not text.isspace())
    if rest and not rest.isspace():
        yield rest


def paragraphs(pieces: Pieces) -> Iterator[str]:
    """Yield the texts between blank lines."""
    for blank, lines in itertools.groupby(lines_of(pieces), str.isspace):
        if not blank:
            yield "".join(lines).removesuffix("\n")


def joined(documents: Iterable[Pieces], separator: str | None) -> Iterator[str]:
    """Join documents, without empty ones.

    Args:
        documents: texts in pieces.
        separator: stands between two documents; None for a blank line, that is two newlines less those in which the
            earlier document ends.
    """
    end = ""  # the last two characters so far
    for document in documents:
        between = separator if end else ""
        if between is None:
            between = "" if end == "\n\n" else "\n" if end[-1] == "\n" else "\n\n"
        for piece in document:
            if piece:
                yield between + piece
                between = ""
                end = piece[-2:] if len(piece) > 1 else end[-1:] + piece


def separator_between(documents: Iterable[Pieces], rows: bool, how: str | None, separator: str | None) -> str | None:
    """Return what stands between documents: what the user gave, a line end between lines, else None (a blank line).

    Args:
        documents: of the corpus; read only for rows of tables, of which the first thousand tell whether they are lines.
        rows: whether the documents are rows of tables.
        how: as in `documents_of`.
        separator: given by the user.
    """
    if separator is not None:
        return separator
    if how in ("lines", "blank_lines"):
        return "\n" if how == "lines" else "\n\n"
    if not rows:
        return None
    head = itertools.islice(documents, ROWS_LOOKED_AT)
    return None if any("\n" in piece for document in head for piece in document) else "\n"


def part_of(documents: Iterable[Pieces], part: int, fraction: float, seed: int) -> Iterator[Pieces]:
    """Yield the documents of the training (0) or the validation part (1), in their order.

    Of every 1 / fraction documents in a row one is held out, chosen at random: stratified sampling, which hits the
    fraction exactly and needs no number of documents.

    Args:
        documents: all of them.
        part: 0 or 1.
        fraction: share of validation, in (0, 1).
        seed: of the choice.
    """
    stratum, chosen = -1, -1
    for number, document in enumerate(documents):
        if int(number * fraction) != stratum:
            stratum, size = int(number * fraction), 1
            while int((number + size) * fraction) == stratum:
                size += 1
            digest = hashlib.sha256(f"{seed} {stratum}".encode()).digest()
            chosen = number + int.from_bytes(digest[:8], "big") % size
        if (number == chosen) == part:
            yield document
