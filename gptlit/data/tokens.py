"""The token file: a text as token ids on disk, memory-mapped, so that a text may be larger than memory.

| in this order | as |
|---|---|
| ids of the training part, then those of the validation part | uint8, uint16 or uint32 |
| a CRC-32 for every 64 KiB of ids | uint32 |
| the description: type of the ids, number of them in each part, CRC-32 of the table | JSON |
| length of the description, and its CRC-32 | uint32 |
| `gptlit01` | 8 bytes |

All numbers are little-endian. The description comes last, so that ids can be appended while a text is read.
"""

import json
import mmap
import os
import struct
import time
import zlib
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from gptlit.checkpoint.atomic import flush_to_disk, rename
from gptlit.data.cache import read_record, write_record
from gptlit.errors import UserError

MAGIC = b"gptlit01"
END = struct.Struct("<II8s")  # length of the description, its CRC-32, MAGIC
BLOCK = 2**16  # bytes that share a checksum: about what a disk reads at a time anyway
SPOT_CHECKS = 64  # blocks checked when a file is opened; the others are checked when they are first read
MAPPED_BYTES = 2**27  # of the file, that may count as memory of this process before they are released
FAULT_AROUND = 2**16  # bytes that Linux maps around the first byte touched
SAVE_SECONDS = 3.0  # between two saves of a writer's progress


class DamagedFileError(Exception):
    """The bytes of a file are not those that were written."""


class TokenFile:
    """A complete token file, opened for reading; `parts` are its training and validation ids.

    Description, table and a sample of the blocks are checked at once, every other block when it is first read. So
    opening takes no longer for a larger file, and no id is used unchecked.

    Args:
        path: the file.

    Raises:
        DamagedFileError: the file is incomplete or changed.
        OSError: there is no file, or it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as stream:
            if os.fstat(stream.fileno()).st_size < END.size:
                raise DamagedFileError("cut short")
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        end = len(self._map) - END.size
        length, checksum, magic = END.unpack(self._map[end:])
        description = self._map[max(0, end - length) : end]
        if magic != MAGIC or zlib.crc32(description) != checksum:
            raise DamagedFileError("cut short, or no token file")
        fields = json.loads(description)
        dtype, lengths = np.dtype(fields["dtype"]), fields["lengths"]
        self._size = sum(lengths) * dtype.itemsize  # bytes of ids
        blocks = -(-self._size // BLOCK)
        table = self._map[self._size : self._size + 4 * blocks]
        if len(self._map) != self._size + 4 * blocks + length + END.size or zlib.crc32(table) != fields["table"]:
            raise DamagedFileError("of another length than it says, or its table of checksums has changed")
        self._ids = np.frombuffer(self._map, dtype, sum(lengths))
        self._checksums = np.frombuffer(table, "<u4")
        self._checked = np.zeros(blocks, bool)
        self._mapped = 0
        self.parts = (StoredTokens(self, 0, lengths[0]), StoredTokens(self, lengths[0], lengths[1]))
        self._check(np.unique(np.linspace(0, blocks - 1, SPOT_CHECKS).astype(np.int64)))

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenFile, (self.path,)

    def read(self, positions: np.ndarray) -> np.ndarray:
        """Return the ids at `positions`, of the same shape.

        Raises:
            UserError: one of them is in a damaged block; the file is removed.
        """
        blocks = positions * self._ids.itemsize // BLOCK
        unchecked = ~self._checked[blocks]
        if unchecked.any():
            try:
                self._check(np.unique(blocks[unchecked]))
            except DamagedFileError as error:
                self.path.unlink(missing_ok=True)
                raise UserError(
                    f"the token file {self.path} was damaged ({error}) and is removed: start again to rewrite it"
                ) from error
        ids = self._ids[positions]
        self._mapped += len(positions) * FAULT_AROUND + ids.nbytes
        if self._mapped > MAPPED_BYTES:
            self._hand_back()
        return ids

    def _check(self, blocks: np.ndarray) -> None:
        for block in blocks.tolist():
            start = block * BLOCK
            if zlib.crc32(self._map[start : min(start + BLOCK, self._size)]) != self._checksums[block]:
                raise DamagedFileError(f"the bytes from {start:,} on have changed")
            self._checked[block] = True
            self._mapped += BLOCK

    def _hand_back(self) -> None:
        """Release the mapped pages; they stay in the page cache, which does not count as memory of the process."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
        self._mapped = 0


class StoredTokens:
    """A part of a token file: (N,) ids; `tokens[positions]` reads some, as from an array."""

    def __init__(self, file: TokenFile, start: int, length: int) -> None:
        self.file, self._start, self._length = file, start, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        if positions.size and not 0 <= positions.min() <= positions.max() < self._length:
            raise IndexError(f"positions run from 0 to {self._length - 1}")
        return self.file.read(positions + self._start)


class TokenWriter:
    """Appends ids to `<path>.part`, which becomes `path` when it is complete. A context manager.

    Continues where an interrupted writer of the same path stopped: `pieces` is the number of pieces already there.

    Args:
        path: of the file; its name must determine the ids.
        dtype: of the ids, `uint8`, `uint16` or `uint32`.
    """

    def __init__(self, path: Path, dtype: str) -> None:
        self.path = path
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.pieces = 0
        self.lengths = [0, 0]
        self._checksum = 0  # of all ids so far
        self._part, self._notes = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.notes")
        self._stream: IO[bytes] = self._part.open("r+b" if self._part.exists() else "w+b")
        self._take_over()
        self._saved = time.monotonic()

    def __enter__(self) -> "TokenWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._stream.closed:
            try:
                self._save()
            finally:
                self._stream.close()

    def append(self, part: int, ids: np.ndarray) -> None:
        """Write the ids of the next piece of the training (0) or, when that is complete, the validation part (1)."""
        content = np.ascontiguousarray(ids, self.dtype).tobytes()
        self._stream.write(content)
        self._checksum = zlib.crc32(content, self._checksum)
        self.lengths[part] += len(ids)
        self.pieces += 1
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self._save()

    def finish(self) -> None:
        """Add checksums and description; the file gets its name once it is complete on the disk.

        Raises:
            OSError: the disk is full, or returns other bytes than were written.
        """
        size = sum(self.lengths) * self.dtype.itemsize
        checksums, checksum = block_checksums(self._stream, size)
        if checksum != self._checksum:
            raise OSError(None, "the disk returns other bytes than were written")
        table = checksums.tobytes()
        fields = {"dtype": self.dtype.str, "lengths": self.lengths, "table": zlib.crc32(table)}
        description = json.dumps(fields).encode()
        self._stream.seek(size)
        self._stream.write(table + description + END.pack(len(description), zlib.crc32(description), MAGIC))
        flush_to_disk(self._stream)
        self._stream.close()
        rename(self._part, self.path)
        self._notes.unlink(missing_ok=True)

    def _take_over(self) -> None:
        notes = read_record(self._notes)
        if notes and notes["dtype"] == self.dtype.str:
            size = sum(notes["lengths"]) * self.dtype.itemsize
            if block_checksums(self._stream, size)[1] == notes["checksum"]:
                self.pieces, self.lengths, self._checksum = notes["pieces"], notes["lengths"], notes["checksum"]
        self._stream.truncate(sum(self.lengths) * self.dtype.itemsize)
        self._stream.seek(0, os.SEEK_END)

    def _save(self) -> None:
        self._stream.flush()
        notes = {"pieces": self.pieces, "lengths": self.lengths, "checksum": self._checksum, "dtype": self.dtype.str}
        write_record(self._notes, notes)
        self._saved = time.monotonic()


def block_checksums(stream: IO[bytes], size: int) -> tuple[np.ndarray, int]:
    """Return the CRC-32 of each block of the first `size` bytes, and of all of them."""
    stream.seek(0)
    found, whole = np.zeros(-(-size // BLOCK), "<u4"), 0
    for number in range(len(found)):
        block = stream.read(min(BLOCK, size - number * BLOCK))
        found[number], whole = zlib.crc32(block), zlib.crc32(block, whole)
    return found, whole
