"""Downloads through `datasets`: URLs and hub data sets. Of both a copy is kept on disk.

`datasets` takes one to two seconds to import, so it is not imported when the copy of a URL is there already.
"""

import hashlib
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

from gptlit.checkpoint.atomic import flush_to_disk, rename
from gptlit.data.cache import cache_folder
from gptlit.errors import UserError

CONNECT_SECONDS = 5.0  # timeout of connecting
SILENCE_SECONDS = 10.0  # timeout between two parts of an answer
NETWORK = (ConnectionError, TimeoutError, socket.gaierror)


class NetworkError(UserError):
    """The network is out of reach, or a server fails: the only reason for the fallback text."""

    def __init__(self, what: str, reason: BaseException) -> None:
        self.what, self.reason = what, _line(reason)
        super().__init__(
            f"{what} cannot be reached ({self.reason}): a network is needed once, then a copy is kept; without one use "
            "sample, or a text file of your own"
        )


def fetch(url: str, what: str, cache_dir: Path | None, known_good: bool = False) -> Path:
    """Return the file of a URL, downloaded once and then kept.

    Args:
        url: what to download.
        what: its name in messages.
        cache_dir: where copies are kept, by default `cache_folder()`. A copy appears only when it is complete.
        known_good: whether the address is right, so that a refusal (e.g. 403) comes from a firewall.

    Raises:
        NetworkError: no server answers, or it fails.
        UserError: the server refuses the address (e.g. 404), or the copy cannot be written.
    """
    folder = cache_dir or cache_folder()
    name = re.sub(r"[^\w.-]", "_", PurePosixPath(urllib.parse.urlsplit(url).path).name)[-64:]
    kept = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"
    if kept.is_file():
        return kept
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="download-", dir=folder) as empty:
            downloaded = Path(_download(url, what, empty, known_good))
            with downloaded.open("r+b") as stream:
                flush_to_disk(stream)
            rename(downloaded, kept)
    except OSError as error:
        raise UserError(
            f"{what} cannot be kept in {folder} ({error.strerror}): set XDG_CACHE_HOME to a folder that can be written"
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
        # The library turns every failure into FileNotFoundError: the reason is its cause.
        for failure in _chain(error):
            if isinstance(failure, aiohttp.ClientResponseError):
                if failure.status >= 500 or known_good:
                    raise NetworkError(what, failure) from error
                raise UserError(f"{url} answers {failure.status} {failure.message}: check the address") from error
            if isinstance(failure, (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, *NETWORK)):
                raise NetworkError(what, failure) from error
        raise UserError(f"{what} cannot be downloaded: {_line(error)}") from error


def open_hub(name: str, config: str | None, split: str, cache_dir: Path | None, streaming: bool) -> Any:
    """Open a split of a data set of the Hugging Face Hub; `datasets` keeps the copy.

    Args:
        name: `owner/name`.
        config: of the data set, None for its default.
        split: as `datasets` writes it: `train`, `train[1:]`.
        cache_dir: where `datasets` keeps copies, None for its default.
        streaming: read it while it arrives.

    Raises:
        NetworkError: neither the hub nor a copy can be reached.
        UserError: the hub does not know it.
    """
    import datasets

    # The library tries an unreachable hub for half a minute; offline mode looks for a copy at once.
    silence = None if datasets.config.HF_HUB_OFFLINE else _no_answer(datasets.config.HF_ENDPOINT)
    try:
        with offline(silence is not None):
            return datasets.load_dataset(name, config, split=split, cache_dir=cache_dir, streaming=streaming)
    except Exception as error:  # all of them are about a data set that the user named
        if any(isinstance(failure, NETWORK) for failure in _chain(error)):
            raise NetworkError(f"{name} on the Hugging Face Hub", silence or error) from error
        raise UserError(f"{name} cannot be loaded from the Hugging Face Hub: {_line(error)}") from error


def open_saved(folder: Path, split: str | None) -> Any:
    """Open a data set that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote, memory-mapped.

    Args:
        folder: where it is.
        split: of a DatasetDict, by default `train`; None and `train` are the same for a single Dataset.

    Raises:
        UserError: it cannot be read, or has no such split.
    """
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # all of them are about a folder that the user named
        raise UserError(f"{folder} cannot be loaded: {_line(error)}") from error
    if not isinstance(found, datasets.DatasetDict):
        if split not in (None, "train"):
            raise UserError(f"{folder} is one data set without splits: leave #{split} out")
        return found
    if (split or "train") not in found:
        raise UserError(f"{folder} has the splits {', '.join(found)}: name one, e.g. {folder}#{next(iter(found))}")
    return found[split or "train"]


@contextmanager
def offline(on: bool) -> Iterator[None]:
    """Set the offline mode of `datasets` inside, if `on`."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or on
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _no_answer(url: str) -> OSError | None:
    """Return the connection error of a host, or None if it accepts a connection."""
    parts = urllib.parse.urlsplit(url)
    if {parts.scheme, "all"} & urllib.request.getproxies().keys():
        return None  # only a request can tell whether a proxy answers
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    except OSError as error:
        return error
    failure = None
    for family, kind, protocol, _, address in {entry[0]: entry for entry in found}.values():  # one IPv4, one IPv6
        with socket.socket(family, kind, protocol) as connection:
            connection.settimeout(CONNECT_SECONDS)
            try:
                connection.connect(address)
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
