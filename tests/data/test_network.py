"""Corpora from the network: URLs and the Hugging Face Hub, on a server of this machine."""

import gzip
import hashlib
import http.server
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from corpora import own_cache, refusal, text_of

from gptlit.data.corpus import TextSpec, open_corpus
from gptlit.data.corpus.download import NetworkError
from gptlit.data.corpus.sources import resolve
from gptlit.errors import UserError

TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    return own_cache(tmp_path_factory, monkeypatch)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, so that a corpus can be given as a relative name."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Site:
    """A web site on this machine: `pages` by path, and the requests received."""

    def __init__(self) -> None:
        self.pages: dict[str, bytes | int] = {}
        self.requests: list[str] = []
        site = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.requests.append(f"{self.command} {self.path}")
                page = site.pages.get(self.path, 404)
                self.send_response(page if isinstance(page, int) else 200)
                body = b"" if isinstance(page, int) else page
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    yield site
    site.close()


@pytest.fixture
def closed_port() -> str:
    """The address of a port that accepts no connection."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{held.getsockname()[1]}"


# --- URLs -------------------------------------------------------------------------------------------------------------


def test_a_url_is_downloaded_once_and_then_needs_no_network(site: Site) -> None:
    site.pages["/texts/my%20play.txt"] = TEXT.encode()
    url = f"{site.url}/texts/my%20play.txt"
    assert text_of(url) == TEXT
    assert open_corpus(TextSpec(url)).words == url
    site.close()
    assert text_of(url) == TEXT
    assert site.requests.count("GET /texts/my%20play.txt") == 1


def test_a_copy_is_read_without_importing_datasets(site: Site) -> None:
    """The import takes longer than reading the text, at every start of every run."""
    site.pages["/my.txt"] = TEXT.encode()
    text_of(f"{site.url}/my.txt")
    program = (
        "import sys; from gptlit.data.corpus import TextSpec, open_corpus\n"
        f"print(sum(len(text) for _, text in open_corpus(TextSpec('{site.url}/my.txt')).parts()))\n"
        "print('datasets' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(len(TEXT)), "False"]


def test_a_url_is_read_as_its_name_says(site: Site) -> None:
    site.pages["/r.jsonl.gz?download=true"] = gzip.compress(b'{"text": "one"}\n{"text": "two"}\n')
    assert text_of(f"{site.url}/r.jsonl.gz?download=true") == "one\ntwo"


def test_nothing_is_kept_of_an_interrupted_download(site: Site, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later runs would train on half of the file."""
    import aiohttp.client

    site.pages["/my.txt"] = TEXT.encode()
    promised = aiohttp.client.ClientResponse.start

    async def longer(self: aiohttp.client.ClientResponse, connection: object) -> object:
        response = await promised(self, connection)  # type: ignore[arg-type]
        if self.method == "GET":
            self.content.set_exception(aiohttp.ClientPayloadError("the line went dead"))
        return response

    with monkeypatch.context() as broken:
        broken.setattr(aiohttp.client.ClientResponse, "start", longer)
        with pytest.raises(NetworkError, match="the line went dead"):
            text_of(f"{site.url}/my.txt")
    assert list(cache.parent.iterdir()) == []
    assert text_of(f"{site.url}/my.txt") == TEXT


def test_an_address_that_does_not_exist_is_a_user_error_without_fallback(site: Site) -> None:
    message = refusal(f"{site.url}/nothing.txt", fallback="sample")
    assert "404" in message
    assert "check the address" in message


def test_a_server_that_fails_is_a_network_error(site: Site) -> None:
    site.pages["/my.txt"] = 503
    with pytest.raises(NetworkError, match="503"):
        text_of(f"{site.url}/my.txt")


def test_a_server_that_never_answers_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library would wait for five minutes."""
    monkeypatch.setattr("gptlit.data.corpus.download.SILENCE_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as mute, pytest.raises(NetworkError):
        text_of(f"http://127.0.0.1:{mute.getsockname()[1]}/my.txt")


def test_a_web_page_is_refused_and_not_kept(site: Site) -> None:
    """The address of a page that shows a file is easily confused with that of the file."""
    site.pages["/blob/my.txt"] = b"\n<!DOCTYPE html><html>..."
    for _ in range(2):
        assert "web page" in refusal(f"{site.url}/blob/my.txt")
    assert site.requests.count("GET /blob/my.txt") == 2


def test_without_a_network_the_error_says_what_works(closed_port: str) -> None:
    message = refusal(f"{closed_port}/my.txt")
    assert message.startswith(f"corpus {closed_port}/my.txt cannot be reached (")
    assert "use sample" in message


def test_offline_mode_is_respected(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    site.pages["/my.txt"] = TEXT.encode()
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # what the variable of that name sets at import
    with pytest.raises(NetworkError, match=r"[Oo]ffline"):
        text_of(f"{site.url}/my.txt")
    assert site.requests == []


def test_a_cache_that_cannot_be_written_is_named(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    site.pages["/my.txt"] = TEXT.encode()
    with pytest.raises(UserError, match="XDG_CACHE_HOME") as caught:
        resolve(f"{site.url}/my.txt", text_column="text", cache_dir=tmp_path / "file")
    assert str(tmp_path / "file") in str(caught.value)


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Move tinyshakespeare to another address."""
    return lambda url: monkeypatch.setattr("gptlit.data.corpus.sources.TINYSHAKESPEARE_URL", url)


def test_tinyshakespeare_is_downloaded_checked_and_kept(
    site: Site, at: Callable[[str], None], tinyshakespeare: Path
) -> None:
    site.pages["/input.txt"] = tinyshakespeare.read_bytes()
    at(f"{site.url}/input.txt")
    first = text_of("tinyshakespeare")
    site.close()
    assert text_of("tinyshakespeare") == first == tinyshakespeare.read_text()
    assert open_corpus(TextSpec("tinyshakespeare")).name == "tinyshakespeare"


def test_a_damaged_tinyshakespeare_is_removed_and_never_replaced_by_the_fallback(
    site: Site, at: Callable[[str], None], cache: Path
) -> None:
    """A damaged copy that is kept fails at every start; a fallback would hide it."""
    site.pages["/input.txt"] = b"First Citizen: or not"
    at(f"{site.url}/input.txt")
    message = refusal("tinyshakespeare", fallback="sample")
    assert hashlib.sha256(b"First Citizen: or not").hexdigest() in message
    assert str(cache.parent) in message
    assert list(cache.parent.iterdir()) == []


def test_a_copy_that_was_damaged_later_is_detected(
    site: Site, at: Callable[[str], None], tinyshakespeare: Path, cache: Path
) -> None:
    site.pages["/input.txt"] = tinyshakespeare.read_bytes()
    at(f"{site.url}/input.txt")
    text_of("tinyshakespeare")
    (copy,) = cache.parent.iterdir()
    copy.write_bytes(copy.read_bytes()[:-1])
    assert "sha256" in refusal("tinyshakespeare")
    assert text_of("tinyshakespeare") == tinyshakespeare.read_text()


def test_without_a_network_the_fallback_is_used_with_a_notice(closed_port: str, at: Callable[[str], None]) -> None:
    at(f"{closed_port}/input.txt")
    assert text_of("tinyshakespeare", fallback="sample") == text_of("sample")
    corpus = open_corpus(TextSpec("tinyshakespeare", fallback="sample"))
    assert corpus.name == "sample", "a run on the sample must not be called tinyshakespeare"
    (notice,) = corpus.notices
    assert notice.startswith("tinyshakespeare is out of reach (")
    assert "sample play" in notice
    with pytest.raises(NetworkError):
        text_of("tinyshakespeare")


def test_a_firewall_before_tinyshakespeare_counts_as_no_network(site: Site, at: Callable[[str], None]) -> None:
    """It answers 403 for an address that is known to be right."""
    site.pages["/input.txt"] = 403
    at(f"{site.url}/input.txt")
    assert open_corpus(TextSpec("tinyshakespeare", fallback="sample")).name == "sample"


def test_a_wrong_path_does_not_use_the_fallback(here: Path) -> None:
    assert "is no file or folder" in refusal("nothing.txt", fallback="sample")


# --- the hub ----------------------------------------------------------------------------------------------------------


class Hub(Site):
    """The part of the Hugging Face Hub that `datasets` needs for one data set, `someone/tales`."""

    REVISION = "a" * 40

    def __init__(self) -> None:
        super().__init__()
        self.files = {
            "train.jsonl": b'{"text": "one", "n": 1}\n{"text": "two", "n": 2}\n',
            "validation.jsonl": b'{"text": "three", "n": 3}\n',
        }
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
                self.send_response(status)
                for key, value in {"X_Repo_Commit": hub.REVISION, **headers}.items():
                    self.send_header(key.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def listing(self, names: list[str]) -> None:
                entries = [
                    {"type": "file", "oid": "b" * 40, "size": len(hub.files[name]), "path": name}
                    for name in names
                    if name in hub.files
                ]
                self.answer(200, json.dumps(entries).encode(), Content_Type="application/json")

            def do_GET(self) -> None:
                path = self.path.split("?")[0]
                name = path.split("/")[-1]
                if path.startswith("/api/datasets/someone/tales/tree/"):
                    if name == hub.REVISION:
                        self.listing(list(hub.files))
                    else:
                        self.answer(404, X_Error_Code="EntryNotFound")
                elif path.startswith("/api/datasets/someone/tales"):
                    found = {"id": "someone/tales", "sha": hub.REVISION, "siblings": []}
                    self.answer(200, json.dumps(found).encode(), Content_Type="application/json")
                elif path.startswith("/datasets/someone/tales/resolve/") and name in hub.files:
                    self.answer(200, hub.files[name], ETag=f'"{hashlib.md5(hub.files[name]).hexdigest()}"')
                elif path.startswith("/datasets/someone/tales/resolve/"):
                    self.answer(404, X_Error_Code="EntryNotFound")
                else:
                    self.answer(404, X_Error_Code="RepoNotFound")

            do_HEAD = do_GET  # noqa: N815

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                self.listing([name for name in hub.files if name in body])

            def log_message(self, *args: object) -> None:
                pass

        self.server.RequestHandlerClass = Handler


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    import datasets
    import huggingface_hub.constants

    hub = Hub()
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    yield hub
    hub.close()


def test_a_hub_data_set_is_loaded_and_then_needs_no_network(hub: Hub) -> None:
    corpus = open_corpus(TextSpec("someone/tales"))
    assert text_of("someone/tales") == "one\ntwo"
    assert (corpus.name, corpus.words) == ("someone/tales", "someone/tales on the Hugging Face Hub")
    assert text_of("hf://someone/tales#validation") == "three"
    assert text_of("someone/tales#train[1:]") == "two"
    assert text_of("someone/tales", streaming=True) == "one\ntwo"
    hub.close()
    assert text_of("someone/tales") == "one\ntwo"


def test_an_unknown_hub_data_set_is_a_user_error_without_fallback(hub: Hub) -> None:
    assert "someone/nothing" in refusal("someone/nothing", fallback="sample")
    assert "Should be one of ['train', 'validation']" in refusal("someone/tales#tain")
    assert "BuilderConfig 'english' not found" in refusal("someone/tales:english")
    message = refusal("someone/tales", text_column="body")
    assert message.startswith("text_column 'body' is not a column of someone/tales")
    assert "text, n" in message
    assert "write owner/name" in refusal("hf://a/b/c")


def test_an_unreachable_hub_fails_at_once(closed_port: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library tries again for half a minute, and fills the terminal meanwhile."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", closed_port)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"slept for {seconds} s before another try"))
    with pytest.raises(NetworkError, match="someone/tales on the Hugging Face Hub cannot be reached"):
        text_of("someone/tales")
    assert open_corpus(TextSpec("someone/tales", fallback="sample")).name == "sample"
    assert datasets.config.HF_HUB_OFFLINE is False, "the setting of the library must be restored"


def test_downloads_write_nothing_to_stdout(site: Site, hub: Hub, capfd: pytest.CaptureFixture[str]) -> None:
    """Sampled text is piped into files; a progress bar must not be in it."""
    site.pages["/r.jsonl"] = b'{"text": "one"}\n{"text": "two"}\n'
    text_of(f"{site.url}/r.jsonl")
    text_of("someone/tales")
    assert capfd.readouterr().out == ""


def test_local_tables_and_saved_data_sets_are_read_without_the_network(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` reports what is loaded to a server, and waits three seconds where that is unreachable."""
    import datasets

    (here / "r.jsonl").write_text('{"text": "one"}\n')
    datasets.Dataset.from_dict({"text": ["two"]}).save_to_disk("saved")
    asked: list[str] = []
    real = socket.getaddrinfo

    def noted(host: str, *rest: object, **options: object) -> object:
        asked.append(host)
        return real(host, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", noted)
    assert text_of(["r.jsonl", "saved"]) == "one\ntwo"
    assert asked == []
