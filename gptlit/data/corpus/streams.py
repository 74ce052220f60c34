"""Compressed files as streams of bytes.

The standard readers stop without an error at some kinds of damage: `bz2` and `lzma` where the second stream of a file
does not begin properly, `zstandard` where a file ends early. A shortened text would be trained on unnoticed, so the
decompressors are driven here, and everything that is not complete is an error.
"""

import bz2
import io
import lzma
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

READ_BYTES = 2**20  # bytes read from a file, or handed on, at a time
COMPRESSED_BYTES = 2**12  # compressed bytes expanded at a time: zstd makes up to 40 MB of them
ZSTD_WINDOW = 2**31  # bytes; the largest that `zstd --long` writes
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}


def open_bytes(path: Path, compression: str | None) -> Iterator[bytes]:
    """Yield the bytes of a file, decompressed, in chunks.

    Args:
        path: the file.
        compression: `gzip`, `bz2`, `xz`, `zstd`, or None for a plain file.

    Raises:
        EOFError: the compressed data ends early.
        ValueError: the compressed data is damaged.
        OSError: the file cannot be read.
    """
    with path.open("rb") as stream:
        if compression is None:
            yield from chunks_of(stream)
        else:
            yield from decompress(chunks_of(stream, COMPRESSED_BYTES), compression)


def chunks_of(stream: IO[bytes], size: int | None = None) -> Iterator[bytes]:
    """Yield what is left of a stream in chunks of `size` bytes, by default READ_BYTES."""
    while chunk := stream.read(size or READ_BYTES):
        yield chunk


def decompress(chunks: Iterable[bytes], compression: str) -> Iterator[bytes]:
    """Yield the decompressed bytes of one or more members, one after another; zeros after the last are padding.

    Raises:
        EOFError: the last member is incomplete.
        ValueError: a member is damaged, or there is something else after the last.
    """
    decompressor, complete, member = None, False, 0
    for chunk in chunks:
        while chunk:
            if decompressor is None:
                chunk = chunk.lstrip(b"\0") if complete else chunk
                if not chunk:
                    break
                decompressor, member = _decompressor(compression), member + 1
            try:
                yield from _expand(decompressor, chunk)
            except Exception as error:
                what = "the compressed data" if member == 1 else f"what follows compressed part {member - 1}"
                raise ValueError(f"{what} is damaged: {error}") from error
            complete = decompressor.eof
            chunk = decompressor.unused_data if complete else b""
            decompressor = None if complete else decompressor
    if not complete:
        raise EOFError("the compressed data ends early")


def _decompressor(compression: str) -> Any:
    if compression == "gzip":
        return zlib.decompressobj(wbits=31)
    if compression == "bz2":
        return bz2.BZ2Decompressor()
    if compression == "xz":
        return lzma.LZMADecompressor()
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj()


def _expand(decompressor: Any, chunk: bytes) -> Iterator[bytes]:
    if not hasattr(decompressor, "needs_input"):
        yield decompressor.decompress(chunk)
        return
    yield decompressor.decompress(chunk, READ_BYTES)
    while not (decompressor.eof or decompressor.needs_input):
        yield decompressor.decompress(b"", READ_BYTES)


class ByteStream(io.RawIOBase):
    """File object for reading an iterable of chunks, for libraries that want one."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks, self._left = iter(chunks), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._left = chunk
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size
