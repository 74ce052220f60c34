"""What needs a network: URLs and hub data sets, through `datasets`, which keeps a copy of both."""

import socket
import sys
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from gptlit.corpus.text import reading
from gptlit.errors import UserError

CONNECT_SECONDS = 5.0  # until a server must have answered the telephone
SILENCE_SECONDS = 30.0  # between two parts of an answer


class Unreachable(UserError):
    """The network is out of reach; another try may succeed."""

    def __init__(self, what: str, reason: str) -> None:
        self.what, self.reason = what, reason
        super().__init__(
            f"cannot reach {what} ({reason}): a network is needed once, then a copy is kept; without one use "
            "--data.corpus sample or a text file of your own"
        )


def fetch(url: str, what: str, cache_dir: Path | None) -> Path:
    """The file of a URL, from the cache or else downloaded into it (by way of a temporary name, under a lock).

    Raises `Unreachable` when no server answers or it has trouble, `UserError` when it refuses (e.g. 404).
    """
    import aiohttp
    import datasets

    timeout = aiohttp.ClientTimeout(total=None, connect=CONNECT_SECONDS, sock_read=SILENCE_SECONDS)
    settings = datasets.DownloadConfig(
        cache_dir=None if cache_dir is None else cache_dir / "downloads",
        use_etag=False,  # a copy is good for ever, and needs no network
        disable_tqdm=not sys.stderr.isatty(),
        storage_options={scheme: {"client_kwargs": {"timeout": timeout}} for scheme in ("http", "https")},
    )
    try:
        with reading(what):
            return Path(datasets.DownloadManager(download_config=settings).download(url))
    except UserError as error:
        failure = error.__cause__
        if isinstance(failure, FileNotFoundError) and failure.__cause__ is not None:
            failure = failure.__cause__  # the library says "not found" for whatever goes wrong at first contact
        if isinstance(failure, aiohttp.ClientResponseError) and failure.status < 500:
            raise UserError(f"{what}: {url} answers {failure.status} {failure.message}: check the address") from error
        if isinstance(failure, (aiohttp.ClientError, ConnectionError, TimeoutError)):
            raise Unreachable(what, " ".join(str(failure).split()) or type(failure).__name__) from error
        raise


def open_hub(name: str, config: str | None, split: str, cache_dir: Path | None, streaming: bool) -> Any:
    """A split of a data set of the Hugging Face Hub, as `datasets` gives it.

    Raises `Unreachable` when neither the hub nor a copy can be had, `UserError` when the hub does not know it.
    """
    import datasets

    # A hub out of reach is retried for half a minute; offline mode looks for a copy at once.
    offline = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = offline or not _answers(datasets.config.HF_ENDPOINT)
    try:
        with reading(f"{name} on the Hugging Face Hub"):
            return datasets.load_dataset(name, config, split=split, cache_dir=cache_dir, streaming=streaming)
    except UserError as error:
        if isinstance(error.__cause__, ConnectionError):
            raise Unreachable(name, " ".join(str(error.__cause__).split())) from error
        raise
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def _answers(url: str) -> bool:
    if urllib.request.getproxies():
        return True  # a proxy is what must answer, and only a request can tell
    parts = urllib.parse.urlsplit(url)
    try:
        socket.create_connection((parts.hostname, parts.port or 443), timeout=CONNECT_SECONDS).close()
    except OSError:
        return False
    return True
