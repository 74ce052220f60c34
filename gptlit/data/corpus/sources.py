"""What the user names, as something that can be read."""

import difflib
import glob
import hashlib
import importlib.resources
import itertools
import mimetypes
import re
import stat
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from gptlit.data.corpus.archives import archive_kind
from gptlit.data.corpus.columnar import dataset_rows
from gptlit.data.corpus.documents import Pieces
from gptlit.data.corpus.download import fetch, open_hub, open_saved
from gptlit.data.corpus.files import (
    Tally,
    column_error,
    ending,
    inner_name,
    is_table,
    members_of,
    rows_with_text,
    select_members,
    units_of,
    without,
)
from gptlit.data.corpus.source import Source
from gptlit.data.corpus.streams import COMPRESSIONS
from gptlit.data.corpus.text import file_text
from gptlit.data.corpus.token_folders import is_litdata, nanogpt_files, nanogpt_text
from gptlit.errors import UserError

TINYSHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINYSHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
HUB_ID = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[^#:]+))?(#(?P<split>.+))?")


def resolve(
    spec: str | list[str], *, text_column: str, cache_dir: Path | None = None, streaming: bool = False
) -> list[Source]:
    """Find what each spec stands for; downloads what has to be downloaded.

    - `tinyshakespeare`: the text of the lecture, from karpathy/char-rnn, checked by its SHA-256
    - `sample`: the play in the package
    - a file: a text; `.json .jsonl .ndjson .csv .tsv .parquet .arrow .feather` with a column `text_column`; any of the
      texts and tables but the last three may be `.gz .bz2 .xz .zst`; `.zip .tar .tar.gz …` with such files in it;
      `train.bin` of nanoGPT
    - a folder: every `*.txt`, table and archive in it and below, in the order of their paths, hidden ones left out; a
      folder of `Dataset.save_to_disk`, then `#split` if need be; a data folder of nanoGPT
    - a glob such as `texts/**/*.md`, in the order of the paths
    - `https://…` or `http://…`: a file as above
    - `owner/name` or `hf://owner/name`, then `:config` and `#split` if need be: a data set of the Hugging Face Hub

    Args:
        spec: one or more of these.
        text_column: name of the column in tables.
        cache_dir: where downloads are kept, by default `$XDG_CACHE_HOME/gptlit` and the cache of `datasets`.
        streaming: read hub data sets while they arrive.

    Raises:
        UserError: it is none of these.
        NetworkError: the network is out of reach.
    """
    specs = [spec] if isinstance(spec, str) else spec
    if not specs or not all(specs):
        raise UserError("is empty: name a text, or use the one in the package: sample")
    return [_resolve(one, text_column, cache_dir, streaming) for one in specs]


def _resolve(spec: str, column: str, cache_dir: Path | None, streaming: bool) -> Source:  # noqa: C901  # one case each
    if spec == "tinyshakespeare":
        return _tinyshakespeare(cache_dir)
    if spec == "sample":
        path = Path(str(importlib.resources.files("gptlit").joinpath("assets/play.txt")))
        return _text("sample", "the sample play", path)
    if spec.startswith("hf://"):
        return _hub(spec.removeprefix("hf://").removeprefix("datasets/"), column, cache_dir, streaming)
    if spec.startswith(("http://", "https://")):
        return _url(spec, column, cache_dir)
    if "://" in spec:
        raise UserError(f"{spec!r}: only http://, https:// and hf:// are known; download it and give the file")

    path = Path(spec).expanduser()
    mode = _mode(path, spec)
    if stat.S_ISDIR(mode):
        return _folder(path, spec, column)
    if mode:
        return _files([path], _stem(path.name), spec, column)
    folder, _, split = spec.rpartition("#")
    if folder and _is_saved(Path(folder).expanduser()):
        return _saved(Path(folder).expanduser(), spec, split, column)
    if glob.has_magic(spec):
        paths = [Path(found) for found in sorted(glob.glob(str(path), recursive=True)) if Path(found).is_file()]
        if paths:
            return _files(paths, spec, _count(paths, spec), column)
    if _may_be_hub(spec, path):
        try:
            return _hub(spec, column, cache_dir, streaming)
        except UserError as error:  # a mistyped path looks like owner/name
            error.message = f"{spec!r} is no file or folder here, and {error.message}"
            raise
    if glob.has_magic(spec):
        raise UserError(f"{spec!r} matches no file")
    raise UserError(_missing(spec, path))


def _mode(path: Path, spec: str) -> int:
    """Return the mode of a file or folder, 0 where there is none."""
    try:
        return path.stat().st_mode
    except PermissionError as error:
        raise UserError(f"{spec} cannot be read: no permission") from error
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return 0


def _tinyshakespeare(cache_dir: Path | None) -> Source:
    path = fetch(TINYSHAKESPEARE_URL, "tinyshakespeare", cache_dir, known_good=True)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != TINYSHAKESPEARE_SHA256:
        path.unlink(missing_ok=True)
        raise UserError(
            f"tinyshakespeare arrived damaged: {path} had sha256 {digest}, not {TINYSHAKESPEARE_SHA256}, and was "
            "removed; run again to download it again, or use sample"
        )
    return _text("tinyshakespeare", "tinyshakespeare of karpathy/char-rnn", path)


def _text(name: str, words: str, path: Path) -> Source:
    """Return one plain text file."""
    return Source(name, words, lambda: iter([iter([file_text(path, None, words)])]), (path,))


def _url(url: str, column: str, cache_dir: Path | None) -> Source:
    path = fetch(url, url, cache_dir)
    address = PurePosixPath(urllib.parse.urlsplit(url).path)
    with path.open("rb") as stream:
        beginning = stream.read(64).lstrip().lower()
    if beginning.startswith((b"<!doctype html", b"<html")) and address.suffix not in (".html", ".htm"):
        path.unlink(missing_ok=True)
        raise UserError(f"{url} is a web page, not a text: give the address of the raw file")
    return _files([path], _stem(address.name) or url, url, column)


def _folder(folder: Path, spec: str, column: str) -> Source:
    if _is_saved(folder):
        return _saved(folder, spec, None, column)
    if tokens := nanogpt_files(folder):  # parts of one text, so nothing stands between them
        pieces = lambda: itertools.chain.from_iterable(nanogpt_text(path, str(path)) for path in tokens)  # noqa: E731
        return Source(folder.resolve().name, spec, lambda: iter([iter([pieces()])]), tokens)
    if is_litdata(folder):
        raise UserError(
            f"{spec} holds chunks of litdata, whose items can be anything: write their texts as JSON Lines first, e.g. "
            '{"text": …} for every item of litdata.StreamingDataset'
        )
    names = sorted(glob.glob("**/*", root_dir=folder, recursive=True))
    paths, left_out, lacking = list[Path](), dict[str, str](), list[UserError]()
    for name in names:
        if not (folder / name).is_file():
            continue
        if not _reads_in_folder(name):
            left_out[name] = ""
        elif is_table(name) and (error := column_error(units_of(folder / name, column, str(folder / name), {}))):
            left_out[name] = without(column)
            lacking.append(error)
        else:
            paths.append(folder / name)
    if not paths:
        if left_out and len(lacking) == len(left_out):
            raise lacking[0]
        seen = f", but {_endings(left_out)}" if left_out else ""
        glob_for = f"'{spec}/**/*{_likely_text(left_out)}'"
        raise UserError(f"the folder {spec} has no text in it or below{seen}: give a glob, e.g. {glob_for}")
    source = _files(paths, folder.resolve().name, _count(paths, spec), column)
    notice = " · ".join(filter(None, (_left_out(left_out, spec), source.notice)))
    return replace(source, tables=source.tables or bool(lacking), notice=notice)


def _reads_in_folder(name: str) -> bool:
    return ending(name) == ".txt" or is_table(name) or archive_kind(name) is not None


def _likely_text(reasons: dict[str, str]) -> str:
    """Return the most frequent ending of files left out because of their kind, without pictures and the like."""
    names = (name for name, reason in reasons.items() if not reason)
    kinds = ((Path(name).suffix, (mimetypes.guess_type(name)[0] or "").partition("/")[0]) for name in names)
    counts = Counter(suffix for suffix, kind in kinds if kind not in ("image", "audio", "video", "font", "application"))
    return counts.most_common(1)[0][0] if counts else ".md"


def _left_out(reasons: dict[str, str], spec: str) -> str:
    return f"{spec}: left out {_endings(reasons)}" if reasons else ""


def _endings(reasons: dict[str, str]) -> str:
    """Return `3 .md, 1 .png` for files left out because of their kind; others by name and with the reason."""
    plain = Counter(Path(name).suffix or Path(name).name for name, reason in reasons.items() if not reason)
    words = [f"{count} {suffix}" for suffix, count in plain.most_common()]
    words += [f"{name} ({reason})" for name, reason in reasons.items() if reason]
    return ", ".join(words[:6]) + (f" and {len(words) - 6} other kinds" if len(words) > 6 else "")


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _saved(folder: Path, spec: str, split: str | None, column: str) -> Source:
    """Return a data set that `save_to_disk` wrote."""
    rows = open_saved(folder, split)
    files = tuple(Path(file["filename"]) for file in rows.cache_files)
    return _rows(folder.resolve().name, spec, rows, column, files)


def _rows(name: str, words: str, rows: Any, column: str, files: tuple[Path, ...], streamed: bool = False) -> Source:
    tally: Tally = {}

    def units() -> Iterator[Pieces]:
        return rows_with_text(dataset_rows(rows, column, words), words, tally)

    return Source(name, words, lambda: iter([units()]), files, rows=True, tables=True, streamed=streamed, tally=tally)


def _files(paths: list[Path], name: str, words: str, column: str) -> Source:
    """Return files, each read as its name says."""
    where = {path: words if len(paths) == 1 else str(path) for path in paths}
    chosen: dict[Path, frozenset[str]] = {}
    left_out: dict[str, str] = {}
    tally: Tally = {}
    for path in paths:
        if archive_kind(path.name):
            chosen[path], others = select_members(path, column, where[path])
            left_out |= {f"{path.name}/{name}" if len(paths) > 1 else name: why for name, why in others.items()}
            if not others and not chosen[path]:
                raise UserError(f"{where[path]} has no files in it")
            if not chosen[path]:
                raise UserError(f"{where[path]} has no text in it, but {_endings(others)}: unpack it and give a glob")

    def files() -> Iterator[Iterator[Pieces]]:
        for path in paths:
            if path in chosen:
                yield from members_of(path, column, where[path], chosen[path], tally)
            else:
                yield units_of(path, column, where[path], tally)

    names = [name for path in paths for name in chosen.get(path, (path.name,))]
    notice = _left_out(left_out, words)
    rows, tables = all(map(is_table, names)), any(map(is_table, [*names, *left_out]))
    return Source(name, words, files, tuple(paths), len(names) > 1, rows, tables, notice=notice, tally=tally)


def _stem(name: str) -> str:
    return PurePosixPath(inner_name(name)[0]).stem


def _hub(identity: str, column: str, cache_dir: Path | None, streaming: bool) -> Source:
    found = HUB_ID.fullmatch(identity)
    if not found:
        raise UserError(f"{identity!r} is not a hub id: write owner/name, owner/name:config or owner/name#split")
    name, config, split = found["name"], found["config"], found["split"] or "train"
    rows = open_hub(name, config, split, cache_dir, streaming)
    files = () if streaming else tuple(Path(file["filename"]) for file in rows.cache_files)
    return _rows(name, f"{identity} on the Hugging Face Hub", rows, column, files, streamed=streaming)


def _may_be_hub(spec: str, path: Path) -> bool:
    """Return whether this may be owner/name, and not a misspelt file: its folder exists, or it ends like a file."""
    found = HUB_ID.fullmatch(spec)
    if not found or "/" not in found["name"] or path.parent.is_dir():
        return False
    known = path.suffix.lower() in {".txt", ".md", ".bin", *COMPRESSIONS}
    return not (known or is_table(path.name) or archive_kind(path.name))


def _missing(spec: str, path: Path) -> str:
    if not path.parent.is_dir():
        return f"{spec!r} is not there, and neither is the folder {str(path.parent)!r}"
    near = difflib.get_close_matches(path.name, sorted(other.name for other in path.parent.iterdir()), n=1)
    hint = f"did you mean {str(path.with_name(near[0]))!r}?" if near else "give a file, a folder, a glob or a URL"
    return f"{spec!r} is no file or folder; {hint}"


def _count(paths: list[Path], spec: str) -> str:
    return str(paths[0]) if len(paths) == 1 else f"{len(paths)} files of {spec}"
