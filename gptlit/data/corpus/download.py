"""What needs a network: URLs and hub data sets, through `datasets`. Of both a copy is kept on disk.

`datasets` takes one to two seconds to import, so it is left alone when the copy of a URL is there already.
"""

import glob
import hashlib
import os
import re
import socket
import sys
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from gptlit.errors import UserError

CONNECT_SECONDS = 5.0  # until a server must have taken the call
SILENCE_SECONDS = 10.0  # between two parts of its answer
NETWORK = (ConnectionError, TimeoutError, socket.gaierror)


class NetworkError(UserError):
    """The network is out of reach, or a server has trouble of its own: the user asked for nothing wrong."""

    def __init__(self, what: str, reason: BaseException) -> None:
        self.what, self.reason = what, _line(reason)
        super().__init__(
            f"cannot reach {what} ({self.reason}): a network is needed once, then a copy is kept; "
            "without one use --data.corpus sample, or a text file of your own"
        )


def cache_folder() -> Path:
    """Where copies are kept: `$XDG_CACHE_HOME/gptlit`, and without that variable `~/.cache/gptlit`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "gptlit"


def fetch(url: str, what: str, cache_dir: Path | None, known_good: bool = False) -> Path:
    """The file of a URL: the copy in `cache_dir` (by default `$XDG_CACHE_HOME/gptlit`), or else downloaded into it.

    A copy is kept for good, and appears only when it is whole. Raises `NetworkError` when no server answers or it has
    trouble, and `UserError` when it refuses (e.g. 404); the refusal of an address that is `known_good` is the network's
    doing, too (e.g. a firewall's).
    """
    folder = cache_dir or cache_folder()
    name = re.sub(r"[^\w.-]", "_", PurePosixPath(urllib.parse.urlsplit(url).path).name)[-64:]
    kept = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"
    if kept.is_file():
        return kept
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="download-", dir=folder) as empty:
            os.replace(_download(url, what, empty, known_good), kept)
    except OSError as error:
        raise UserError(
            f"cannot keep {what} in {folder} ({error.strerror}): set XDG_CACHE_HOME to a folder that can be written"
        ) from error
    return kept


def _download(url: str, what: str, folder: str, known_good: bool) -> str:
    import aiohttp
    import datasets

    timeout = aiohttp.ClientTimeout(total=None, connect=CONNECT_SECONDS, sock_read=SILENCE_SECONDS)
    settings = datasets.DownloadConfig(
        cache_dir=folder,
        use_etag=False,
        disable_tqdm=not sys.stderr.isatty(),
        storage_options={scheme: {"client_kwargs": {"timeout": timeout}} for scheme in ("http", "https")},
    )
    try:
        return datasets.DownloadManager(download_config=settings).download(url)
    except (OSError, ValueError, aiohttp.ClientError) as error:
        # At first contact the library says FileNotFoundError whatever went wrong: the reason is the error behind it.
        for failure in _chain(error):
            if isinstance(failure, aiohttp.ClientResponseError):
                if failure.status >= 500 or known_good:
                    raise NetworkError(what, failure) from error
                raise UserError(f"{url} answers {failure.status} {failure.message}: check the address") from error
            if isinstance(failure, (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, *NETWORK)):
                raise NetworkError(what, failure) from error
        raise UserError(f"cannot download {what}: {_line(error)}") from error


def open_hub(name: str, config: str | None, split: str, cache_dir: Path | None, streaming: bool) -> Any:
    """A split of a data set of the Hugging Face Hub, as `datasets` gives it and keeps it.

    Raises `NetworkError` when neither the hub nor a copy can be had, `UserError` when the hub does not know it.
    """
    import datasets

    # A hub out of reach would be tried for half a minute; offline mode looks for a copy at once.
    silence = None if datasets.config.HF_HUB_OFFLINE else _no_answer(datasets.config.HF_ENDPOINT)
    try:
        with offline(silence is not None):
            return datasets.load_dataset(name, config, split=split, cache_dir=cache_dir, streaming=streaming)
    except Exception as error:  # whatever it is, it is about a data set that the user named
        if any(isinstance(failure, NETWORK) for failure in _chain(error)):
            raise NetworkError(f"{name} on the Hugging Face Hub", silence or error) from error
        raise UserError(f"cannot load {name} from the Hugging Face Hub: {_line(error)}") from error


def open_table(path: Path, kind: str, cache_dir: Path | None) -> Any:
    """The rows of a local file as `datasets` gives them; `kind` is `json`, `csv` or `parquet`."""
    import datasets

    options = {"keep_default_na": False} if kind == "csv" else {}  # the word "null" is a word
    with offline(True):  # else the library reports even the reading of a local file, and waits for the answer
        return datasets.load_dataset(
            kind, data_files=glob.escape(str(path)), split="train", streaming=True, cache_dir=cache_dir, **options
        )


@contextmanager
def offline(on: bool) -> Iterator[None]:
    """Keeps `datasets` off the network for a while, if `on`."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or on
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _no_answer(url: str) -> OSError | None:
    """Why nobody takes a call at this address, or null when somebody does."""
    parts = urllib.parse.urlsplit(url)
    if {parts.scheme, "all"} & urllib.request.getproxies().keys():
        return None  # it is the proxy that must answer, and only a request can tell
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    except OSError as error:
        return error
    failure = None
    for family, kind, protocol, _, address in {entry[0]: entry for entry in found}.values():  # one IPv4, one IPv6
        with socket.socket(family, kind, protocol) as call:
            call.settimeout(CONNECT_SECONDS)
            try:
                call.connect(address)
            except OSError as error:
                failure = error
            else:
                return None
    return failure


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
