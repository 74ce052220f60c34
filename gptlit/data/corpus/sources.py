"""What the user names, as something that can be read."""

import difflib
import glob
import hashlib
import importlib.resources
import re
import stat
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from gptlit.data.corpus.download import fetch, open_hub, open_table
from gptlit.data.corpus.text import decode, file_document, reading, table_documents
from gptlit.errors import UserError

TINYSHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINYSHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
TABLES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
HUB_ID = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[^#:]+))?(#(?P<split>.+))?")


@dataclass(frozen=True)
class Source:
    """One spec: its short name, where it is in words, and a function that opens its documents."""

    name: str
    words: str
    documents: Callable[[], Iterator[Iterable[str]]]
    files: tuple[Path, ...] = ()
    """On this machine, where the text is read from; none for the packaged play."""
    streamed: bool = False
    """Whether reading it again means fetching it again."""


def resolve(
    spec: str | list[str], *, text_column: str, cache_dir: Path | None, streaming: bool = False
) -> list[Source]:
    """What each spec stands for; downloads what has to be downloaded.

    - `tinyshakespeare`: the text of the lecture, from karpathy/char-rnn, checked by its SHA-256
    - `sample`: the play in the package
    - a file: text, or `.json` `.jsonl` `.csv` `.parquet` with a column `text_column`; may be `.gz` `.bz2` `.zst`
    - a folder: every `*.txt` in it and below, in the order of their paths, hidden ones left out
    - a glob such as `texts/**/*.md`, in the order of the paths
    - `https://…` or `http://…`: a file as above
    - `owner/name` or `hf://owner/name`, then `:config` and `#split` if need be: a data set of the Hugging Face Hub

    Raises `UserError` when it is none of these, `NetworkError` when the network is out of reach.
    """
    specs = [spec] if isinstance(spec, str) else spec
    if not specs or not all(specs):
        raise UserError("data.corpus is empty: name a text, e.g. --data.corpus sample")
    return [_resolve(one, text_column, cache_dir, streaming) for one in specs]


def _resolve(spec: str, text_column: str, cache_dir: Path | None, streaming: bool) -> Source:  # noqa: C901
    if spec == "tinyshakespeare":
        return _tinyshakespeare(cache_dir)
    if spec == "sample":
        return Source("sample", "the sample play", _sample)
    if spec.startswith("hf://"):
        return _hub(spec.removeprefix("hf://").removeprefix("datasets/"), text_column, cache_dir, streaming)
    if spec.startswith(("http://", "https://")):
        return _url(spec, text_column, cache_dir)
    if "://" in spec:
        raise UserError(
            f"data.corpus {spec!r}: only http://, https:// and hf:// are known; download it and give the file"
        )

    path = Path(spec).expanduser()
    try:
        mode = path.stat().st_mode
    except PermissionError as error:
        raise UserError(f"no permission to read {spec}") from error
    except (OSError, ValueError):  # ValueError: a NUL in the name
        mode = 0
    if stat.S_ISDIR(mode):
        return _folder(path, spec)
    if mode:
        return _files([path], _stem(path.name), spec, text_column, cache_dir)
    if glob.has_magic(spec):
        paths = [Path(found) for found in sorted(glob.glob(str(path), recursive=True)) if Path(found).is_file()]
        if paths:
            return _files(paths, spec, _count(paths, spec), text_column, cache_dir)
    if _may_be_hub(spec, path):
        return _hub(spec, text_column, cache_dir, streaming)
    if glob.has_magic(spec):
        raise UserError(f"data.corpus {spec!r} matches no file")
    raise UserError(f"data.corpus: {_missing(spec, path)}")


def _tinyshakespeare(cache_dir: Path | None) -> Source:
    path = fetch(TINYSHAKESPEARE_URL, "tinyshakespeare", cache_dir, known_good=True)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != TINYSHAKESPEARE_SHA256:
        path.unlink(missing_ok=True)
        raise UserError(
            f"tinyshakespeare came damaged: {path} had sha256 {digest}, not {TINYSHAKESPEARE_SHA256}, and was removed; "
            "run again to download it anew, or use --data.corpus sample"
        )
    return Source(
        "tinyshakespeare",
        "tinyshakespeare of karpathy/char-rnn",
        lambda: iter([file_document(path, None, str(path))]),
        (path,),
    )


def _sample() -> Iterator[Iterable[str]]:
    with importlib.resources.files("gptlit").joinpath("assets/play.txt").open("rb") as stream:
        yield decode(stream, "the sample play")


def _url(url: str, text_column: str, cache_dir: Path | None) -> Source:
    path = fetch(url, url, cache_dir)
    address = PurePosixPath(urllib.parse.urlsplit(url).path)
    with path.open("rb") as stream:
        beginning = stream.read(64).lstrip().lower()
    if beginning.startswith((b"<!doctype html", b"<html")) and address.suffix not in (".html", ".htm"):
        path.unlink(missing_ok=True)
        raise UserError(f"{url} is a web page, not a text: give the address of the raw file")
    return _files([path], _stem(address.name) or url, url, text_column, cache_dir)


def _folder(folder: Path, spec: str) -> Source:
    found = glob.glob("**/*", root_dir=folder, recursive=True)
    paths = [folder / name for name in sorted(found) if name.endswith(".txt") and (folder / name).is_file()]
    if not paths:
        others = sorted({Path(name).suffix for name in found} - {""})
        seen = f", but {' '.join(others[:5])}" if others else ""
        raise UserError(f"the folder {spec} has no *.txt in it or below{seen}: give a glob, e.g. '{spec}/**/*.md'")
    return _files(paths, folder.resolve().name, _count(paths, spec), "", None)


def _files(paths: list[Path], name: str, words: str, text_column: str, cache_dir: Path | None) -> Source:
    """Files, each read as its name says."""

    def documents() -> Iterator[Iterable[str]]:
        for path in paths:
            where = words if len(paths) == 1 else str(path)
            inner, compression = _uncompressed(path.name)
            table = TABLES.get(PurePosixPath(inner).suffix.lower())
            if table is None:
                yield file_document(path, compression, where)
            else:
                yield from _table(path, table, text_column, where, cache_dir)

    return Source(name, words, documents, tuple(paths))


def _uncompressed(name: str) -> tuple[str, str | None]:
    """The name of a file without the suffix of a compression, and that compression."""
    compression = COMPRESSIONS.get(PurePosixPath(name).suffix.lower())
    return (PurePosixPath(name).stem if compression else name), compression


def _stem(name: str) -> str:
    return PurePosixPath(_uncompressed(name)[0]).stem


def _table(path: Path, kind: str, text_column: str, where: str, cache_dir: Path | None) -> Iterator[Iterable[str]]:
    if path.stat().st_size == 0:  # the library ends in a StopIteration
        raise UserError(f"{where} is empty")
    with reading(where, Exception):
        rows = open_table(path, kind, cache_dir)
    yield from table_documents(rows, text_column, where)


def _hub(identity: str, text_column: str, cache_dir: Path | None, streaming: bool) -> Source:
    found = HUB_ID.fullmatch(identity)
    if not found:
        raise UserError(
            f"data.corpus {identity!r} is not a hub id: write owner/name, owner/name:config or owner/name#split"
        )
    name, config, split = found["name"], found["config"], found["split"] or "train"
    rows = open_hub(name, config, split, cache_dir, streaming)
    words = f"{identity} on the Hugging Face Hub"
    files = () if streaming else tuple(Path(file["filename"]) for file in rows.cache_files)
    return Source(name, words, lambda: table_documents(rows, text_column, words), files, streamed=streaming)


def _may_be_hub(spec: str, path: Path) -> bool:
    """owner/name, unless it must be a misspelt file: its folder is there, or it ends like a file."""
    found = HUB_ID.fullmatch(spec)
    if not found or "/" not in found["name"] or path.parent.is_dir():
        return False
    return path.suffix.lower() not in {".txt", ".md", *TABLES, *COMPRESSIONS}


def _missing(spec: str, path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no file {spec!r}, and no folder {str(path.parent)!r}"
    near = difflib.get_close_matches(path.name, sorted(other.name for other in path.parent.iterdir()), n=1)
    hint = f"did you mean {str(path.with_name(near[0]))!r}?" if near else "give a file, a folder, a glob or a URL"
    return f"there is no file or folder {spec!r}; {hint}"


def _count(paths: list[Path], spec: str) -> str:
    return str(paths[0]) if len(paths) == 1 else f"{len(paths)} files of {spec}"
