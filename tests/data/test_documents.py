"""Documents: their boundaries, their separators, and which are held out."""

import json
import lzma
import zipfile
from pathlib import Path

import numpy as np
import pytest
from corpora import own_cache, part_of_text, refusal, text_of
from hypothesis import given, settings
from hypothesis import strategies as st

from gptlit import TextDataModule, UserError
from gptlit.data import TextSpec, encode_text
from gptlit.data.corpus import open_corpus
from gptlit.data.corpus.documents import joined, part_of, split_at

NAMES = [f"{first}{last}" for first in ("em", "ol", "av", "isa", "so", "char", "am") for last in ("a", "ia", "lotte")]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and an empty cache."""
    own_cache(tmp_path_factory, monkeypatch)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(corpus: str | list[str], **settings: object) -> str | None:
    """Return the text after which a document begins."""
    return open_corpus(TextSpec(corpus, **settings)).document_start  # type: ignore[arg-type]


# --- where documents end ----------------------------------------------------------------------------------------------


def test_a_file_is_one_document_unless_the_user_says_otherwise(here: Path) -> None:
    (here / "a.txt").write_text("a\n\n\n\nb\n")
    assert text_of("a.txt") == text_of("a.txt", documents="whole") == "a\n\n\n\nb\n"
    assert start("a.txt") is None


def test_lines_are_documents_one_line_end_apart(here: Path) -> None:
    (here / "names.txt").write_text("emma\nolivia\n\n  \nava d\n")
    assert text_of("names.txt", documents="lines") == "emma\nolivia\nava d"
    assert start("names.txt", documents="lines") == "\n"
    assert text_of("names.txt", documents="lines", separator="<|end|>") == "emma<|end|>olivia<|end|>ava d"


def test_blank_lines_separate_documents(here: Path) -> None:
    (here / "poems.txt").write_text("a\nb\n\n\n\nc\n \t\nd\n")
    assert text_of("poems.txt", documents="blank_lines") == "a\nb\n\nc\n\nd"
    assert start("poems.txt", documents="blank_lines") == "\n\n"


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_text_is_cut_at_its_separator(here: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Corpora with `<|endoftext|>` are one file of many documents; the separator may lie across two chunks."""
    monkeypatch.setattr("gptlit.data.corpus.streams.READ_BYTES", size)
    (here / "stories.txt").write_text("One.\n<|endoftext|>\nTwo.\n<|endoftext|>\n<|endoftext|>Three.")
    options = {"separator": "<|endoftext|>"}
    assert text_of("stories.txt", **options) == "One.\n<|endoftext|>\nTwo.\n<|endoftext|>Three."
    assert start("stories.txt", **options) == "<|endoftext|>"
    options["split"] = "documents"
    parts = [part_of_text(part, "stories.txt", val_fraction=0.34, **options) for part in (0, 1)]
    assert sorted("<|endoftext|>".join(parts).split("<|endoftext|>")) == ["\nTwo.\n", "One.\n", "Three."]


def test_a_separator_that_is_not_in_the_text_is_refused(here: Path) -> None:
    """A shell passes `\\n` as two characters."""
    (here / "a.txt").write_text("one\ntwo\n")
    assert refusal("a.txt", separator="\\n") == (
        "separator is '\\\\n', which is not in the text: in a shell a line end is $'\\n'"
    )


def test_rows_that_are_lines_stand_one_line_end_apart_others_a_blank_line(here: Path) -> None:
    """A table of names must not become a text of names and empty lines."""
    (here / "names.csv").write_text("text\nemma\nolivia\n")
    assert text_of("names.csv") == "emma\nolivia"
    assert start("names.csv") == "\n"
    (here / "poems.jsonl").write_text('{"text": "a\\nb"}\n{"text": "c"}\n')
    assert text_of("poems.jsonl") == "a\nb\n\nc"
    assert start("poems.jsonl") == "\n\n"
    assert text_of("names.csv", separator="\n\n") == "emma\n\nolivia"
    assert text_of("poems.jsonl", documents="lines") == "a\nb\nc"
    assert text_of(["names.csv", "poems.jsonl"]) == "emma\n\nolivia\n\na\nb\n\nc"


def test_files_are_documents_where_there_are_several(here: Path) -> None:
    (here / "a.txt").write_text("a\n\nb")
    (here / "b.csv").write_text("text\nemma\nolivia\n")
    assert text_of(["a.txt", "b.csv"]) == "a\n\nb\n\nemma\n\nolivia"
    assert text_of(["a.txt", "b.csv"], documents="files") == "a\n\nb\n\nemma\nolivia"
    assert text_of("*.*", documents="files", separator="|") == "a\n\nb|emma\nolivia"
    assert start("*.*") == "\n\n"
    with zipfile.ZipFile(here / "c.zip", "w") as archive:
        archive.writestr("1.txt", "one")
        archive.writestr("2.txt", "two")
    assert text_of("c.zip", documents="files", separator="|") == "one|two"
    (here / "d.txt.xz").write_bytes(lzma.compress(b"d"))
    assert start("d.txt.xz") is None


@pytest.mark.parametrize(
    ("documents", "expected"),
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
def test_by_default_a_blank_line_stands_between_documents(documents: list[str], expected: str) -> None:
    """Without one the last line of a text runs into the first of the next."""
    assert "".join(joined(([document] for document in documents), None)) == expected
    assert "".join(joined(map(list, documents), None)) == expected, "pieces must not matter"


@settings(deadline=None)
@given(texts=st.lists(st.text("ab<>", max_size=6)), size=st.integers(1, 9))
def test_cutting_at_a_separator_undoes_joining(texts: list[str], size: int) -> None:
    whole = "<|>".join(texts)
    pieces = [whole[start : start + size] for start in range(0, len(whole), size)]
    assert list(split_at(pieces, "<|>")) == [text for text in texts if text]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"documents": "rows"}, "documents is 'rows', but a.txt is not a table"),
        ({"documents": "pages"}, "documents is 'pages': it must be null, whole, lines, blank_lines, rows, files"),
        ({"separator": ""}, "separator is empty"),
        ({"split": "documents"}, "split is 'documents', but a.txt is one document: set documents to lines"),
        ({"split": "random"}, "split is 'random': it must be tail, documents"),
        ({"split": "documents", "documents": "lines", "val_corpus": "a.txt"}, "split is 'documents', but val_corpus"),
        ({"val_fraction": 1.0}, "val_fraction is 1.0: it must be above 0 and below 1"),
        ({"fallback": "other"}, "fallback is 'other': it must be null, sample"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(here: Path, settings: dict[str, object], words: str) -> None:
    (here / "a.txt").write_text("one\ntwo\n")
    assert refusal("a.txt", **settings).startswith(words)


# --- the split --------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(count=st.integers(0, 300), fraction=st.floats(0.01, 0.99), seed=st.integers(0, 2**40))
def test_every_document_is_in_exactly_one_part(count: int, fraction: float, seed: int) -> None:
    """And validation has its fraction of them, but for the last, incomplete group."""
    train, val = (
        ["".join(document) for document in part_of(([str(i)] for i in range(count)), part, fraction, seed)]
        for part in (0, 1)
    )
    assert sorted(map(int, train + val)) == list(range(count))
    assert list(map(int, train)) == sorted(map(int, train))
    assert abs(len(val) - count * fraction) <= 1


def test_another_seed_holds_out_other_documents_and_each_about_equally_often() -> None:
    counts = [0] * 100
    for seed in range(300):
        for document in part_of(([str(i)] for i in range(100)), 1, 0.1, seed):
            counts[int("".join(document))] += 1
    assert sum(counts) == 3000
    assert 10 < min(counts) <= max(counts) < 55  # 30 expected, standard deviation 5


@pytest.mark.parametrize("name", ["names.txt", "names.jsonl"])
def test_the_split_by_documents_is_the_same_in_memory_and_on_disk(
    here: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Documents stay intact; the size of the text decides only where ids are stored."""
    lines = NAMES if name == "names.txt" else [json.dumps({"text": text}) for text in NAMES]
    (here / name).write_text("\n".join(lines) + "\n")
    spec = TextSpec(name, split="documents", documents="lines", val_fraction=0.2, split_seed=5)
    memory = encode_text(spec, None, "char", 300)
    monkeypatch.setattr("gptlit.data.encode.IN_MEMORY_CHARACTERS", {"char": 0, "bpe": 0})
    monkeypatch.setattr("gptlit.data.corpus.load.PIECE", 7)
    disk = encode_text(spec, None, "char", 300)
    again = encode_text(spec, None, "char", 300)
    decoded = [
        [text.tokenizer.decode(ids[np.arange(len(ids))].tolist()) for ids in (text.train, text.val)]
        for text in (memory, disk, again)
    ]
    assert decoded[0] == decoded[1] == decoded[2]
    assert memory.sha256 == disk.sha256
    assert sorted("\n".join(decoded[0]).split("\n")) == sorted(NAMES)
    assert len(decoded[0][1].split("\n")) == pytest.approx(0.2 * len(NAMES), abs=1)


def test_the_split_seed_alone_chooses_the_documents(here: Path) -> None:
    """Guards against losses over seeds that are those of other documents, and teachers that have seen them."""
    (here / "names.txt").write_text("\n".join(NAMES))
    held_out = []
    for seeds in ({"seed": 1}, {"seed": 2}, {"seed": 2, "split_seed": 1}, {"seed": 2, "split_seed": 1337}):
        data = TextDataModule("names.txt", documents="lines", split="documents", block_size=4, **seeds)
        data.setup()
        held_out.append(data.tokenizer.decode(data.val_tokens.tolist()))
    assert held_out[0] == held_out[1] == held_out[3] != held_out[2]


def test_too_few_documents_for_two_parts_are_refused(here: Path) -> None:
    (here / "two.txt").write_text("one\ntwo\n")
    with pytest.raises(UserError, match="too few documents for two parts"):
        encode_text(TextSpec("two.txt", documents="lines", split="documents", val_fraction=0.01), None, "char", 300)


def test_characters_that_occur_only_in_the_validation_part_are_reported(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of documents alone can change the loss: the end of an alphabetical list is a different text."""
    (here / "a.txt").write_text("a" * 90 + "bcéé日" * 2)
    for limit in (2**20, 0):
        monkeypatch.setattr("gptlit.data.encode.IN_MEMORY_CHARACTERS", {"char": limit, "bpe": limit})
        (notice,) = encode_text(TextSpec("a.txt"), None, "char", 300).notices
        assert notice.startswith("the validation part holds 4 characters that the training part lacks ('b', 'c', ")
    (here / "b.txt").write_text("ab" * 50)
    assert encode_text(TextSpec("b.txt"), None, "char", 300).notices == ()


def test_a_bpe_with_more_tokens_than_characters_is_reported(here: Path) -> None:
    """As for a text in a script that the vocabulary does not cover."""
    (here / "a.txt").write_text("".join(map(chr, range(0x4E00, 0x5200))))
    notices = encode_text(TextSpec("a.txt"), None, "bpe", 300).notices
    assert any(notice.startswith(("BPE makes 2.", "BPE makes 3.")) for notice in notices)
    (here / "b.txt").write_text("the theatre there then " * 50)
    assert encode_text(TextSpec("b.txt"), None, "bpe", 260).notices == ()


def test_a_vocabulary_that_the_text_cannot_fill_is_reported(here: Path) -> None:
    (here / "a.txt").write_text("the theatre there then " * 50)
    found = encode_text(TextSpec("a.txt"), None, "bpe", 9000)
    size = found.tokenizer.vocab_size
    assert size < 300
    line = f"data.vocab_size is 9,000, but the training part is too short for more than {size} tokens"
    assert found.notices == (line,)
    assert encode_text(TextSpec("a.txt"), found.tokenizer, "bpe", 9000).notices == ()  # of a model
