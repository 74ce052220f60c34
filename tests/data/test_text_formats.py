"""Every format gives exactly the text that was written into it, and damage is an error."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
import zstandard
from command import report
from corpora import own_cache, refusal, text_of

from gptlit.data.corpus.streams import ByteStream, decompress

VERSES = [
    'She said "no",\nand left.',
    "To learn a tongue,\n\none letter at a time — naïve, 日本語, 🙂",
    "\tindented, 007, TRUE, null, NA, 2020-01-01\n",
    "नमस्ते; \u0627\u0644\u0633\u0644\u0627\u0645 \u2028 \x0b \x85",
]
TEXT = "\n".join(VERSES)
JSON_LINES = "".join(json.dumps({"n": i, "text": text}) + "\n" for i, text in enumerate(VERSES)).encode()
JSON_ARRAY = json.dumps([{"text": text} for text in VERSES], indent=1).encode()
ROWS = "\n\n".join(VERSES).replace("2020-01-01\n\n\n", "2020-01-01\n\n")  # a blank line between two rows


@pytest.fixture(autouse=True)
def here(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and an empty cache."""
    own_cache(tmp_path_factory, monkeypatch)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def zstd(data: bytes, window_log: int | None = None) -> bytes:
    """Compress as a stream, of which the size is not known beforehand; `zstd --long=N` sets a window of 2**N bytes."""
    parameters = {} if window_log is None else {"window_log": window_log, "enable_ldm": True}
    compressor = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(compression_level=1, **parameters)
    ).compressobj()
    return compressor.compress(data) + compressor.flush()


def as_text(path: Path) -> None:
    path.write_text(TEXT, encoding="utf-8")


def packed(pack: Callable[[bytes], bytes], content: bytes = TEXT.encode()) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(pack(content))


def as_csv(delimiter: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, delimiter=delimiter)
            writer.writerows([("n", "text"), *enumerate(VERSES)])

    return write


def table(kind: pyarrow.DataType | None) -> pyarrow.Table:
    column = pyarrow.array(VERSES)
    return pyarrow.table({"n": [1, 2, 3, 4], "text": column.dictionary_encode() if kind is None else column.cast(kind)})


def as_parquet(kind: pyarrow.DataType | None) -> Callable[[Path], None]:
    return lambda path: pyarrow.parquet.write_table(table(kind), path)


def as_arrow(make: Callable[..., pyarrow.ipc.RecordBatchStreamWriter]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with make(str(path), table(pyarrow.string_view()).schema) as writer:
            writer.write_table(table(pyarrow.string_view()), max_chunksize=3)

    return write


def as_dataset(path: Path) -> None:
    datasets.Dataset.from_dict({"text": VERSES}).save_to_disk(path)


def as_splits(path: Path) -> None:
    data = datasets.Dataset.from_dict({"text": VERSES})
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(path)


def as_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("folder/text.txt", TEXT)


def zip_of(name: str, content: str = "x") -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(name, content)
    return stream.getvalue()


def as_tar(pack: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w") as archive:
            member = tarfile.TarInfo("folder/text.txt")
            member.size = len(TEXT.encode())
            archive.addfile(member, io.BytesIO(TEXT.encode()))
        path.write_bytes(pack(content.getvalue()))

    return write


def as_nanogpt(path: Path) -> None:
    import pickle

    path.mkdir()
    letters = sorted(set(TEXT))
    ids = np.array([letters.index(character) for character in TEXT], np.uint16)
    ids[:40].tofile(path / "train.bin")
    ids[40:].tofile(path / "val.bin")
    (path / "meta.pkl").write_bytes(pickle.dumps({"itos": dict(enumerate(letters))}))


FORMATS: list[tuple[str, str, Callable[[Path], object], str]] = [
    ("a.txt", "UTF-8 text", as_text, TEXT),
    ("a.txt.gz", "gzip", packed(gzip.compress), TEXT),
    ("b.txt.gz", "gzip, padded with zeros", packed(lambda data: gzip.compress(data) + bytes(512)), TEXT),
    ("c.txt.gz", "gzip of two members", packed(lambda d: gzip.compress(d[:30]) + gzip.compress(d[30:])), TEXT),
    ("a.txt.bz2", "bzip2", packed(bz2.compress), TEXT),
    ("b.txt.bz2", "bzip2 of two streams", packed(lambda d: bz2.compress(d[:30]) + bz2.compress(d[30:])), TEXT),
    ("a.txt.xz", "xz", packed(lzma.compress), TEXT),
    ("a.txt.zst", "Zstandard", packed(zstd), TEXT),
    ("b.txt.zst", "Zstandard, window of 2 GiB (`--long=31`)", packed(lambda data: zstd(data, 31)), TEXT),
    ("c.txt.zst", "Zstandard of two frames", packed(lambda d: zstd(d[:30]) + zstd(d[30:])), TEXT),
    ("a.zip", "zip", as_zip, TEXT),
    ("a.tar", "tar", as_tar(bytes), TEXT),
    ("a.tar.gz", "tar, gzip", as_tar(gzip.compress), TEXT),
    ("a.txz", "tar, xz", as_tar(lzma.compress), TEXT),
    ("a.tar.zst", "tar, Zstandard", as_tar(zstd), TEXT),
    ("a.jsonl", "JSON Lines", packed(bytes, JSON_LINES), ROWS),
    ("a.ndjson", "JSON Lines", packed(bytes, JSON_LINES), ROWS),
    ("a.jsonl.zst", "JSON Lines, Zstandard", packed(zstd, JSON_LINES), ROWS),
    ("a.json", "JSON array", packed(bytes, JSON_ARRAY), ROWS),
    ("b.json", "JSON objects, one after another", packed(bytes, JSON_LINES), ROWS),
    ("a.csv", "CSV", as_csv(","), ROWS),
    ("b.csv", "CSV with semicolons", as_csv(";"), ROWS),
    ("a.tsv", "TSV", as_csv("\t"), ROWS),
    ("a.parquet", "Parquet, string", as_parquet(pyarrow.string()), ROWS),
    ("b.parquet", "Parquet, large_string", as_parquet(pyarrow.large_string()), ROWS),
    ("c.parquet", "Parquet, string_view", as_parquet(pyarrow.string_view()), ROWS),
    ("d.parquet", "Parquet, binary", as_parquet(pyarrow.binary()), ROWS),
    ("e.parquet", "Parquet, dictionary", as_parquet(None), ROWS),
    ("a.arrow", "Arrow file", as_arrow(pyarrow.ipc.new_file), ROWS),
    ("b.arrow", "Arrow stream", as_arrow(pyarrow.ipc.new_stream), ROWS),
    ("a.feather", "Feather", lambda path: pyarrow.feather.write_feather(table(pyarrow.string()), path), ROWS),
    ("saved", "folder of `Dataset.save_to_disk`", as_dataset, ROWS),
    ("splits", "folder of `DatasetDict.save_to_disk`", as_splits, ROWS),
    ("shakespeare_char", "data folder of nanoGPT", as_nanogpt, TEXT),
]


@pytest.mark.parametrize(("name", "kind", "write", "expected"), FORMATS, ids=[kind for _, kind, _, _ in FORMATS])
def test_the_decoded_text_is_the_text_that_was_written(
    here: Path, name: str, kind: str, write: Callable[[Path], object], expected: str
) -> None:
    write(here / name)
    text = text_of(name)
    report(
        "formats",
        ("format", "named", "unit", "characters", "equal to the text that was written"),
        kind,
        f"`{name}`",
        "text" if expected is TEXT else "rows",
        len(text),
        "yes" if text == expected else "no",
    )
    assert text == expected


@pytest.mark.parametrize(
    ("kind", "pack"), [("gzip", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress), ("zstd", zstd)]
)
@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_damaged_compressed_data_is_an_error_and_never_a_shorter_text(
    kind: str, pack: Callable[[bytes], bytes], size: int
) -> None:
    """bz2 and lzma ignore a second stream with a damaged beginning, and zstandard a missing end."""

    def read(content: bytes) -> bytes:
        return b"".join(decompress([content[i : i + size] for i in range(0, len(content), size)], kind))

    text = os.urandom(1500).hex().encode()
    whole = pack(text)
    assert read(whole) == text
    assert read(whole + whole) == text * 2
    assert read(whole + bytes(100)) == text
    for damaged in (whole[:-9], whole + whole[:-9], whole + b"XX" + whole[2:], b"", text):
        with pytest.raises((EOFError, ValueError)):
            read(damaged)


def test_a_damaged_compressed_file_is_refused_by_name(here: Path) -> None:
    (here / "half.txt.gz").write_bytes(gzip.compress(os.urandom(5000).hex().encode())[:2000])
    (here / "half.txt.zst").write_bytes(zstd(os.urandom(5000).hex().encode())[:2000])
    (here / "not.txt.gz").write_bytes(b"plain text")
    for name in ("half.txt.gz", "half.txt.zst", "not.txt.gz"):
        assert refusal(name).startswith(f"corpus {name} cannot be read: ")


def test_a_stream_of_chunks_reads_like_a_file() -> None:
    stream = io.BufferedReader(ByteStream(iter([b"ab", b"", b"cdef", b"g"])), buffer_size=3)
    assert (stream.read(3), stream.read()) == (b"abc", b"defg")


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"PK\x03\x04\0\0", "a zip archive, not a text: give it the ending .zip"),
        (gzip.compress(b"x", mtime=0), "a gzip file"),
        (bz2.compress(b"x" * 1000), "a bzip2 file"),
        (lzma.compress(b"x"), "an xz file"),
        (zstandard.compress(b"x" * 1000), "a Zstandard file"),
        (b"PAR1" + b"\xff" * 9, "a Parquet file"),
        (b"%PDF-1.7\n\xff\xff", "a PDF, not a text: extract its text"),
        (b"SQLite format 3\0", "an SQLite database"),
        (b"\x89PNG\r\n", "a PNG picture"),
        (b"\0" * 257 + b"ustar", "a tar archive"),
        (b"%PDF-1.4\n1 0 obj\n", "a PDF, not a text: extract its text"),
        (rb"{\rtf1\ansi Caf\'e9.}", "an RTF file, not a text: save it as text"),
        (zip_of("[Content_Types].xml"), "a Microsoft Office file, not a text: save it as text"),
        (zip_of("mimetype", "application/epub+zip"), "an EPUB book"),
        (zip_of("mimetype", "application/vnd.oasis.opendocument.text"), "an OpenDocument file"),
        (b"MThd\0\0\0\6\0\1", "a MIDI file, not a text: write its notes as text"),
        (b"ID3\4\0\0\xff", "a recording or a film"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # packed bytes hold the time
)
def test_a_file_that_is_not_a_text_is_named(here: Path, content: bytes, kind: str) -> None:
    """Advice to convert the encoding of a zip archive leads nowhere."""
    (here / "notes.txt").write_bytes(content)
    message = refusal("notes.txt")
    assert message.startswith(f"corpus notes.txt is {kind}")
    assert "iconv" not in message


def test_other_binary_files_are_refused(here: Path) -> None:
    (here / "weights.txt").write_bytes(b"\x01\0\x02")
    assert (
        refusal("weights.txt") == "corpus weights.txt is not a text: it holds NUL bytes, as binary files and UTF-16 do"
    )
    (here / "weights.pkl").write_bytes(b"\x80\x04]\x94(\x8c\x01a\x94e.")
    assert refusal("weights.pkl") == "corpus weights.pkl is not a text: it holds control bytes, as binary files do"
