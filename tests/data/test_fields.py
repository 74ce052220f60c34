"""Corpora as people of different fields have them: exactly their text, or a refusal that says what helps."""

import csv
import gzip
import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from command import report
from corpora import own_cache, refusal, text_of

LATEX = '\\documentclass{article}\n% a comment\n\\begin{document}\nLet $x^2$; na\\"{\\i}ve.\n\\end{document}\n'
SUBTITLES = "1\n00:00:01,600 --> 00:00:04,200\n<i>Hello</i> there.\n\n2\n00:00:05,000 --> 00:00:06,000\n- No.\n- Yes!\n"
WHATSAPP = "[12/03/2024, 10:15:32] Ann: \u200eMessages are encrypted.\n[12/03/2024, 10:15:40] Bob: hi 🙂\nsecond line\n"
LOGS = ["2024-01-03 INFO \x1b[32mnew\x1b[0m\n", '2024-01-02 ERROR x\n  File "a.py", line 1\n', "2024-01-01 INFO old\n"]
TREEBANK = "# text = They buy.\n1\tThey\tthey\tPRON\t_\tCase=Nom|Number=Plur\t2\n\n1\tNo\tno\tINTJ\t_\t_\t0\n\n"
FAMILY = "0 HEAD\n1 CHAR UTF-8\n0 @I1@ INDI\n1 NAME John /Doe/\n2 DATE 1 JAN 1900\n0 TRLR\n"
CHESS = '[Event "One"]\n[Result "1-0"]\n\n1. e4 e5 2. Nf3 {a comment} 1-0\n\n[Event "Two"]\n\n1. d4 d5 0-1\n\n'
TUNES = "X:1\nT:Speed the Plough\nM:4/4\nK:G\n|:GABc dedB|dedB dedB|\n\nX:2\nK:D\nABc|\n"
NOTES = "---\ntitle: A\ntags: [x, y]\n---\n\n# A\n\nText **bold**.\n"
MIDI = b"MThd" + struct.pack(">IHHH", 6, 1, 1, 480) + b"MTrk" + bytes([0, 0, 0, 4, 0, 255, 47, 0])


@pytest.fixture(autouse=True)
def here(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and an empty cache."""
    own_cache(tmp_path_factory, monkeypatch)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(**contents: str | bytes) -> Callable[[], None]:
    """Return a function that writes files; `__` stands for `/`, a last `_` for the dot of the ending."""

    def write() -> None:
        for name, content in contents.items():
            stem, _, ending = name.replace("__", "/").rpartition("_")
            path = Path(f"{stem}.{ending}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    return write


def archive(name: str, contents: dict[str, str | bytes]) -> Callable[[], None]:
    def write() -> None:
        with zipfile.ZipFile(name, "w") as stream:
            for member, content in contents.items():
                stream.writestr(member, content)

    return write


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def sheet(*rows: tuple[str, ...]) -> str:
    """Return rows as Discord's exporter writes them: every field in quotes, after a byte order mark."""
    stream = io.StringIO(newline="")
    csv.writer(stream, quoting=csv.QUOTE_ALL).writerows(rows)
    return "\ufeff" + stream.getvalue()


def logs() -> None:
    Path("app.log").write_text(LOGS[0])
    Path("app.log.1").write_text(LOGS[1])
    Path("app.log.2.gz").write_bytes(gzip.compress(LOGS[2].encode()))


def translations() -> None:
    rows = [{"translation": {"en": f"row {i}", "de": f"Zeile {i}"}} for i in range(2)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "opus.parquet")


TELEGRAM = {"name": "Ann", "messages": [{"type": "message", "from": "Ann", "text": ["see ", {"text": "http://x"}]}]}
SLACK = {"users.json": json.dumps([{"name": "ann"}]), "general/1.json": json.dumps([{"text": "Hi"}, {"text": "Bye"}])}
SQUAD = {"version": "1", "data": [{"paragraphs": [{"context": "One.", "qas": []}, {"context": "Two."}]}]}

READ: list[tuple[str, str, dict[str, object], Callable[[], None], str]] = [
    (
        "LaTeX, a folder of chapters",
        "thesis/**/*.tex",
        {},
        files(thesis__a_tex=LATEX, thesis__ch__b_tex="b"),
        f"{LATEX}\nb",
    ),
    ("subtitles, Windows", "film.srt", {}, files(film_srt="\ufeff" + SUBTITLES.replace("\n", "\r\n")), SUBTITLES),
    (
        "chat of WhatsApp",
        "chat.zip",
        {},
        archive("chat.zip", {"_chat.txt": WHATSAPP, "1.jpg": b"\xff\xd8\xff"}),
        WHATSAPP,
    ),
    (
        "chat of Telegram",
        "result.json",
        {"text_column": "messages"},
        files(result_json=json.dumps(TELEGRAM)),
        "Ann: see http://x",
    ),
    ("export of Slack", "slack.zip", {}, archive("slack.zip", SLACK), "Hi\nBye"),
    (
        "export of Discord",
        "chat.csv",
        {"text_column": "Content"},
        files(chat_csv=sheet(("Author", "Content"), ("ann", 'a "b"\nc'), ("bob", ""))),
        'a "b"\nc',
    ),
    ("logs, rotated", "app.log*", {}, logs, "\n".join(LOGS)),
    ("treebank, CoNLL-U", "ud.conllu", {}, files(ud_conllu=TREEBANK), TREEBANK),
    ("family tree, GEDCOM of an old Mac", "a.ged", {}, files(a_ged=FAMILY.replace("\n", "\r")), FAMILY),
    ("chess games, PGN", "games.pgn", {}, files(games_pgn=CHESS), CHESS),
    ("tunes, ABC", "tunes.abc", {"documents": "blank_lines"}, files(tunes_abc=TUNES), TUNES.rstrip("\n")),
    (
        "notes, Markdown with front matter",
        "notes/*.md",
        {},
        files(notes__a_md=NOTES, notes__b_md="# B\n"),
        f"{NOTES}\n# B\n",
    ),
    (
        "JSON Lines with texts inside of objects",
        "a.jsonl",
        {"text_column": "data.text"},
        files(a_jsonl=lines({"data": {"text": "one"}}, {"data": {"text": "two"}})),
        "one\ntwo",
    ),
    (
        "questions, SQuAD",
        "dev.json",
        {"text_column": "data.paragraphs.context"},
        files(dev_json=json.dumps(SQUAD)),
        "One.\nTwo.",
    ),
    (
        "poems, JSON with lists of lines",
        "a.json",
        {"text_column": "paragraphs"},
        files(a_json=json.dumps([{"paragraphs": ["床前明月光，", "疑是地上霜。"]}])),
        "床前明月光，\n疑是地上霜。",
    ),
    ("quotes, JSON array of strings", "a.json", {}, files(a_json=json.dumps(["one", "two"])), "one\ntwo"),
    ("translations, Parquet", "opus.parquet", {"text_column": "translation.de"}, translations, "Zeile 0\nZeile 1"),
    (
        "sentences of Tatoeba, TSV without a header",
        "a.tsv",
        {"text_column": "3"},
        files(a_tsv='1\tcmn\t"試試看！"\n2\tcmn\t睡覺了。\n'),
        '"試試看！"\n睡覺了。',
    ),
    ("table of Excel with its delimiter", "a.csv", {}, files(a_csv="sep=;\r\nid;text\r\n1;a, b\r\n"), "a, b"),
    ("column of an old Mac, CSV", "a.csv", {}, files(a_csv='text\rone\r"two\nlines"\r'), "one\n\ntwo\nlines"),
]

REFUSED: list[tuple[str, str, dict[str, object], Callable[[], None], str]] = [
    (
        "LaTeX, the folder",
        "thesis",
        {},
        files(thesis__a_tex=LATEX, thesis__fig_png=b"x", thesis__b_png=b"x"),
        "give a glob, e.g. 'thesis/**/*.tex'",
    ),
    (
        "LaTeX of 1998",
        "a.tex",
        {},
        files(a_tex="M\u00fcller: \u201eso\u201c \u2013 ".encode("cp1252") * 9),
        "is not UTF-8: byte 0xFC at offset 1; convert it, e.g. iconv -f CP1252 -t UTF-8",
    ),
    (
        "novel in UTF-8 with one wrong byte",
        "a.txt",
        {},
        files(a_txt="Müßig später. ".encode() * 99 + b"\xe9"),
        "leave such bytes out, e.g. iconv -c -f UTF-8 -t UTF-8",
    ),
    (
        "poems in GBK",
        "a.txt",
        {},
        files(a_txt="床前明月光，疑是地上霜。".encode("gbk")),
        "convert it from its encoding (GB18030, ",
    ),
    (
        "log of PowerShell",
        "a.log",
        {},
        files(a_log="one\r\n".encode("utf-16")),
        "convert it, e.g. iconv -f UTF-16 -t UTF-8",
    ),
    (
        "log with NUL bytes",
        "a.log",
        {},
        files(a_log=b"INFO started\n" * 9 + bytes(4)),
        "holds NUL bytes: take them out, e.g. with tr -d",
    ),
    (
        "MIDI",
        "a.mid",
        {},
        files(a_mid=MIDI),
        "is a MIDI file, not a text: write its notes as text, e.g. with midicsv or midi2abc",
    ),
    (
        "MIDI as CSV",
        "a.csv",
        {},
        files(a_csv="0, 0, Header, 1, 2, 480\n1, 0, Tempo, 500000\n"),
        "which has 0, 0, Header, 1, 2, 480; if that is no header, name a column by its number: 1",
    ),
    (
        "book, EPUB",
        "a.epub",
        {},
        archive("a.epub", {"mimetype": "application/epub+zip"}),
        "is an EPUB book, not a text: extract its text, e.g. with pandoc -t plain",
    ),
    (
        "manuscript, Word",
        "a.docx",
        {},
        archive("a.docx", {"[Content_Types].xml": "<x/>"}),
        "is a Microsoft Office file, not a text: save it as text",
    ),
    (
        "manuscript, RTF",
        "a.rtf",
        {},
        files(a_rtf=r"{\rtf1\ansi Caf\'e9.}"),
        "is an RTF file, not a text: save it as text",
    ),
    (
        "texts inside of objects, unnamed",
        "a.jsonl",
        {},
        files(a_jsonl=lines({"id": 1, "data": {"text": "one", "lang": "en"}})),
        "which has id, data.text, data.lang",
    ),
]


@pytest.mark.parametrize(("field", "corpus", "settings", "write", "expected"), READ, ids=[case[0] for case in READ])
def test_a_corpus_of_a_field_is_its_text(
    field: str, corpus: str, settings: dict[str, object], write: Callable[[], None], expected: str
) -> None:
    write()
    text = text_of(corpus, **settings)
    said("read exactly" if text == expected else "another text", field, corpus, settings)
    assert text == expected


@pytest.mark.parametrize(("field", "corpus", "settings", "write", "words"), REFUSED, ids=[case[0] for case in REFUSED])
def test_a_corpus_that_is_not_read_says_what_helps(
    field: str, corpus: str, settings: dict[str, object], write: Callable[[], None], words: str
) -> None:
    write()
    message = refusal(corpus, **settings)
    said(message, field, corpus, settings)
    assert words in message


def said(answer: str, field: str, corpus: str, settings: dict[str, object]) -> None:
    """Report a row of the table."""
    options = " ".join((f"--data.corpus '{corpus}'", *(f"--data.{name} {value}" for name, value in settings.items())))
    report("fields", ("corpus", "options", "answer"), field, f"`{options}`", answer)
