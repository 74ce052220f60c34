"""JSON and CSV as they are found: one column, always as text, and an error that names the row."""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet
import pytest
from corpora import own_cache, refusal, text_of
from hypothesis import given, settings
from hypothesis import strategies as st

from gptlit.data.corpus import TextSpec
from gptlit.data.corpus.csv_tables import csv_rows
from gptlit.data.corpus.json_tables import json_rows, json_values
from gptlit.data.encode import IN_MEMORY_CHARACTERS, encode_text


@pytest.fixture(autouse=True)
def here(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and an empty cache."""
    own_cache(tmp_path_factory, monkeypatch)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows_of_csv(content: str, delimiter: str = ",") -> list[str]:
    """Return the texts of the column `text`."""
    return list(csv_rows([content.encode()], "text", "a.csv", delimiter))


# --- JSON -------------------------------------------------------------------------------------------------------------


def test_a_number_late_in_the_file_is_named_with_its_line_and_value(here: Path) -> None:
    """Guards against all later rows becoming JSON source, as `datasets` gives them after 10 MiB."""
    with (here / "a.jsonl").open("w") as stream:
        for i in range(1, 130_001):
            text = 1984 if i == 130_000 else f'She said "no", and left.\nHe stayed; it was number {i}.'
            stream.write(json.dumps({"id": i, "text": text}) + "\n")
    assert (here / "a.jsonl").stat().st_size > 10 * 2**20
    message = refusal("a.jsonl")
    assert message.startswith("text_column 'text' holds 1984 in line 130,000 of a.jsonl, which is not text")
    assert "write it in quotes" in message


@pytest.mark.parametrize("value", [1984, 0.5, True, [1, 2], {"a": 1}, [{"role": 1, "content": "x"}]])
def test_a_value_that_is_not_text_is_named_in_every_format(here: Path, value: object) -> None:
    shown = f"holds {json.dumps(value)} in "
    (here / "a.jsonl").write_text(json.dumps({"text": "a"}) + "\n" + json.dumps({"text": value}) + "\n")
    (here / "a.json").write_text(json.dumps([{"text": "a"}, {"text": value}]))
    assert shown + "line 2 of a.jsonl" in refusal("a.jsonl")
    assert shown + "row 2 of a.json" in refusal("a.json")


def test_unused_columns_may_hold_anything(here: Path) -> None:
    """Guards against a read that fails, or changes the texts, because of an unused column."""
    rows = [
        {"n": 1, "text": "one", "type": "a", "message": {"x": 1}},
        {"n": 0.5, "text": "two", "id": 1, "version": 1, "cwd": "/"},
        {"n": "n/a", "text": "three", "messages": [], "source": None},
        {"n": [[]], "text": "four"},
    ]
    (here / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert text_of("a.jsonl") == "one\ntwo\nthree\nfour"
    (here / "b.jsonl").write_text('{"n": %s, "text": "huge"}\n{"n": 1, "n": 2, "text": "twice"}\n' % ("9" * 5000))
    assert text_of("b.jsonl") == "huge\ntwice"


def test_texts_that_look_like_dates_or_numbers_stay_texts(here: Path) -> None:
    texts = ["2020-01-01", "2020-01-01T00:00:00Z", "007", "TRUE", "null", "NaN"]
    (here / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert text_of("a.jsonl") == "\n".join(texts)


def test_halves_of_surrogate_pairs_become_the_replacement_character(here: Path) -> None:
    """Programs that cut texts at a number of UTF-16 units write them; UTF-8 cannot hold them."""
    (here / "a.jsonl").write_text('{"text": "cut \\ud83d here, \\ud83d\\ude00 whole"}\n')
    assert text_of("a.jsonl") == "cut \ufffd here, \U0001f600 whole"


def test_rows_without_text_are_left_out(here: Path) -> None:
    (here / "a.jsonl").write_text('{"text": "a"}\n\n{"text": null}\n{"text": ""}\n{"other": 1}\n{"text": "b"}')
    assert text_of("a.jsonl") == "a\nb"


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ('{"text": "a"}\n{"text": \n', "Expecting value at column 9 of line 2"),
        ('{"text": "a"} {"text": "b"}\n', "more than one value at column 14 of line 1"),
        ('"a"\n7\n', "holds 7 in line 2, not a text or an object with a column 'text'"),
        ("[" * 100_000, "nested too deeply"),
        ('[{"text": "a"}]', "line 1 is an array; give an array, or values over several lines, the ending .json"),
        ('{\n "text": "a"\n}', "column 2 of line 1; give an array, or values over several lines, the ending .json"),
    ],
)
def test_what_is_not_json_lines_is_named_with_its_place(here: Path, content: str, where: str) -> None:
    (here / "a.jsonl").write_text(content)
    message = refusal("a.jsonl")
    assert message.startswith("corpus a.jsonl ")
    assert where in message


values = st.recursive(
    st.none() | st.integers(-(10**20), 10**20) | st.text(max_size=5) | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(elements=st.lists(values, max_size=5), indent=st.sampled_from([None, 1]), size=st.integers(1, 40))
def test_an_array_is_read_as_the_json_module_reads_it(elements: list[object], indent: int | None, size: int) -> None:
    """One element at a time, however the file is cut."""
    content = json.dumps(elements, indent=indent, ensure_ascii=False).encode()
    chunks = [content[i : i + size] for i in range(0, len(content), size)]
    assert [value for _, value in json_values(chunks, "a.json")] == elements


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[{"text": "a"}', "its array does not end"),
        ('[{"text": "a"}] []', "something follows the end of its array"),
        ('[{"text": "a"}, {"text": }]', "in row 2"),
    ],
)
def test_a_broken_array_is_refused(here: Path, content: str, words: str) -> None:
    (here / "a.json").write_text(content)
    assert words in refusal("a.json")


# --- the column -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_an_unknown_column_is_answered_with_those_that_exist(here: Path, name: str) -> None:
    rows = [{"n": 1, "text": "one", "title": "I"}, {"n": 2, "text": "two", "title": "II"}]
    if name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), name)
    elif name == "a.csv":
        (here / name).write_text("n,text,title\n1,one,I\n")
    else:
        (here / name).write_text("\n".join(map(json.dumps, rows)))
    expected = f"text_column 'body' is not a column of {name}, which has n, text, title"
    by_number = "; if that is no header, name a column by its number: 1" if name == "a.csv" else ""
    assert refusal(name, text_column="body") == expected + by_number
    assert text_of(name, text_column="title").startswith("I")


def test_a_column_of_numbers_is_refused_by_its_type(here: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), "a.parquet")
    assert refusal("a.parquet") == "text_column 'text' of a.parquet holds int64, not text: name another column"


def test_bytes_that_are_not_utf8_are_named_with_their_row(here: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": [b"a", b"\xff"]}), "a.parquet")
    assert "'text' of a.parquet is not UTF-8 in row 2" in refusal("a.parquet")


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.binary(), pyarrow.string_view()])
def test_values_of_a_column_are_cleaned_row_by_row(here: Path, kind: pyarrow.DataType) -> None:
    """Line ends of any system, rows without text, and a column that is cut into batches."""
    rows = ["one\r\ntwo", None, "", "three\rfour", "naïve \ufffd", *map(str, range(3000))]
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(rows).cast(kind)}), "a.parquet")
    expected = ["one\ntwo", "three\nfour", "naïve \ufffd", *map(str, range(3000))]
    assert text_of("a.parquet", separator="|") == "|".join(expected)


def test_a_table_without_the_column_ends_after_a_thousand_rows() -> None:
    """Guards against reading a terabyte before a misspelt name is detected."""
    read = 0

    def rows() -> Iterator[bytes]:
        nonlocal read
        for _ in range(5000):
            read += 1
            yield b'{"body": "x"}\n'

    with pytest.raises(ValueError, match=r"'text' is not a column of a\.jsonl, which has body"):
        list(json_rows(rows(), "text", "a.jsonl", per_line=True))
    assert read <= 1001


def test_conversations_become_lines(here: Path) -> None:
    """In the forms of OpenAI and ShareGPT, and as lists of strings; parts that are not text are left out."""
    rows = [
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": [{"type": "text", "text": "Hello"}, {}]}],
        [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": None}],
        ["one", "two"],
    ]
    (here / "a.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    expected = "user: Hi\nassistant: Hello\n\nhuman: Why?\n\none\ntwo"
    assert text_of("a.jsonl", text_column="messages") == expected
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": rows[1]}]), "a.parquet")
    assert text_of("a.parquet", text_column="messages") == "human: Why?"


def test_a_chat_of_telegram_is_a_conversation(here: Path) -> None:
    """Texts of several parts, messages of the service, and photographs without a text."""
    messages = [
        {"id": 1, "type": "message", "from": "Ann", "text": "Hi"},
        {"id": 2, "type": "message", "from": "Bob", "text": ["see ", {"type": "link", "text": "http://x"}, "!"]},
        {"id": 3, "type": "service", "actor": "Bob", "text": ""},
        {"id": 4, "type": "message", "from": "Bob", "photo": "a.jpg", "text": ""},
    ]
    (here / "result.json").write_text(json.dumps({"name": "Ann", "messages": messages}))
    assert text_of("result.json", text_column="messages") == "Ann: Hi\nBob: see http://x!"
    assert text_of("result.json", text_column="messages.text") == "Hi\nsee http://x!"
    assert refusal("result.json").endswith("result.json, which has name, messages")


@pytest.mark.parametrize(
    "messages",
    [
        [{"from": "Ann", "body": "Hi"}],
        [{"text": "Hi"}, {"from": "Ann", "text": "Hello"}],
        [{"role": "user", "text": 7}],
    ],
)
def test_messages_of_another_form_are_refused_and_never_lost(here: Path, messages: list[object]) -> None:
    (here / "a.jsonl").write_text(json.dumps({"messages": messages}))
    message = refusal("a.jsonl", text_column="messages")
    assert message.startswith("text_column 'messages' holds [{")
    assert "which is not text: name one of messages." in message


def test_a_column_can_be_inside_of_others(here: Path) -> None:
    rows = [
        {"id": 1, "data": {"text": "one", "lang": "en"}, "parts": [{"p": "a"}, {"p": None}, {"p": "b"}]},
        {"id": 2, "data": {"text": "two\r\nlines", "lang": "en"}, "parts": []},
        {"id": 3, "data": None, "parts": None},
        {"id": 4, "data": {"text": "", "lang": None}, "parts": [{"p": "c"}]},
    ]
    (here / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "a.parquet")
    with pyarrow.ipc.new_file("a.arrow", pyarrow.Table.from_pylist(rows).schema) as writer:
        writer.write_table(pyarrow.Table.from_pylist(rows))
    for name in ("a.jsonl", "a.parquet", "a.arrow"):
        assert text_of(name, text_column="data.text") == "one\n\ntwo\nlines"
        assert text_of(name, text_column="parts.p") == "a\nb\n\nc"
        assert "is not a column of" in refusal(name, text_column="data.txt")
        assert "which has id, data.text, data.lang, parts" in refusal(name)
    assert refusal("a.jsonl", text_column="data").endswith("not text: name one of data.text, data.lang")
    (here / "c.jsonl").write_text('{"data": [{"n": [{"x": 1}]}]}')
    assert refusal("c.jsonl", text_column="data.n").startswith("text_column 'data.n' holds [{\"x\": 1}] in line 1")
    assert refusal("c.jsonl", text_column="data.n").endswith("name one of data.n.x")
    assert "holds struct<" in refusal("a.parquet", text_column="data")
    assert refusal("a.parquet", text_column="id.x").endswith("which has id, data.text, data.lang, parts")
    deep = '{"a": ' * 500 + "1" + "}" * 500
    (here / "deep.jsonl").write_text(deep)
    assert refusal("deep.jsonl").endswith("which has a.a.a.a")
    (here / "b.jsonl").write_text('{"data.text": "dot", "data": {"text": "inside"}}')
    assert text_of("b.jsonl", text_column="data.text") == "dot"


def test_json_strings_are_texts(here: Path) -> None:
    (here / "a.json").write_text(json.dumps(["one", "", "two"]))
    (here / "a.jsonl").write_text('"one"\n"two"\n')
    assert text_of("a.json") == text_of("a.jsonl") == "one\ntwo"


# --- CSV --------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(texts=st.lists(st.text("ab,\";\n\t'é ", min_size=1).filter(str.strip), min_size=1, max_size=5))
def test_what_the_csv_module_writes_is_read_back(texts: list[str]) -> None:
    import csv
    import io

    for delimiter in ",;\t":
        stream = io.StringIO(newline="")
        csv.writer(stream, delimiter=delimiter).writerows([("n", "text"), *enumerate(texts)])
        assert rows_of_csv(stream.getvalue(), delimiter) == texts


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ("text,n\na,1,\nb,2,\n", ["a", "b"]),
        ("text,n,\na,1,\nb,2,\n", ["a", "b"]),
        ('"","text","n"\n"1","a",3\n"2","b",4\n', ["a", "b"]),
        ('"text","n"\n"1","a",3\n"2","b",4\n', ["a", "b"]),
        ("text\n007\nTRUE\n\n1e5\nNA\nnull\n", ["007", "TRUE", "1e5", "NA", "null"]),
        ("n;text\n1;a, b\n", ["a, b"]),
        ("text,n\n,1\nx,2\n", ["", "x"]),
        ("sep=;\r\nid;text\r\n1;a, b\r\n", ["a, b"]),
        ('"sep=|"\ntext|n\n"a|b"|1\n', ["a|b"]),
        ('id, text\n1, "a, b"\n2, c \n', ["a, b", "c "]),
        ("id,text\n1, a\n", [" a"]),
    ],
    ids=[
        "comma at the end",
        "comma at every end",
        "R",
        "R without a header",
        "digits",
        "semicolons",
        "empty",
        "Excel",
        "Excel, in quotes",
        "blanks after commas",
        "blank in a text",
    ],
)
def test_csv_as_programs_write_it_gives_the_right_column(content: str, texts: list[str]) -> None:
    """Pandas takes the first column of a row that ends in a comma for an index, and digits for numbers."""
    assert rows_of_csv(content) == texts


@pytest.mark.parametrize(
    ("content", "column", "texts"),
    [
        ("1\tcmn\t試試看！\n2\tcmn\t睡覺了。\n", "3", ["試試看！", "睡覺了。"]),
        ("emma\nolivia\n", "1", ["emma", "olivia"]),
        ("1,2\na,b\n", "2", ["b"]),
        ("3,x,one\n4,x,two\n", "3", ["one", "two"]),
        ('a,"b, c"\nd,"e\nf"\n', "2", ["b, c", "e\nf"]),
    ],
    ids=["Tatoeba", "names", "a header of numbers", "a number in the first row", "quotes"],
)
def test_a_file_without_a_header_has_columns_by_number(content: str, column: str, texts: list[str]) -> None:
    assert list(csv_rows([content.encode()], column, "a.tsv", "\t" if "\t" in content else ",")) == texts
    with pytest.raises(ValueError, match="name a column by its number: 1"):
        list(csv_rows([content.encode()], "9", "a.tsv", ","))


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ('id\ttext\n1\t"Hello," she said\n2\t"x"\n', ['"Hello," she said', '"x"']),
        ('id\ttext\n1\t"Hello\n2\t"Bye\n', ['"Hello', '"Bye']),
        ('id\ttext\n1\t"two\nlines"\n2\tBye\n', ["two\nlines", "Bye"]),
        ('id\ttext\n1\t"Hello."\n2\tBye\n', ['"Hello."', "Bye"]),
        ('"id"\t"text"\n1\t"Hello."\n2\t"Bye"\n3\tNA\n', ["Hello.", "Bye", "NA"]),
        ('id\ttext\n1\t"a\tb"\n2\t"Hello."\n3\tBye\n', ["a\tb", "Hello.", "Bye"]),
        ('id\ttext\n1\t"a ""b"""\n2\tBye\n', ['a "b"', "Bye"]),
    ],
)
def test_quotes_of_tsv_are_characters_unless_they_enclose_fields(content: str, texts: list[str]) -> None:
    """Guards against rows lost between two quotes."""
    assert rows_of_csv(content, "\t") == texts


def test_a_long_quoted_field_at_the_end_of_the_first_rows_is_still_quoted() -> None:
    rows = [f"{i}\tx" for i in range(990)] + ['990\t"' + "line\n" * 30 + '"', "991\tlast"]
    assert rows_of_csv("id\ttext\n" + "\n".join(rows) + "\n", "\t")[-2:] == ["line\n" * 30, "last"]


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ("text\rone\rtwo\r", ["one", "two"]),
        ('n,text\r1,"one\ntwo"\r2,three', ["one\ntwo", "three"]),
        ("text\none\rtwo\nthree\n", ["one\ntwo", "three"]),
        ('text\r\none\rtwo\r\n"three\r\nfour\rfive"\r\n', ["one\ntwo", "three\nfour\nfive"]),
        ("text,n\none\rtwo,1\nthree\r,2\n", ["one\ntwo", "three\n"]),
        ("text\rone\ntwo\rthree\r", ["one\ntwo", "three"]),
        ("text\r\r\none\r\r\n\r\r\ntwo\r\r\n", ["one", "two"]),
        ("\r\n\ntext\rone\r\rtwo", ["one", "two"]),
        ('n,"the\rlong\nname",text\r1,2,one\r', ["one"]),
        ("text", []),
    ],
    ids=[
        "old Mac",
        "old Mac, quoted line feed",
        "pandas, carriage return in one column",
        "Windows, carriage return",
        "carriage return between columns",
        "line feed in one column",
        "Windows, twice",
        "blank lines",
        "header of three lines",
        "header only",
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 5, 1000])
def test_the_line_end_of_the_header_ends_the_rows(content: str, texts: list[str], size: int) -> None:
    """However the file is cut; line ends of another kind belong to the field, as its writer meant."""
    chunks = [content[i : i + size].encode() for i in range(0, len(content), size)]
    assert list(csv_rows(chunks, "text", "a.csv", ",")) == texts


@settings(deadline=None)
@given(
    texts=st.lists(st.text('ab,"\n\r', min_size=1).filter(str.strip), min_size=1, max_size=5),
    end=st.sampled_from(["\n", "\r", "\r\n"]),
)
def test_fields_with_carriage_returns_are_read_back(texts: list[str], end: str) -> None:
    """Of any row end; in the texts every line end becomes a line feed."""
    import csv
    import io

    stream = io.StringIO(newline="")
    csv.writer(stream, lineterminator=end, quoting=csv.QUOTE_ALL).writerows([("n", "text"), *enumerate(texts)])
    assert rows_of_csv(stream.getvalue()) == [text.replace("\r\n", "\n").replace("\r", "\n") for text in texts]


def test_names_of_columns_stand_on_one_line(here: Path) -> None:
    (here / "a.csv").write_bytes(b'"the\nlong\rname",b\n1,2\n')
    assert "is not a column of a.csv, which has the long name, b;" in refusal("a.csv")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("text\nhello, world\n", "2 fields in the row that ends in line 2, and 1 in its header"),
        ("id,text\n1,abc\ndef\n2,x\n", "1 fields in the row that ends in line 3, and 2 in its header"),
        ('id,text\n1,"She said \\"no\\""\n', "in line 2: write a quote inside a quoted text twice"),
        ('text,n\n"open,1\nb,2\n', "unexpected end of data"),
        ("a,b\n1,2\n", "'text' is not a column of a.csv, which has a, b"),
        ("text,n,text\na,1,b\n", "a.csv has 2 columns 'text': give the others other names"),
    ],
)
def test_csv_that_would_give_a_wrong_text_is_refused(content: str, words: str) -> None:
    with pytest.raises(ValueError, match=r"a\.csv") as caught:
        rows_of_csv(content)
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.parquet", "a.arrow"])
def test_an_empty_table_is_refused(here: Path, name: str) -> None:
    (here / name).write_text("")
    assert name in refusal(name)


@pytest.mark.parametrize(
    ("content", "columns"),
    [
        ("body;id\nHello, you;1\nx;2\n", "body, id"),
        ("body|id\nHello|1\n", "body, id"),
        ("body\tid\n", "body, id"),
        ("body,id\nHello; you,1\n", "body, id"),
        ("body; all\nHello\n", "body; all"),
    ],
    ids=["semicolon", "bar", "tab", "comma", "one column"],
)
def test_the_columns_of_a_file_without_the_text_column_are_listed_one_by_one(
    here: Path, content: str, columns: str
) -> None:
    (here / "a.csv").write_text(content)
    assert f"which has {columns}; if that" in refusal("a.csv")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": "abc\n', "Unterminated string starting at column 10 of line 2"),
        ("a.json", '[{"text": "x"}, {"text": "abc', "Unterminated string starting at column 10 in row 2"),
        ("a.jsonl", '{"text": "a\tb"}\n', "Invalid control character at column 12 of line 1"),
        ("a.jsonl", '{"text" "x"}\n', "Expecting ':' delimiter at column 9 of line 1"),
    ],
)
def test_what_is_wrong_with_json_is_said_with_its_column(here: Path, name: str, content: str, reason: str) -> None:
    (here / name).write_text(content)
    assert f"{name} is not JSON" in refusal(name)
    assert f": {reason}" in refusal(name)


# --- rows without text ------------------------------------------------------------------------------------------------


ROWS = [{"id": 1, "text": "one"}, {"id": 2}, {"id": 3, "text": None}, {"id": 4, "text": "two"}, {"id": 5, "text": ""}]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as a table of the kind that the name says."""
    names = list({name: None for row in rows for name in row})
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        path.write_text("\n".join([",".join(names), *(f"{row['id']},{row.get('text') or ''}" for row in rows)]))
    else:
        table = pyarrow.table({name: [row.get(name) for row in rows] for name in names})
        (pyarrow.parquet.write_table if path.suffix == ".parquet" else pyarrow.feather.write_feather)(table, path)


def notices_of(corpus: str | list[str], **settings: Any) -> tuple[str, ...]:
    """Return the lines for the user."""
    return encode_text(TextSpec(corpus, val_fraction=0.5, **settings), None, "char", 300).notices


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.feather"])
def test_rows_without_text_are_counted_in_a_notice_whatever_the_format(here: Path, name: str) -> None:
    write_rows(here / name, ROWS)
    assert text_of(name) == "one\ntwo"
    assert notices_of(name)[0] == f"3 of 5 rows of {name} have no text: left out (the first is row 2)"
    write_rows(here / name, ROWS[:2])
    assert notices_of(name)[0] == f"1 of 2 rows of {name} has no text: left out (row 2)"
    write_rows(here / name, ROWS[:1])
    assert not any("rows" in notice for notice in notices_of(name))


def test_rows_without_text_are_counted_over_the_files_of_a_corpus(here: Path) -> None:
    (here / "many").mkdir()
    for number in range(5):
        write_rows(here / "many" / f"{number}.jsonl", ROWS if number == 3 else ROWS[:1])
    notice = "3 of 9 rows of 5 files of many have no text: left out (the first is row 2 of many/3.jsonl)"
    assert notices_of("many")[0] == notice
    with zipfile.ZipFile("many.zip", "w") as archive:
        for path in sorted(Path("many").iterdir()):
            archive.write(path, path.name)
    notice = "3 of 9 rows of many.zip have no text: left out (the first is row 2 of 3.jsonl in many.zip)"
    assert notices_of("many.zip")[0] == notice
    assert notices_of("many.zip", split="documents")[0] == notice


def test_a_long_table_that_is_not_read_again_has_the_same_notice(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(IN_MEMORY_CHARACTERS, "char", 100)
    write_rows(here / "a.jsonl", ROWS + [{"text": f"line {number}"} for number in range(2000)])
    first = notices_of("a.jsonl")
    assert first[0].startswith("3 of 2,005 rows of a.jsonl have no text")
    monkeypatch.setattr("gptlit.data.reading.FactsReader.add", lambda *_: pytest.fail("read again"))
    assert notices_of("a.jsonl") == first


def test_settings_of_tables_and_of_the_hub_are_refused_for_a_text(here: Path) -> None:
    (here / "a.txt").write_text("plain")
    (here / "b.jsonl").write_text('{"body": "row"}\n')
    (here / "mixed").mkdir()
    (here / "mixed" / "a.txt").write_text("plain")
    (here / "mixed" / "b.csv").write_text("title\nfirst\n")
    expected = "text_column is 'body', but a.txt is not a table: leave it out, or set it to text"
    assert refusal("a.txt", text_column="body") == expected
    assert "but a.txt, a.txt is not" in refusal("a.txt", text_column="body", val_corpus="a.txt")
    assert text_of(["a.txt", "b.jsonl"], text_column="body") == "plain\n\nrow"
    assert text_of("mixed", text_column="body") == "plain"  # with a notice that b.csv lacks the column
    for corpus, column in (("a.txt", "text"), ("b.jsonl", "body"), ("sample", "text")):
        message = refusal(corpus, streaming=True, text_column=column)
        assert message.startswith("streaming is true, but ")
        assert message.endswith("is not a data set of the Hugging Face Hub: leave it out, or set it to false")
