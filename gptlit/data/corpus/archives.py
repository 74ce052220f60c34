"""Zip and tar archives: the files in them, each as a stream of bytes."""

import io
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from gptlit.data.corpus.streams import COMPRESSIONS, ByteStream, chunks_of, open_bytes
from gptlit.errors import UserError

TAR_ENDINGS = {".tgz": "gzip", ".tbz2": "bz2", ".txz": "xz", ".tzst": "zstd"}


def archive_kind(name: str) -> tuple[str, str | None] | None:
    """Return `zip` or `tar` and the compression around it, as the name of a file says; None for other files."""
    path = PurePosixPath(name.lower())
    if path.suffix == ".zip":
        return "zip", None
    if path.suffix in TAR_ENDINGS:
        return "tar", TAR_ENDINGS[path.suffix]
    compression = COMPRESSIONS.get(path.suffix)
    if (path.with_suffix("") if compression else path).suffix == ".tar":
        return "tar", compression
    return None


def members(path: Path, where: str) -> Iterator[tuple[str, Iterator[bytes]]]:
    """Yield name and bytes of every file in an archive, in its order; hidden files are left out.

    The bytes of one member must be read, or left, before the next is asked for.

    Raises:
        UserError: a member is encrypted.
        OSError, ValueError, tarfile.TarError, zipfile.BadZipFile: unreadable or damaged.
    """
    kind = archive_kind(path.name)
    assert kind is not None
    if kind[0] == "zip":
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.is_dir() or hidden(entry.filename):
                    continue
                if entry.flag_bits & 1:
                    raise UserError(f"{where} is encrypted: unpack it")
                yield entry.filename, _zip_member(archive, entry)
        return
    source = io.BufferedReader(ByteStream(open_bytes(path, kind[1])))
    with tarfile.open(fileobj=source, mode="r|") as tar:
        for item in tar:
            if item.isfile() and not hidden(item.name):
                stream = tar.extractfile(item)
                assert stream is not None
                yield item.name, chunks_of(stream)


def _zip_member(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Iterator[bytes]:
    with archive.open(entry) as stream:
        yield from chunks_of(stream)


def hidden(name: str) -> bool:
    """Return whether a file, or a folder above it, is one that desktops do not show."""
    return any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts if part != ".")
