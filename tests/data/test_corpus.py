"""Text comes from many places, always as the same text; and what cannot be read is refused in one line that helps."""

import bz2
import gzip
import hashlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptlit.data.corpus import iter_text, load_corpus
from gptlit.data.corpus.download import NetworkError
from gptlit.data.corpus.text import decode, join, recut
from gptlit.errors import UserError
from gptlit.tokenizer import BPETokenizer

TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n"


def whole(spec: str | list[str], **options: object) -> str:
    """Both parts of a corpus, put together."""
    corpus = load_corpus(spec, **options)
    return corpus.train + corpus.val


def refusal(spec: str | list[str], **options: object) -> str:
    """The one line with which a corpus is refused."""
    with pytest.raises(UserError) as caught:
        load_corpus(spec, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may read or write the caches of the user, nor answer through a proxy."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, so that specs can be relative as a user types them."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Site:
    """A web site on this machine: `pages` by path, and the requests it got."""

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
def nobody() -> str:
    """The address of a port at which nobody listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{held.getsockname()[1]}"


# --- one text, and its split ------------------------------------------------------------------------------------------


def test_a_file_becomes_a_corpus_of_two_parts_in_order(here: Path) -> None:
    (here / "my.txt").write_bytes(TEXT.encode())
    corpus = load_corpus("my.txt")
    assert corpus.train + corpus.val == TEXT
    assert len(corpus.train) == int(0.9 * len(TEXT))
    assert (corpus.name, corpus.source) == ("my", "my.txt")
    assert corpus.sha256 == hashlib.sha256(TEXT.encode()).hexdigest()
    assert corpus.notice is None
    assert not corpus.used_fallback


def test_the_real_text_is_split_as_in_the_lecture(tinyshakespeare: Path) -> None:
    """Losses are comparable only on the very same last 111,540 characters."""
    corpus = load_corpus(str(tinyshakespeare))
    assert (len(corpus.train), len(corpus.val)) == (1_003_854, 111_540)
    assert corpus.sha256 == "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    assert corpus.val.startswith("?\n\nGREMIO:\nGood morrow, neighbour Baptista.")


def test_the_fraction_can_be_chosen(here: Path) -> None:
    (here / "ten.txt").write_text("0123456789")
    assert load_corpus("ten.txt", val_fraction=0.3).val == "789"
    for fraction in (0.0, 1.0, -0.5):
        assert "data.val_fraction" in refusal("ten.txt", val_fraction=fraction)


def test_validation_can_be_a_text_of_its_own(here: Path) -> None:
    (here / "a.txt").write_text("learn from this")
    (here / "b.txt").write_text("measure on this")
    corpus = load_corpus("a.txt", val="b.txt")
    assert (corpus.train, corpus.val) == ("learn from this", "measure on this")
    assert corpus.sha256 == hashlib.sha256(b"learn from thismeasure on this").hexdigest()


def test_the_sample_is_in_the_package_and_is_all_ascii() -> None:
    corpus = load_corpus("sample")
    assert corpus.name == "sample"
    assert len(corpus.train) > 50_000
    assert (corpus.train + corpus.val).isascii()


def test_the_text_does_not_fill_a_terminal_when_the_corpus_is_printed(here: Path) -> None:
    (here / "my.txt").write_text(TEXT)
    assert "Citizen" not in repr(load_corpus("my.txt"))


# --- files, folders, globs --------------------------------------------------------------------------------------------


def test_windows_and_old_mac_line_ends_and_the_byte_order_mark_go(here: Path) -> None:
    """`\\r` and U+FEFF would become symbols of the vocabulary that nobody can see."""
    (here / "win.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert whole("win.txt") == "one\ntwo\nthree\n"


@settings(deadline=None)
@given(text=st.text(st.sampled_from("a\r\né日\U0001f600 "), min_size=1), size=st.integers(1, 5))
def test_a_file_read_in_pieces_is_the_file_read_at_once(text: str, size: int) -> None:
    """A piece may end inside a character, or between \\r and \\n."""

    class Drip:
        def __init__(self, data: bytes) -> None:
            self.data = data

        def read(self, _: int) -> bytes:
            drop, self.data = self.data[:size], self.data[size:]
            return drop

    expected = text.replace("\r\n", "\n").replace("\r", "\n")
    assert "".join(decode(Drip(text.encode()), "drip")) == expected  # type: ignore[arg-type]


def test_bad_bytes_are_named_with_their_offset_in_the_file(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "latin.txt").write_bytes(b"\xef\xbb\xbfcaf\xc3\xa9 caf\xe9 au lait")
    expected = "latin.txt is not UTF-8: byte 0xE9 at offset 12; convert it, e.g. iconv -f LATIN1 -t UTF-8"
    assert refusal("latin.txt") == expected
    for size in range(1, 8):  # the offset is the file's, not that of the piece
        monkeypatch.setattr("gptlit.data.corpus.text.READ_BYTES", size)
        assert refusal("latin.txt") == expected
    (here / "cut.txt").write_bytes("caf\u00e9".encode()[:-1])
    assert "offset 3" in refusal("cut.txt")


def test_what_windows_calls_unicode_is_recognised(here: Path) -> None:
    (here / "note.txt").write_bytes("hello".encode("utf-16"))
    assert "iconv -f UTF-16" in refusal("note.txt")


def test_a_binary_file_is_refused(here: Path) -> None:
    (here / "weights.txt").write_bytes(b"PK\x03\x04\x00\x00")
    assert refusal("weights.txt") == "weights.txt is not a text: it holds NUL bytes, as binary files and UTF-16 do"


@pytest.mark.parametrize("content", ["", " \n\n ", "\ufeff"])
def test_an_empty_text_is_refused(here: Path, content: str) -> None:
    (here / "empty.txt").write_text(content, encoding="utf-8")
    assert refusal("empty.txt") == "empty.txt holds no text"


def test_a_text_too_short_to_be_split_is_refused(here: Path) -> None:
    (here / "a.txt").write_text("a")
    assert "too few" in refusal("a.txt")


def test_a_folder_is_its_text_files_in_order_hidden_ones_left_out(here: Path) -> None:
    for name in ("b.txt", "a.txt", "sub/c.txt", ".git/d.txt", "sub/.e.txt", "readme.md"):
        (here / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (here / "texts" / name).write_text(name)
    corpus = load_corpus("texts")
    assert corpus.train + corpus.val == "a.txt\n\nb.txt\n\nsub/c.txt"
    assert (corpus.name, corpus.source) == ("texts", "3 files of texts")
    assert whole("texts/") == whole("texts")
    (here / "texts" / "sub" / "c.txt").write_bytes(b"\xff")
    for spec in ("texts", "texts/sub", "texts/sub/*"):
        assert refusal(spec).startswith(f"{Path('texts/sub/c.txt')} is not UTF-8"), "the one file of many is named"


def test_a_glob_is_in_the_order_of_the_names_whatever_the_file_system_says(here: Path) -> None:
    for name in ("10.md", "2.md", "1.md", "deep/0.md"):
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_text(name)
    assert whole("*.md") == "1.md\n\n10.md\n\n2.md"
    assert whole("**/*.md") == "1.md\n\n10.md\n\n2.md\n\ndeep/0.md"
    assert "matches no file" in refusal("*.rst")


def test_several_specs_keep_the_order_they_were_given(here: Path) -> None:
    (here / "a.txt").write_text("A")
    (here / "b.txt").write_text("B")
    corpus = load_corpus(["b.txt", "a.txt"])
    assert corpus.train + corpus.val == "B\n\nA"
    assert (corpus.name, corpus.source) == ("b+a", "b.txt, a.txt")


def test_a_file_whose_name_looks_like_a_glob_is_that_file(here: Path) -> None:
    (here / "part[1].txt").write_text("the part")
    (here / "rows[1].jsonl").write_text('{"text": "the row"}\n')
    assert whole("part[1].txt") == "the part"
    assert whole("rows[1].jsonl") == "the row"


def test_home_is_known_by_its_sign(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.setenv("USERPROFILE", str(here))
    (here / "my.txt").write_text("at home")
    assert whole("~/my.txt") == "at home"


@pytest.mark.parametrize(
    ("documents", "joined"),
    [
        (["a", "b"], "a\n\nb"),
        (["a\n", "b"], "a\n\nb"),
        (["a\n\n", "b"], "a\n\nb"),
        (["a\n\n\n", "b"], "a\n\n\nb"),
        (["\n", "b"], "\n\nb"),
        (["", "a", "", "b", ""], "a\n\nb"),
        (["a"], "a"),
    ],
)
def test_between_two_documents_stands_a_blank_line(documents: list[str], joined: str) -> None:
    """Without one the last line of a text runs into the first of the next."""
    assert "".join(join([document] for document in documents)) == joined
    assert "".join(join(list(document) for document in documents)) == joined, "pieces must not matter"


def test_a_mistyped_name_gets_the_nearest_one(here: Path) -> None:
    (here / "shakespeare.txt").write_text(TEXT)
    assert refusal("shakespear.txt").endswith("did you mean 'shakespeare.txt'?")
    assert "no folder 'nowhere'" in refusal("nowhere/my.txt")
    assert "data.corpus is empty" in refusal("")
    assert "data.corpus is empty" in refusal([])


def test_a_mistyped_path_is_not_looked_up_on_the_hub(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`texts/mine` has the form of a hub id; asking the hub would take long and end in a riddle."""
    monkeypatch.setattr("gptlit.data.corpus.sources.open_hub", lambda *_: pytest.fail("asked the hub"))
    (here / "texts").mkdir()
    (here / "texts" / "mine").write_text("x")
    assert "did you mean 'texts/mine'?" in refusal("texts/mime").replace("\\\\", "/")
    assert "no folder" in refusal("other/mine.txt")


def test_a_folder_without_text_says_what_it_has(here: Path) -> None:
    (here / "docs").mkdir()
    (here / "docs" / "a.md").write_text("x")
    message = refusal("docs")
    assert "no *.txt" in message
    assert ".md" in message


def test_other_schemes_are_refused() -> None:
    assert "https://" in refusal("s3://bucket/text.txt")


@pytest.mark.skipif(not hasattr(os, "seteuid") or os.name == "nt", reason="needs permissions as Unix has them")
def test_a_file_without_permission_is_refused_as_such(here: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    (here / "secret.txt").write_text(TEXT)
    (here / "vault").mkdir()
    (here / "vault" / "deep.txt").write_text(TEXT)
    (here / "secret.txt").chmod(0)
    (here / "vault").chmod(0)
    root = os.geteuid() == 0
    for parent in [here, *here.parents][:3] if root else ():
        parent.chmod(0o755)
    if root:
        os.seteuid(65534)  # root may read everything
    try:
        assert refusal("secret.txt") == "no permission to read secret.txt"
        assert refusal("vault/deep.txt") == "no permission to read vault/deep.txt"
    finally:
        if root:
            os.seteuid(0)
        (here / "vault").chmod(0o755)


# --- compressed files and tables --------------------------------------------------------------------------------------


def zstd(data: bytes) -> bytes:
    return pyarrow.compress(data, codec="zstd", asbytes=True)


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".zst", zstd)])
def test_a_compressed_text_is_the_text(here: Path, suffix: str, pack: Callable[[bytes], bytes]) -> None:
    (here / f"my.txt{suffix}").write_bytes(pack(TEXT.encode()))
    corpus = load_corpus(f"my.txt{suffix}")
    assert corpus.train + corpus.val == TEXT
    assert corpus.name == "my"


def test_a_compressed_file_of_several_members_is_read_to_its_end(here: Path) -> None:
    """`cat a.gz b.gz` is a gzip file; a reader that stops at the first member loses the rest without a word."""
    (here / "two.txt.gz").write_bytes(gzip.compress(b"one ") + gzip.compress(b"two"))
    assert whole("two.txt.gz") == "one two"


def test_a_damaged_compressed_file_is_refused(here: Path) -> None:
    (here / "half.txt.gz").write_bytes(gzip.compress(os.urandom(5000).hex().encode())[:2000])
    (here / "not.txt.gz").write_bytes(b"plain text")
    for name in ("half.txt.gz", "not.txt.gz"):
        assert refusal(name).startswith(f"cannot read {name}: ")


ROWS = [{"n": 1, "text": "one\r\nline", "title": "I"}, {"n": 2, "text": "", "title": "II"}, {"n": 3, "text": "two"}]


def write_rows(path: Path) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    table = pyarrow.Table.from_pylist(ROWS)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    elif path.suffix == ".csv":
        pyarrow.csv.write_csv(table, path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS, indent=1))
    else:
        path.write_bytes({".jsonl": bytes, ".gz": gzip.compress, ".zst": zstd}[path.suffix](lines))
    return path


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.jsonl.gz", "r.jsonl.zst", "r.parquet", "r.csv"])
def test_a_table_gives_the_rows_of_its_text_column(here: Path, name: str) -> None:
    write_rows(here / name)
    assert whole(name) == "one\nline\n\ntwo"
    assert whole(name, text_column="title") == "I\n\nII", "a row without this column is passed over"


@pytest.mark.parametrize("name", ["r.jsonl", "r.parquet", "r.csv"])
def test_a_wrong_column_is_told_the_right_ones(here: Path, name: str) -> None:
    write_rows(here / name)
    message = refusal(name, text_column="body")
    assert f"{name} has no column 'body', but n, text, title" in message
    assert "--data.text_column" in message
    assert "holds int64, not text" in refusal(name, text_column="n")


def test_a_table_that_is_none_is_refused_by_name(here: Path) -> None:
    for name in ("broken.jsonl", "broken.parquet", "empty.csv", "empty.jsonl"):
        (here / name).write_text("" if name.startswith("empty") else '{"text": "a"}\n{"text": \n')
        assert name in refusal(name)


def test_words_that_mean_nothing_to_a_statistician_are_words(here: Path) -> None:
    (here / "r.csv").write_text("text,n\nnull,1\nNA,2\nnone,3\n")
    assert whole("r.csv") == "null\n\nNA\n\nnone"


def test_texts_and_tables_can_be_mixed(here: Path) -> None:
    write_rows(here / "1.jsonl")
    (here / "2.txt").write_text("three")
    assert whole("[12].*") == "one\nline\n\ntwo\n\nthree"


# --- larger than memory -----------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    words=st.lists(st.text("abé1.!", min_size=1, max_size=4), min_size=1),
    gap=st.sampled_from([" ", "\n", "\n\n", "  "]),
    size=st.integers(1, 20),
)
def test_pieces_put_together_are_the_text(words: list[str], gap: str, size: int) -> None:
    text = gap.join(words)
    assert "".join(recut(list(text), size)) == text
    assert all(recut(list(text), size)), "an empty piece is no piece"


def test_the_tokens_of_the_pieces_are_the_tokens_of_the_text(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "my.txt").write_text(TEXT * 50)
    tokenizer = BPETokenizer.train([TEXT], 300)
    monkeypatch.setattr("gptlit.data.corpus.text.READ_BYTES", 100)
    monkeypatch.setattr("gptlit.data.corpus.load.PIECE", 500)
    pieces = list(iter_text("my.txt"))
    assert len(pieces) > 5
    assert max(map(len, pieces)) < 1000
    assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(TEXT * 50)


def test_a_large_file_is_never_in_memory_whole(here: Path) -> None:
    """A gigabyte must be readable on a machine that has less."""
    with (here / "big.txt").open("w") as file:
        for _ in range(64):
            file.write(TEXT * (2**20 // len(TEXT)))
    program = (
        "import sys, tracemalloc\n"
        "from gptlit.data.corpus import iter_text\n"
        "tracemalloc.start()\n"
        "characters = sum(map(len, iter_text('big.txt')))\n"
        "print(characters, tracemalloc.get_traced_memory()[1])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    characters, peak = map(int, done.stdout.split())
    assert characters == (here / "big.txt").stat().st_size
    assert peak < characters / 2


# --- the network ------------------------------------------------------------------------------------------------------


def test_a_url_is_downloaded_once_and_then_needs_no_network(site: Site) -> None:
    site.pages["/texts/my%20play.txt"] = TEXT.encode()
    url = f"{site.url}/texts/my%20play.txt"
    assert whole(url) == TEXT
    assert load_corpus(url).source == url
    site.close()
    assert whole(url) == TEXT
    assert site.requests.count("GET /texts/my%20play.txt") == 1


def test_a_copy_is_enough_without_importing_datasets(site: Site) -> None:
    """The import takes longer than reading the text, at every start of every run."""
    site.pages["/my.txt"] = TEXT.encode()
    load_corpus(f"{site.url}/my.txt")
    program = (
        f"import sys, gptlit.data.corpus as c; c.load_corpus('{site.url}/my.txt'); print('datasets' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_url_is_read_as_its_name_says(site: Site) -> None:
    site.pages["/r.jsonl.gz?download=true"] = gzip.compress(b'{"text": "one"}\n{"text": "two"}\n')
    assert whole(f"{site.url}/r.jsonl.gz?download=true") == "one\n\ntwo"


def test_nothing_is_kept_of_a_download_that_breaks_off(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a file in the cache would be the text of every later run."""
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
            load_corpus(f"{site.url}/my.txt", cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert whole(f"{site.url}/my.txt", cache_dir=tmp_path) == TEXT


def test_an_address_that_is_not_there_is_the_users_mistake_and_no_reason_to_fall_back(site: Site) -> None:
    message = refusal(f"{site.url}/nothing.txt", fallback="sample")
    assert "404" in message
    assert "check the address" in message


def test_a_server_in_trouble_is_the_networks_fault(site: Site) -> None:
    site.pages["/my.txt"] = 503
    with pytest.raises(NetworkError, match="503"):
        load_corpus(f"{site.url}/my.txt")


def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library would wait for five minutes."""
    monkeypatch.setattr("gptlit.data.corpus.download.SILENCE_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as mute, pytest.raises(NetworkError):
        load_corpus(f"http://127.0.0.1:{mute.getsockname()[1]}/my.txt")


def test_a_web_page_is_not_taken_for_a_text_and_not_kept(site: Site) -> None:
    """The address of a page that shows a file is easily mistaken for that of the file."""
    site.pages["/blob/my.txt"] = b"\n<!DOCTYPE html><html>..."
    for _ in range(2):
        assert "web page" in refusal(f"{site.url}/blob/my.txt")
    assert site.requests.count("GET /blob/my.txt") == 2


def test_without_a_network_the_error_says_what_works(nobody: str) -> None:
    message = refusal(f"{nobody}/my.txt")
    assert message.startswith(f"cannot reach {nobody}/my.txt (")
    assert "--data.corpus sample" in message


def test_offline_mode_is_respected(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    site.pages["/my.txt"] = TEXT.encode()
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # what the variable of that name sets at import
    with pytest.raises(NetworkError, match=r"[Oo]ffline"):
        load_corpus(f"{site.url}/my.txt")
    assert site.requests == []


def test_a_cache_that_cannot_be_written_is_named(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    site.pages["/my.txt"] = TEXT.encode()
    message = refusal(f"{site.url}/my.txt", cache_dir=tmp_path / "file")
    assert str(tmp_path / "file") in message
    assert "XDG_CACHE_HOME" in message


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Moves tinyshakespeare to another address."""
    return lambda url: monkeypatch.setattr("gptlit.data.corpus.sources.TINYSHAKESPEARE_URL", url)


def test_tinyshakespeare_is_downloaded_checked_and_kept(
    site: Site, at: Callable[[str], None], tinyshakespeare: Path
) -> None:
    site.pages["/input.txt"] = tinyshakespeare.read_bytes()
    at(f"{site.url}/input.txt")
    first = load_corpus("tinyshakespeare")
    site.close()
    assert load_corpus("tinyshakespeare") == first
    assert first.name == "tinyshakespeare"
    assert (len(first.train), len(first.val)) == (1_003_854, 111_540)


def test_a_damaged_tinyshakespeare_is_removed_and_never_replaced_by_the_fallback(
    site: Site, at: Callable[[str], None], tmp_path: Path
) -> None:
    """A copy that is kept though it is damaged fails for ever; a fallback would hide it."""
    site.pages["/input.txt"] = b"First Citizen: or not"
    at(f"{site.url}/input.txt")
    message = refusal("tinyshakespeare", fallback="sample", cache_dir=tmp_path)
    assert hashlib.sha256(b"First Citizen: or not").hexdigest() in message
    assert str(tmp_path) in message
    assert list(tmp_path.iterdir()) == []


def test_a_copy_that_was_damaged_later_is_found_out(
    site: Site, at: Callable[[str], None], tinyshakespeare: Path, tmp_path: Path
) -> None:
    site.pages["/input.txt"] = tinyshakespeare.read_bytes()
    at(f"{site.url}/input.txt")
    load_corpus("tinyshakespeare", cache_dir=tmp_path)
    (copy,) = tmp_path.iterdir()
    copy.write_bytes(copy.read_bytes()[:-1])
    assert "sha256" in refusal("tinyshakespeare", cache_dir=tmp_path)
    load_corpus("tinyshakespeare", cache_dir=tmp_path)


def test_without_a_network_the_fallback_is_used_and_says_so(nobody: str, at: Callable[[str], None]) -> None:
    at(f"{nobody}/input.txt")
    corpus = load_corpus("tinyshakespeare", fallback="sample")
    assert corpus.train == load_corpus("sample").train
    assert corpus.name == "sample", "a run on the sample must not be called tinyshakespeare"
    assert corpus.used_fallback
    assert corpus.notice is not None
    assert corpus.notice.startswith("tinyshakespeare is out of reach (")
    assert "sample play" in corpus.notice
    with pytest.raises(NetworkError):
        load_corpus("tinyshakespeare")


def test_a_wall_before_tinyshakespeare_counts_as_no_network(site: Site, at: Callable[[str], None]) -> None:
    """A firewall answers 403 for an address that is known to be right."""
    site.pages["/input.txt"] = 403
    at(f"{site.url}/input.txt")
    assert load_corpus("tinyshakespeare", fallback="sample").used_fallback


def test_a_wrong_path_is_no_reason_to_fall_back(here: Path) -> None:
    assert "there is no file" in refusal("nothing.txt", fallback="sample")


# --- the hub ----------------------------------------------------------------------------------------------------------


class Hub(Site):
    """As much of the Hugging Face Hub as `datasets` asks for one data set, `someone/tales`."""

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
    yield hub
    hub.close()


def test_a_hub_data_set_is_loaded_and_then_needs_no_network(hub: Hub, here: Path) -> None:
    corpus = load_corpus("someone/tales", cache_dir=here)
    assert corpus.train + corpus.val == "one\n\ntwo"
    assert (corpus.name, corpus.source) == ("someone/tales", "someone/tales on the Hugging Face Hub")
    assert whole("hf://someone/tales#validation", cache_dir=here) == "three"
    assert whole("someone/tales#train[1:]", cache_dir=here) == "two"
    assert "".join(iter_text("someone/tales", cache_dir=here, streaming=True)) == "one\n\ntwo"
    hub.close()
    assert whole("someone/tales", cache_dir=here) == "one\n\ntwo"


def test_what_the_hub_does_not_know_is_refused_and_no_reason_to_fall_back(hub: Hub, here: Path) -> None:
    assert "someone/nothing" in refusal("someone/nothing", cache_dir=here, fallback="sample")
    assert "Should be one of ['train', 'validation']" in refusal("someone/tales#tain", cache_dir=here)
    assert "BuilderConfig 'english' not found" in refusal("someone/tales:english", cache_dir=here)
    assert "has no column 'body', but text, n" in refusal("someone/tales", text_column="body", cache_dir=here)
    assert "write owner/name" in refusal("hf://a/b/c")


def test_a_hub_out_of_reach_is_given_up_at_once(nobody: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library tries again for half a minute, and fills the terminal meanwhile."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", nobody)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"slept for {seconds} s before another try"))
    with pytest.raises(NetworkError, match="cannot reach someone/tales on the Hugging Face Hub"):
        load_corpus("someone/tales", cache_dir=here)
    assert load_corpus("someone/tales", cache_dir=here, fallback="sample").used_fallback
    assert datasets.config.HF_HUB_OFFLINE is False, "the setting of the library must be put back"


def test_nothing_goes_to_stdout(site: Site, hub: Hub, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Sampled text is piped into files; a progress bar must not be in it."""
    site.pages["/r.jsonl"] = b'{"text": "one"}\n{"text": "two"}\n'
    load_corpus(f"{site.url}/r.jsonl")
    load_corpus("someone/tales", cache_dir=here)
    assert capfd.readouterr().out == ""


def test_a_local_table_is_read_without_a_word_to_anybody(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library counts what is loaded on a server of its own, and waits three seconds where that is out of reach."""
    asked: list[str] = []
    real = socket.getaddrinfo

    def noted(host: str, *rest: object, **options: object) -> object:
        asked.append(host)
        return real(host, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", noted)
    load_corpus(write_rows(here / "r.jsonl").name)
    assert asked == []
