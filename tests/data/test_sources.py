"""What a corpus can be: files, folders, globs, archives, folders of other projects; and the refusals."""

import json
import os
import pickle
import tarfile
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from corpora import own_cache, part_of_text, refusal, text_of
from hypothesis import given, settings
from hypothesis import strategies as st

from gptlit.data.corpus import TextSpec, open_corpus
from gptlit.data.corpus.text import decode, lines_of, recut
from gptlit.tokenizer import BPETokenizer

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


def test_a_file_is_read_as_it_stands(here: Path) -> None:
    (here / "my.txt").write_bytes(TEXT.encode())
    corpus = open_corpus(TextSpec("my.txt"))
    assert text_of("my.txt") == TEXT
    assert (corpus.name, corpus.words, corpus.notices) == ("my", "my.txt", ())


def test_a_validation_text_of_its_own_is_part_one(here: Path) -> None:
    (here / "a.txt").write_text("learn from this")
    (here / "b.txt").write_text("measure on this")
    assert part_of_text(0, "a.txt", val_corpus="b.txt") == "learn from this"
    assert part_of_text(1, "a.txt", val_corpus="b.txt") == "measure on this"


def test_the_sample_play_is_ascii() -> None:
    assert len(text_of("sample")) > 50_000
    assert text_of("sample").isascii()
    assert open_corpus(TextSpec("sample")).name == "sample"


def test_windows_and_old_mac_line_ends_and_the_byte_order_mark_are_removed(here: Path) -> None:
    """`\\r` and U+FEFF would become invisible characters of the vocabulary."""
    (here / "win.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert text_of("win.txt") == "one\ntwo\nthree\n"


@settings(deadline=None)
@given(text=st.text(st.sampled_from("a\r\né日\U0001f600 "), min_size=1), size=st.integers(1, 5))
def test_a_file_read_in_chunks_is_the_file_read_at_once(text: str, size: int) -> None:
    """A chunk may end inside a character, or between \\r and \\n."""
    content = text.encode()
    chunks = [content[start : start + size] for start in range(0, len(content), size)]
    expected = text.replace("\r\n", "\n").replace("\r", "\n")
    assert "".join(decode(chunks, "chunks")) == expected
    assert "".join(lines_of(decode(chunks, "chunks"))) == expected
    assert all(line.index("\n") == len(line) - 1 for line in list(lines_of(decode(chunks, "chunks")))[:-1])


def test_a_byte_that_is_not_utf8_is_named_with_its_offset(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "latin.txt").write_bytes(b"\xef\xbb\xbfcaf\xc3\xa9 caf\xe9 au lait")
    expected = "corpus latin.txt is not UTF-8: byte 0xE9 at offset 12; convert it, e.g. iconv -f CP1252 -t UTF-8"
    assert refusal("latin.txt") == expected
    for size in range(1, 8):  # the offset is that of the file, not of the chunk
        monkeypatch.setattr("gptlit.data.corpus.streams.READ_BYTES", size)
        assert refusal("latin.txt").startswith(expected.partition(";")[0])
    (here / "cut.txt").write_bytes("caf\u00e9".encode()[:-1])
    assert "offset 3" in refusal("cut.txt")


def test_utf16_and_utf32_are_recognised(here: Path) -> None:
    for encoding in ("utf-16", "utf-32"):
        (here / "note.txt").write_bytes("hello".encode(encoding))
        assert f"iconv -f {encoding.upper()} " in refusal("note.txt")


@pytest.mark.parametrize(
    ("content", "advice"),
    [
        ("He said “no” and didn’t go.\n".encode("cp1252") * 9, "iconv -f CP1252 -t"),
        ("Müßiggänger für später.\n".encode() * 99 + b"caf\xe9", "the rest is UTF-8: leave such bytes out"),
        (b"\xe9" + "Müßiggänger für später.\n".encode() * 99, "the rest is UTF-8: leave such bytes out"),
        (("日本語" * 9).encode()[:-1], "the rest is UTF-8: leave such bytes out"),
        ("床前明月光，疑是地上霜。\n".encode("gbk"), "from its encoding (GB18030,"),
        ("Мой дядя самых честных правил\n".encode("koi8-r"), "from its encoding (GB18030,"),
        ("これはテキストです。\n".encode("shift-jis"), "from its encoding (GB18030,"),
        ('<meta charset="gb2312"><p>床前'.encode("gbk"), "as it says: iconv -f gb2312 -t"),
        ('<?xml version="1.0" encoding="ISO-8859-15"?>50 €'.encode("iso-8859-15"), "iconv -f ISO-8859-15 -t"),
        (b"# -*- coding: latin-1 -*-\n# caf\xe9", "iconv -f latin-1 -t"),
        (b"<meta charset='utf-8'><p>caf\xe9", "iconv -f CP1252 -t"),
    ],
    ids=[
        "Windows",
        "late damage",
        "early damage",
        "cut",
        "Chinese",
        "Russian",
        "Japanese",
        "HTML",
        "XML",
        "Python",
        "wrong",
    ],
)
def test_advice_on_encodings_does_not_spoil_the_text(here: Path, content: bytes, advice: str) -> None:
    """Latin-1 has no quotes, and reading UTF-8 with one bad byte as Latin-1 spoils every other character."""
    (here / "a.txt").write_bytes(content)
    message = refusal("a.txt")
    assert message.startswith("corpus a.txt is not UTF-8: byte 0x")
    assert advice in message


def test_nul_bytes_in_a_text_are_named(here: Path) -> None:
    """As in logs of a machine that lost its power."""
    (here / "a.log").write_bytes(b"2024-01-01 started\n" * 50 + bytes(16) + b"2024-01-02 started\n")
    assert refusal("a.log").startswith("corpus a.log holds NUL bytes: take them out, e.g. with tr -d '\\000'")


@pytest.mark.parametrize("content", ["", " \n\n ", "\ufeff"])
def test_an_empty_text_is_refused(here: Path, content: str) -> None:
    (here / "empty.txt").write_text(content, encoding="utf-8")
    assert refused(TextSpec("empty.txt")) == "corpus empty.txt holds no text"


def test_a_text_too_short_for_two_parts_is_refused(here: Path) -> None:
    (here / "a.txt").write_text("a")
    assert "too few characters" in refused(TextSpec("a.txt"))


def refused(spec: TextSpec) -> str:
    """Return the error of encoding a text."""
    from gptlit.data import encode_text
    from gptlit.errors import UserError

    with pytest.raises(UserError) as caught:
        encode_text(spec, None, "char", 300)
    return str(caught.value)


# --- folders and globs ------------------------------------------------------------------------------------------------


def test_a_folder_is_its_texts_and_tables_in_order_without_hidden_ones(here: Path) -> None:
    for name in ("b.txt", "a.txt", "sub/c.txt", ".git/d.txt", "sub/.e.txt"):
        (here / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (here / "texts" / name).write_text(name)
    corpus = open_corpus(TextSpec("texts"))
    assert text_of("texts") == "a.txt\n\nb.txt\n\nsub/c.txt"
    assert (corpus.name, corpus.words, corpus.notices) == ("texts", "3 files of texts", ())
    assert text_of("texts/") == text_of("texts")
    (here / "texts" / "aa.jsonl").write_text('{"text": "a row"}')
    assert text_of("texts") == "a.txt\n\na row\n\nb.txt\n\nsub/c.txt"
    (here / "texts" / "sub" / "c.txt").write_bytes(b"\xff")
    for spec in ("texts", "texts/sub", "texts/sub/*"):
        assert refusal(spec).startswith(f"corpus {Path('texts/sub/c.txt')} is not UTF-8"), "the file is named"


def test_a_folder_says_what_it_left_out(here: Path) -> None:
    """Guards against a folder of which the larger part is not read, unnoticed."""
    (here / "docs").mkdir()
    for name in ("a.md", "b.md", "c.png", "d.txt", "e.csv"):
        (here / "docs" / name).write_text("x\ny\n")
    (notice,) = open_corpus(TextSpec("docs")).notices
    assert notice == "docs: left out 2 .md, 1 .png, e.csv (without a column 'text')"
    assert text_of("docs") == "x\ny\n"
    (here / "docs" / "d.txt").unlink()
    message = refusal("docs")
    assert message.startswith("corpus the folder docs has no text in it or below, but 2 .md, 1 .png")
    assert message.endswith("e.csv (without a column 'text'): give a glob, e.g. 'docs/**/*.md'")
    for name in ("a.md", "b.md"):
        (here / "docs" / name).rename(here / "docs" / name.replace(".md", ".tex"))
    for name in ("d.png", "e.png", "x.pdf", "y.pdf", "z.pdf"):
        (here / "docs" / name).touch()
    assert refusal("docs").endswith("give a glob, e.g. 'docs/**/*.tex'"), "the texts, not the pictures"


def test_a_table_whose_first_value_is_no_text_is_refused_and_not_left_out(here: Path) -> None:
    """It has the column: its other rows would be lost, with a wrong reason."""
    (here / "mixed").mkdir()
    (here / "mixed" / "a.jsonl").write_text('{"text": 1984}\n{"text": "a row"}\n')
    (here / "mixed" / "b.txt").write_text("a text")
    with zipfile.ZipFile("mixed.zip", "w") as archive:
        for name in ("a.jsonl", "b.txt"):
            archive.write(here / "mixed" / name, name)
    for spec, where in (("mixed", "mixed/a.jsonl"), ("mixed.zip", "a.jsonl in mixed.zip")):
        assert refusal(spec).startswith(f"text_column 'text' holds 1984 in line 1 of {where}, which is not text")


def test_a_folder_of_tables_without_the_column_is_answered_with_their_columns(here: Path) -> None:
    (here / "chats").mkdir()
    (here / "chats" / "a.json").write_text('{"name": "x", "messages": []}')
    assert refusal("chats") == "text_column 'text' is not a column of chats/a.json, which has name, messages"


@pytest.mark.parametrize("ending", [".zip", ".tar"])
def test_tables_without_the_column_are_left_out_of_an_archive(here: Path, ending: str) -> None:
    """As in an export of Slack, with a list of its users next to the messages."""
    files = {"users.json": [{"name": "ann"}], "general/1.json": [{"text": "Hi"}], "general/2.json": [{"text": "Bye"}]}
    contents = {name: json.dumps(rows).encode() for name, rows in files.items()}

    def write(name: str) -> None:
        if ending == ".zip":
            with zipfile.ZipFile(name, "w") as archive:
                for member, content in contents.items():
                    archive.writestr(member, content)
            return
        with tarfile.open(name, "w") as archive:
            for member, content in contents.items():
                entry = tarfile.TarInfo(member)
                entry.size = len(content)
                archive.addfile(entry, BytesIO(content))

    write(f"a{ending}")
    assert text_of(f"a{ending}") == "Hi\nBye"
    (notice,) = open_corpus(TextSpec(f"a{ending}")).notices
    assert notice == f"a{ending}: left out users.json (without a column 'text')"
    assert text_of(f"a{ending}", text_column="name") == "ann"
    for name in ("general/1.json", "general/2.json"):
        del contents[name]
    write(f"b{ending}")
    assert refusal(f"b{ending}") == f"text_column 'text' is not a column of users.json in b{ending}, which has name"


def test_a_glob_is_sorted_by_name(here: Path) -> None:
    for name in ("10.md", "2.md", "1.md", "deep/0.md"):
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_text(name)
    assert text_of("*.md") == "1.md\n\n10.md\n\n2.md"
    assert text_of("**/*.md") == "1.md\n\n10.md\n\n2.md\n\ndeep/0.md"
    assert "matches no file" in refusal("*.rst")


def test_several_specs_keep_their_order(here: Path) -> None:
    (here / "a.txt").write_text("A")
    (here / "b.txt").write_text("B")
    corpus = open_corpus(TextSpec(["b.txt", "a.txt"]))
    assert text_of(["b.txt", "a.txt"]) == "B\n\nA"
    assert (corpus.name, corpus.words) == ("b+a", "b.txt, a.txt")


def test_a_file_with_the_name_of_a_glob_is_that_file(here: Path) -> None:
    (here / "part[1].txt").write_text("the part")
    (here / "rows[1].jsonl").write_text('{"text": "the row"}\n')
    assert text_of("part[1].txt") == "the part"
    assert text_of("rows[1].jsonl") == "the row"


def test_texts_and_tables_can_be_mixed(here: Path) -> None:
    (here / "1.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (here / "2.txt").write_text("three")
    assert text_of("[12].*") == "one\n\ntwo\n\nthree"


def test_a_tilde_is_expanded_to_the_home_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.setenv("USERPROFILE", str(here))
    (here / "my.txt").write_text("at home")
    assert text_of("~/my.txt") == "at home"


def test_a_mistyped_name_gets_the_nearest_one(here: Path) -> None:
    (here / "shakespeare.txt").write_text(TEXT)
    assert refusal("shakespear.txt").endswith("did you mean 'shakespeare.txt'?")
    assert "the folder 'nowhere'" in refusal("nowhere/my.txt")
    assert refusal("").startswith("corpus is empty")
    assert refusal([]).startswith("corpus is empty")


def test_a_mistyped_path_is_not_looked_up_on_the_hub(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`texts/mine` has the form of a hub id; asking the hub takes long and ends in an unrelated error."""
    monkeypatch.setattr("gptlit.data.corpus.sources.open_hub", lambda *_: pytest.fail("asked the hub"))
    (here / "texts").mkdir()
    (here / "texts" / "mine").write_text("x")
    assert "did you mean 'texts/mine'?" in refusal("texts/mime").replace("\\\\", "/")
    for name in ("mine.txt", "mine.parquet", "mine.tar.gz", "train.bin"):
        assert "the folder 'other'" in refusal(f"other/{name}")


def test_other_schemes_are_refused() -> None:
    assert "https://" in refusal("s3://bucket/text.txt")


@pytest.mark.skipif(not hasattr(os, "seteuid") or os.name == "nt", reason="needs permissions as Unix has them")
def test_a_file_without_permission_is_refused(here: Path) -> None:
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
        assert refusal("secret.txt") == "corpus secret.txt cannot be read: no permission"
        assert refusal("vault/deep.txt") == "corpus vault/deep.txt cannot be read: no permission"
    finally:
        if root:
            os.seteuid(0)
        (here / "vault").chmod(0o755)


# --- archives and folders of other projects ---------------------------------------------------------------------------


def test_an_archive_says_what_it_left_out(here: Path) -> None:
    with zipfile.ZipFile(here / "a.zip", "w") as archive:
        for name in ("b/x.txt", "__MACOSX/x.txt", ".hidden.txt", "y.md", "r.jsonl"):
            archive.writestr(name, '{"text": "row"}' if name == "r.jsonl" else name)
    assert text_of("a.zip") == "b/x.txt\n\nrow"
    assert open_corpus(TextSpec("a.zip")).notices == ("a.zip: left out 1 .md",)


def test_an_archive_of_one_file_without_an_ending_is_that_file(here: Path) -> None:
    """As enwik8.zip and text8.zip are."""
    with zipfile.ZipFile(here / "enwik8.zip", "w") as archive:
        archive.writestr("enwik8", TEXT)
    assert text_of("enwik8.zip") == TEXT


def test_an_archive_without_text_or_with_a_password_is_refused(here: Path) -> None:
    with zipfile.ZipFile(here / "p.zip", "w") as archive:
        archive.writestr("a.png", "x")
        archive.writestr("b.png", "x")
    assert refusal("p.zip") == "corpus p.zip has no text in it, but 2 .png: unpack it and give a glob"
    zipfile.ZipFile(here / "empty.zip", "w").close()
    assert refusal("empty.zip") == "corpus empty.zip has no files in it"
    content = bytearray((here / "p.zip").read_bytes())
    for start in range(len(content) - 4):
        if content[start : start + 4] == b"PK\x01\x02":
            content[start + 8] |= 1  # the flag of encryption
    (here / "locked.zip").write_bytes(content)
    assert refusal("locked.zip") == "corpus locked.zip is encrypted: unpack it"


def test_a_damaged_archive_is_refused(here: Path) -> None:
    with tarfile.open(here / "a.tar", "w") as archive:
        member = tarfile.TarInfo("x.txt")
        member.size = 5000
        archive.addfile(member, BytesIO(b"x" * 5000))
    content = (here / "a.tar").read_bytes()
    (here / "cut.tar").write_bytes(content[:3000])
    (here / "not.zip").write_bytes(b"PK\x03\x04" + content)
    for name in ("cut.tar", "not.zip"):
        assert refusal(name).startswith(f"corpus {name} cannot be read: ")


def write_nanogpt(folder: Path, meta: object) -> str:
    """Write a data folder as nanoGPT's prepare.py does; returns its text."""
    folder.mkdir()
    text = "hello world\n" * 5
    ids = np.array([sorted(set(text)).index(character) for character in text], np.uint16)
    ids[:50].tofile(folder / "train.bin")
    ids[50:].tofile(folder / "val.bin")
    if meta is not None:
        (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return text


def test_a_data_folder_of_nanogpt_is_the_text_that_it_was_made_from(here: Path) -> None:
    letters = sorted(set("hello world\n"))
    meta = {"vocab_size": len(letters), "itos": dict(enumerate(letters)), "stoi": {c: i for i, c in enumerate(letters)}}
    text = write_nanogpt(here / "shakespeare_char", meta)
    assert text_of("shakespeare_char") == text
    assert open_corpus(TextSpec("shakespeare_char")).name == "shakespeare_char"
    assert part_of_text(0, "shakespeare_char/train.bin", val_corpus="shakespeare_char/val.bin") == text[:50]
    assert part_of_text(1, "shakespeare_char/train.bin", val_corpus="shakespeare_char/val.bin") == text[50:]


class Payload:
    """Something that a pickle would run when it is loaded."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("executed",)


def test_a_pickle_next_to_tokens_is_read_without_executing_it(here: Path) -> None:
    """Guards against a data folder from the internet that runs code."""
    write_nanogpt(here / "evil", {"itos": Payload()})
    message = refusal("evil")
    assert "is not a meta.pkl of nanoGPT: it would import" in message
    assert not (here / "executed").exists()
    for name, meta in {"list": [1], "numbers": {"itos": {0: 1}}, "few": {"itos": {0: "a"}}}.items():
        write_nanogpt(here / name, meta)
        assert "meta.pkl" in refusal(name)


def test_tokens_of_other_projects_are_refused_with_what_helps(here: Path) -> None:
    write_nanogpt(here / "gpt2", None)
    assert "gpt2/train.bin holds token ids, and there is no meta.pkl" in refusal("gpt2").replace("\\\\", "/")
    (here / "chunks").mkdir()
    (here / "chunks" / "index.json").write_text('{"chunks": [], "config": {}}')
    message = refusal("chunks")
    assert "chunks of litdata" in message
    assert "JSON Lines" in message


# --- pieces -----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    words=st.lists(st.text("abé1.!", min_size=1, max_size=4), min_size=1),
    gap=st.sampled_from([" ", "\n", "\n\n", "  ", ""]),
    size=st.integers(1, 20),
)
def test_pieces_joined_are_the_text(words: list[str], gap: str, size: int) -> None:
    text = gap.join(words)
    assert "".join(recut(list(text), size)) == text
    assert all(recut(list(text), size)), "no piece is empty"


def test_the_tokens_of_the_pieces_are_the_tokens_of_the_text(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = TEXT * 50 + "x" * 700 + TEXT
    (here / "my.txt").write_text(text)
    tokenizer = BPETokenizer.train([TEXT], 300)
    monkeypatch.setattr("gptlit.data.corpus.streams.READ_BYTES", 100)
    monkeypatch.setattr("gptlit.data.corpus.load.PIECE", 500)
    pieces = [piece for _, piece in open_corpus(TextSpec("my.txt")).parts()]
    assert len(pieces) > 5
    assert max(map(len, pieces)) < 1500
    assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(text)


def test_a_text_without_any_blank_is_cut_when_it_is_very_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against reading a very long line, such as a genome, into memory at once."""
    monkeypatch.setattr("gptlit.data.corpus.text.LONGEST_WORD", 100)
    assert list(map(len, recut(["acgt" * 5] * 20, 20))) == [100] * 4
