"""Files that are not UTF-8 texts: what they are by their bytes, and what helps."""

import codecs
import re

from gptlit.errors import UserError

HEAD = 512  # bytes of a file that tell what it is
TAR = "a tar archive"
SOUND = "a recording or a film"
MAGIC = (  # offset, first bytes, what the file is, what helps
    (30, b"[Content_Types].xml", "a Microsoft Office file", "save it as text, or a table as CSV"),
    (30, b"_rels/.rels", "a Microsoft Office file", "save it as text, or a table as CSV"),
    (30, b"mimetypeapplication/epub+zip", "an EPUB book", "extract its text, e.g. with pandoc -t plain"),
    (30, b"mimetypeapplication/vnd.oasis", "an OpenDocument file", "save it as text, or a table as CSV"),
    (0, b"PK\x03\x04", "a zip archive", "give it the ending .zip, or unpack it"),
    (0, b"\x1f\x8b", "a gzip file", "give it the ending .gz"),
    (0, b"BZh", "a bzip2 file", "give it the ending .bz2"),
    (0, b"\xfd7zXZ\0", "an xz file", "give it the ending .xz"),
    (0, b"\x28\xb5\x2f\xfd", "a Zstandard file", "give it the ending .zst"),
    (257, b"ustar", TAR, "give it the ending .tar, before that of a compression"),
    (0, b"PAR1", "a Parquet file", "give it the ending .parquet"),
    (0, b"ARROW1", "an Arrow file", "give it the ending .arrow"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (0, b"Rar!", "a RAR archive", "unpack it"),
    (0, b"%PDF-", "a PDF", "extract its text, e.g. with pdftotext"),
    (0, b"{\\rtf", "an RTF file", "save it as text"),
    (0, b"\xd0\xcf\x11\xe0", "an old Microsoft Office file", "save it as text"),
    (0, b"SQLite format 3\0", "an SQLite database", "export a column of it as CSV"),
    (0, b"\x93NUMPY", "a NumPy array", "give the text that it was made from"),
    (0, b"\x89HDF", "an HDF5 file", "export its text"),
    (0, b"\x89PNG", "a PNG picture", "give a text"),
    (0, b"\xff\xd8\xff", "a JPEG picture", "give a text"),
    (0, b"GIF8", "a GIF picture", "give a text"),
    (0, b"\x7fELF", "a program", "give a text"),
    (0, b"MThd", "a MIDI file", "write its notes as text, e.g. with midicsv or midi2abc"),
    (0, b"ID3", SOUND, "give a text"),
    (0, b"OggS", SOUND, "give a text"),
    (0, b"RIFF", SOUND, "give a text"),
    (0, b"bplist00", "a property list of Apple", "write it as JSON, e.g. with plutil"),
    (0, b"\xc6\xd74\x01", "a model file of llm.c", "give a text"),
    (0, b"\x88\xd84\x01", "a token file of llm.c", "give the text that it was made from"),
    (0, b"\xa1\xd94\x01", "a token file of llm.c", "give the text that it was made from"),
    (0, b"GGUF", "a GGUF model", "give a text"),
)
CODED = (b"%PDF-", b"{\\rtf")  # beginnings of files that may be ASCII, and are still not what a reader sees
BOMS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
DECLARED = re.compile(rb"""(?:charset|coding)\s*[=:]\s*["']?([A-Za-z][\w.:-]+)""")  # in HTML, XML and programs
CONTROLS = bytes({*range(1, 32)} - set(b"\t\n\x0b\x0c\r\x1a\x1b"))  # no text holds many of them
MANY_CONTROLS = 0.01  # as a share of all bytes
FOREIGN = 0.3  # share of bytes beyond ASCII, above which a text is not in a Latin script
DAMAGED = 4  # characters beyond ASCII for each invalid byte, from which on a text is UTF-8 with damage
LOOKED_AT = 2**16  # bytes before and after the first invalid one
FEW_NULS = 0.1  # as a share of all characters


def refuse_known_kind(head: bytes, where: str) -> None:
    """Raise a UserError that names the kind of a file that is not a text, if its first bytes tell."""
    for offset, magic, kind, remedy in MAGIC:
        if head[offset : offset + len(magic)] == magic:
            raise UserError(f"{where} is {kind}, not a text: {remedy}")


def refuse_coded_text(head: bytes, where: str) -> None:
    """Raise a UserError for formats that may be valid UTF-8, but code a text."""
    if head.startswith(CODED):
        refuse_known_kind(head, where)


def not_utf8(where: str, data: bytes, start: int, offset: int, before: str) -> UserError:
    """Return the error for bytes that are not UTF-8, with advice that does not spoil the text.

    Args:
        where: name of the file.
        data: a part of it, with that byte.
        start: of the first invalid byte in `data`.
        offset: of the first invalid byte in the file.
        before: text that was decoded before `data`.
    """
    what = f"{where} is not UTF-8: byte 0x{data[start]:02X} at offset {offset}"
    for bom, encoding in BOMS:
        if offset == 0 and data.startswith(bom):
            return UserError(f"{what}; convert it, e.g. iconv -f {encoding} -t UTF-8")
    declared = DECLARED.search((before.encode() or data)[:HEAD])
    if declared and declared[1].lower() not in (b"utf-8", b"utf8"):
        return UserError(f"{what}; convert it, as it says: iconv -f {declared[1].decode()} -t UTF-8")
    around = before[-LOOKED_AT:].encode() + data[max(0, start - LOOKED_AT) : start + LOOKED_AT]
    if len(around) - len(around.translate(None, CONTROLS + b"\0")) > MANY_CONTROLS * len(around):
        return UserError(f"{where} is not a text: it holds control bytes, as binary files do")
    text = around.decode("utf-8", "replace")
    invalid = text.count("\ufffd")
    if sum(not character.isascii() for character in text) - invalid >= DAMAGED * invalid:
        return UserError(f"{what}; the rest is UTF-8: leave such bytes out, e.g. iconv -c -f UTF-8 -t UTF-8")
    if len(around) - len(around.decode("ascii", "ignore")) > FOREIGN * len(around):
        return UserError(
            f"{what}; convert it from its encoding (GB18030, SHIFT_JIS, CP1251, …): iconv -f ENCODING -t UTF-8"
        )
    return UserError(f"{what}; convert it, e.g. iconv -f CP1252 -t UTF-8")


def not_text(where: str, piece: str) -> UserError:
    """Return the error for a piece of a file that holds NUL characters."""
    if piece.count("\0") < FEW_NULS * len(piece):
        return UserError(f"{where} holds NUL bytes: take them out, e.g. with tr -d '\\000', if it is a text otherwise")
    return UserError(f"{where} is not a text: it holds NUL bytes, as binary files and UTF-16 do")
