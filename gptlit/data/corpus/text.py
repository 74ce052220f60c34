"""From bytes and tables to text. A document is an iterable of pieces, so that a large file is never in memory whole."""

import codecs
import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from gptlit.errors import UserError
from gptlit.tokenizer.bpe import SAFE_CUT

READ_BYTES = 2**22
CUT_WITHIN = 2**12  # characters before the end of a piece in which a place to cut is looked for
ROWS = 1000  # rows of a table read at a time
UNREADABLE = (OSError, EOFError, ValueError)  # of `open` and of pyarrow


def decode(stream: IO[bytes], where: str) -> Iterator[str]:
    """The text of a stream of UTF-8, in pieces: no byte order mark, every line end a `\\n`.

    Raises `UserError` with the offset of the first byte that is no UTF-8, and for NUL characters.
    """
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    seen = 0
    while True:
        chunk = stream.read(READ_BYTES)
        seen += len(chunk)
        try:
            piece = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            offset = seen - len(error.object) + error.start  # error.object ends where the stream has been read to
            utf16 = offset == 0 and error.object[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
            raise UserError(
                f"{where} is not UTF-8: byte 0x{error.object[error.start]:02X} at offset {offset}; convert it, "
                f"e.g. iconv -f {'UTF-16' if utf16 else 'LATIN1'} -t UTF-8"
            ) from error
        if "\0" in piece:
            raise UserError(f"{where} is not a text: it holds NUL bytes, as binary files and UTF-16 do")
        yield piece
        if not chunk:
            return


def file_document(path: Path, compression: str | None, where: str) -> Iterator[str]:
    """The text of one file, in pieces; `compression` is null, `gzip`, `bz2` or `zstd`."""
    with reading(where):
        if compression is None:
            with path.open("rb") as stream:
                yield from decode(stream, where)
        else:
            import pyarrow

            with pyarrow.input_stream(str(path), compression=compression) as stream:
                yield from decode(stream, where)


def table_documents(dataset: Any, column: str, where: str) -> Iterator[list[str]]:
    """The rows of a `datasets` table, each a document; rows without text are passed over."""
    import pyarrow.types

    with reading(where, Exception):
        for table in dataset.with_format("arrow").iter(batch_size=ROWS):
            if column not in table.column_names:
                raise UserError(
                    f"{where} has no column {column!r}, but {', '.join(table.column_names)}: set --data.text_column"
                )
            kind = table.schema.field(column).type
            if not (
                pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_null(kind)
            ):
                raise UserError(f"column {column!r} of {where} holds {kind}, not text: set --data.text_column")
            for text in table.column(column).to_pylist():
                if text:
                    yield [text.replace("\r\n", "\n").replace("\r", "\n")]


def join(documents: Iterable[Iterable[str]]) -> Iterator[str]:
    """Documents one after another with a blank line between them: two newlines, less those that the earlier ends in."""
    end = ""  # the last two characters so far
    for document in documents:
        first = True
        for piece in document:
            if not piece:
                continue
            if first and end:
                yield "\n" * (len(end.rstrip("\n")) + 2 - len(end))
            first = False
            yield piece
            end = (end + piece[-2:])[-2:]


def recut(pieces: Iterable[str], size: int) -> Iterator[str]:
    """The same text in pieces of about `size` characters, each cut at the last place where words end."""
    held, length = [], 0
    for piece in pieces:
        held.append(piece)
        length += len(piece)
        if length >= size:
            text = "".join(held)
            cuts = [cut.start() for cut in SAFE_CUT.finditer(text, max(0, len(text) - CUT_WITHIN))]
            end = cuts[-1] if cuts else len(text)
            yield text[:end]
            held, length = [text[end:]], len(text) - end
    if rest := "".join(held):
        yield rest


@contextmanager
def reading(where: str, raised: type[Exception] | tuple[type[Exception], ...] = UNREADABLE) -> Iterator[None]:
    """Turns what is raised for an unreadable file into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(f"no permission to read {where}") from error
    except raised as error:
        root = error.__cause__ or error
        raise UserError(f"cannot read {where}: {' '.join(str(root).split()) or type(root).__name__}") from error
