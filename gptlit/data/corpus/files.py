"""A file of any kind that gptlit reads, as units of text: a text file is one unit, a row of a table another."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath

from gptlit.data.corpus.archives import archive_kind, members
from gptlit.data.corpus.columnar import arrow_rows, parquet_rows
from gptlit.data.corpus.csv_tables import csv_rows
from gptlit.data.corpus.documents import Pieces
from gptlit.data.corpus.json_tables import json_rows
from gptlit.data.corpus.streams import COMPRESSIONS, open_bytes
from gptlit.data.corpus.text import decode, reading
from gptlit.data.corpus.token_folders import nanogpt_text
from gptlit.data.corpus.values import NoSuchColumnError
from gptlit.errors import UserError

ROW_FILES: dict[str, Callable[[Iterable[bytes], str, str], Iterator[str]]] = {
    ".jsonl": lambda chunks, column, where: json_rows(chunks, column, where, per_line=True),
    ".ndjson": lambda chunks, column, where: json_rows(chunks, column, where, per_line=True),
    ".json": lambda chunks, column, where: json_rows(chunks, column, where, per_line=False),
    ".csv": lambda chunks, column, where: csv_rows(chunks, column, where, ","),
    ".tsv": lambda chunks, column, where: csv_rows(chunks, column, where, "\t"),
}
COLUMN_FILES = {".parquet": parquet_rows, ".arrow": arrow_rows, ".feather": arrow_rows}
TABLES = frozenset({*ROW_FILES, *COLUMN_FILES})

Tally = dict[str, tuple[int, int, int]]
"""By the name of a table that was read to its end: rows, those without text, and the number of the first of them."""


def inner_name(name: str) -> tuple[str, str | None]:
    """Return the name of a file without the ending of a compression, and that compression."""
    path = PurePosixPath(name)
    compression = COMPRESSIONS.get(path.suffix.lower())
    return (path.stem if compression else path.name), compression


def ending(name: str) -> str:
    """Return the ending that tells the kind of a file: `.jsonl` of `a.jsonl.gz`."""
    return PurePosixPath(inner_name(name)[0]).suffix.lower()


def is_table(name: str) -> bool:
    """Return whether a file has rows, by its name."""
    return archive_kind(name) is None and ending(name) in TABLES


def rows_with_text(rows: Iterable[str], where: str, tally: Tally) -> Iterator[Pieces]:
    """Yield the rows of a table that have text, each as a unit; at the end of the table count them all."""
    count = empty = first = 0
    for text in rows:
        count += 1
        if text:
            yield [text]
        else:
            empty += 1
            first = first or count
    tally[where] = count, empty, first


def members_of(path: Path, column: str, where: str, chosen: frozenset[str], tally: Tally) -> Iterator[Iterator[Pieces]]:
    """Yield the chosen members of an archive, each as the iterator of its units."""
    with reading(where, Exception):
        for name, chunks in members(path, where):
            if name in chosen:
                yield stream_units(name, chunks, column, f"{name} in {where}", tally)


def units_of(path: Path, column: str, where: str, tally: Tally) -> Iterator[Pieces]:
    """Yield the units of a file that is not an archive, read as its name says.

    Args:
        path: the file.
        column: of the text in tables.
        where: the file's name, for errors.
        tally: takes the numbers of rows.
    """
    kind = ending(path.name)
    inner, compression = inner_name(path.name)
    if kind in COLUMN_FILES:
        if compression:
            raise UserError(f"{where} is compressed as a whole, which cannot be read by columns: unpack it")
        yield from rows_with_text(COLUMN_FILES[kind](path, column, where), where, tally)
    elif kind == ".bin":
        yield guarded(nanogpt_text(path, where), where)
    else:
        yield from stream_units(inner, open_bytes(path, compression), column, where, tally)


def stream_units(name: str, chunks: Iterable[bytes], column: str, where: str, tally: Tally) -> Iterator[Pieces]:
    """Yield the units of a text, JSON or CSV file from its bytes."""
    read = ROW_FILES.get(PurePosixPath(name).suffix.lower())
    if read is None:
        yield guarded(decode(chunks, where), where)
    else:
        yield from rows_with_text(guarded(read(chunks, column, where), where), where, tally)


def guarded(texts: Iterator[str], where: str) -> Iterator[str]:
    """Yield the same texts; what is raised for an unreadable file becomes a UserError."""
    with reading(where):
        yield from texts


def select_members(path: Path, column: str, where: str) -> tuple[frozenset[str], dict[str, str]]:
    """Return the members of an archive that are read, and the others with the reason, if it is not their kind.

    Those that are text files or tables by their names; else those without an ending; else the only one.

    Raises:
        UserError: the archive cannot be read, or there are only tables without the column.
    """
    names, lacking = list[str](), dict[str, UserError]()
    with reading(where, Exception):
        for name, chunks in members(path, where):
            names.append(name)
            if (
                is_table(name)
                and readable(name)
                and (error := column_error(stream_units(name, chunks, column, f"{name} in {where}", {})))
            ):
                lacking[name] = error
    known = [name for name in names if readable(name) and name not in lacking]
    plain = known or [name for name in names if not PurePosixPath(name).suffix] or (names if len(names) == 1 else [])
    chosen = frozenset(plain) - lacking.keys()
    if lacking and not chosen:
        raise next(iter(lacking.values()))
    others = (name for name in names if name not in chosen)
    return chosen, {name: without(column) if name in lacking else unpacked(name) for name in others}


def column_error(units: Iterator[Pieces]) -> NoSuchColumnError | None:
    """Return the error of a table that lacks the column. Other errors are raised when it is read."""
    try:
        next(units, None)
    except NoSuchColumnError as error:
        return error
    except UserError:
        pass
    return None


def without(column: str) -> str:
    """Return why a table is left out."""
    return f"without a column {column!r}"


def unpacked(name: str) -> str:
    """Return why a member of an archive is left out, where it is of a kind that can be read."""
    return "to be unpacked" if is_table(name) or archive_kind(name) else ""


def readable(name: str) -> bool:
    """Return whether a member of an archive is a text or a table that can be read from a stream, by its name."""
    return PurePosixPath(name).suffix.lower() in {".txt", *ROW_FILES}
