"""Bytes to text: UTF-8 in pieces, and one-line errors for files that are something else."""

import codecs
import io
import itertools
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gptlit.data.corpus.kinds import HEAD, not_text, not_utf8, refuse_coded_text, refuse_known_kind
from gptlit.data.corpus.streams import open_bytes
from gptlit.errors import UserError
from gptlit.tokenizer.bpe import SAFE_CUT

CUT_WITHIN = 2**12  # characters before the end of a piece that are searched for a place to cut
LONGEST_WORD = 2**23  # characters without any such place, after which a text is cut anywhere
UNREADABLE = (OSError, EOFError, ValueError)
SURROGATE = re.compile("[\ud800-\udfff]")


def decode(chunks: Iterable[bytes], where: str, line_ends: bool = True) -> Iterator[str]:
    """Decode UTF-8 in pieces: without byte order mark, every line end a `\\n`.

    Args:
        chunks: bytes of the file.
        where: name of the file, for errors.
        line_ends: whether `\\r\\n` and `\\r` become `\\n`.

    Raises:
        UserError: with the offset of the first byte that is not UTF-8, for a NUL character, and for files that are
            known to be something else.
    """
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=line_ends)
    seen, head, piece = 0, b"", ""
    for chunk in itertools.chain(chunks, (None,)):
        last, chunk = chunk is None, chunk or b""
        seen += len(chunk)
        if len(head) < HEAD:
            head += chunk[:HEAD]
            refuse_coded_text(head, where)
        try:
            piece = decoder.decode(chunk, final=last)
        except UnicodeDecodeError as error:
            refuse_known_kind(head, where)
            offset = seen - len(error.object) + error.start  # error.object ends where the stream has been read to
            raise not_utf8(where, error.object, error.start, offset, piece) from error
        if "\0" in piece:
            refuse_known_kind(head, where)
            raise not_text(where, piece)
        if piece:
            yield piece


def file_text(path: Path, compression: str | None, where: str) -> Iterator[str]:
    """Yield the text of one file in pieces; `compression` as in `open_bytes`."""
    with reading(where):
        yield from decode(open_bytes(path, compression), where)


def lines_of(pieces: Iterable[str]) -> Iterator[str]:
    """Yield the lines of a text, each with its `\\n`; only `\\n` ends a line."""
    rest: list[str] = []
    for piece in pieces:
        *lines, last = piece.split("\n")
        for line in lines:
            yield "".join((*rest, line, "\n"))
            rest = []
        rest.append(last)
    if text := "".join(rest):
        yield text


def clean(text: str) -> str:
    """Return a value of a table as text: line ends as `\\n`, halves of surrogate pairs as U+FFFD."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    try:
        text.encode()  # a tenth of the time of a search
    except UnicodeEncodeError:
        return SURROGATE.sub("\ufffd", text)
    return text


def recut(pieces: Iterable[str], size: int) -> Iterator[str]:
    """Yield the same text in pieces of about `size` characters, cut where `SAFE_CUT` allows it.

    Only where a text has no such place within LONGEST_WORD characters, it is cut anywhere.
    """
    held, length = [], 0
    for piece in pieces:
        held.append(piece)
        length += len(piece)
        if length < size:
            continue
        text = "".join(held)
        end = last_cut(text, length - CUT_WITHIN) or last_cut(text, 0)
        if not end and length >= LONGEST_WORD:
            end = length
        if end:
            yield text[:end]
        held, length = [text[end:]], length - end
    if rest := "".join(held):
        yield rest


def last_cut(text: str, start: int) -> int:
    """Return the last place after `start` where a text may be cut, or 0."""
    return max((cut.start() for cut in SAFE_CUT.finditer(text, max(0, start))), default=0)


@contextmanager
def reading(where: str, raised: type[Exception] | tuple[type[Exception], ...] = UNREADABLE) -> Iterator[None]:
    """Turn the exceptions of an unreadable file into a UserError."""
    try:
        yield
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(f"{where} cannot be read: no permission") from error
    except raised as error:
        root = error.__cause__ or error
        raise UserError(f"{where} cannot be read: {' '.join(str(root).split()) or type(root).__name__}") from error
