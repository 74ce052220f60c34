"""Reading prompts: their sources, and how a file is split into prompts."""

import io
import sys
from pathlib import Path

import pytest

from gptlit import TextDataModule
from gptlit.cli.fit.messages import first_line, sample_command
from gptlit.cli.messages import table
from gptlit.cli.predict.prompts import encode_prompt, in_batches, read_prompts
from gptlit.errors import UserError
from gptlit.tokenizer import CharTokenizer


def test_a_line_ends_with_a_newline_only(tmp_path: Path) -> None:
    """Guards against prompts split at a form feed, and JSON split at a line separator inside a string."""
    path = tmp_path / "prompts.txt"
    path.write_text("one\x0ctwo\u2028three\n\nfour\n", encoding="utf-8")
    assert read_prompts(None, str(path)) == ["one\x0ctwo\u2028three", "", "four"]
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"prompt": "a\u2028b"}\n\n{"prompt": "c"}\n\n', encoding="utf-8")
    assert read_prompts(None, str(lines)) == ["a\u2028b", "c"]


def test_line_ends_of_any_system_are_one_newline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a prompt and between prompts, from a file and from stdin alike, as a corpus is read."""
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"one\r\ntwo\rthree\n")

    def stdin() -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes()), "utf-8", newline="\n"))

    for prompt in (f"FILE:{path}", "-"):
        stdin()
        assert read_prompts(prompt, None) == ["one\ntwo\nthree\n"]
    for prompts in (str(path), "-"):
        stdin()
        assert read_prompts(None, prompts) == ["one", "two", "three"]
    path.write_bytes(b'{"prompt": "a\\r\\n"}\r\n{"prompt": "b"}\r')
    stdin()
    assert read_prompts(None, "-") == ["a\r\n", "b"]


def test_an_error_in_jsonl_names_its_line_in_the_file(tmp_path: Path) -> None:
    """Empty lines count."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"text": "b"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="line 3"):
        read_prompts(None, str(path))


def test_stdin_is_utf_8_whatever_the_terminal_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invalid bytes are refused with their position."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\ufeffcafé\r\n".encode()), encoding="latin1"))
    assert read_prompts("-", None) == ["café\n"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    with pytest.raises(UserError, match="prompt -: not UTF-8 at byte 3"):
        read_prompts("-", None)
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match="stdin is closed"):
        read_prompts(None, "-")


def test_batches_hold_64_samples_and_every_rank_gets_one() -> None:
    tokenizer = CharTokenizer("ab")
    prompts = [encode_prompt(index, "a", tokenizer, "error") for index in range(10)]
    assert [len(batch) for batch in in_batches(prompts, num_samples=16)] == [4, 4, 2]
    assert [len(batch) for batch in in_batches(prompts, num_samples=100)] == [1] * 10
    assert [len(batch) for batch in in_batches(prompts, num_samples=1, world_size=3)] == [4, 4, 2]
    assert [prompt for batch in in_batches(prompts, 3) for prompt in batch] == prompts


def test_an_empty_prompt_is_a_newline_or_the_first_token() -> None:
    assert encode_prompt(0, None, CharTokenizer("\nab"), "error").ids == [0]
    assert encode_prompt(0, "", CharTokenizer("a\nb"), "error").ids == CharTokenizer("a\nb").encode("\n")
    assert encode_prompt(0, None, CharTokenizer("ab"), "error").ids == [0]


def test_the_printed_command_can_be_pasted_into_a_shell() -> None:
    """Guards against an unquoted path or prompt."""
    run = Path("my run")
    assert sample_command(run, "It's:") == "gptlit predict --ckpt_path 'my run' --prompt 'It'\"'\"'s:'"
    assert sample_command(run, None) == "gptlit predict --ckpt_path 'my run'"


@pytest.mark.parametrize(
    ("start", "documents", "prompt"),
    [
        ("First Citizen:\nBefore we", None, "First Citizen:"),
        (f"{'a' * 32}\nb", None, "a" * 32),
        (f"{'a' * 33}\nb", None, None),
        ("\nabc", None, None),
        ("- abc\ndef", None, None),  # read as a flag
        ("FILE:abc\ndef", None, None),  # read as the name of a file
        ("a\tb\ncd", None, None),
        ("emma\nolivia", "lines", None),
    ],
)
def test_the_suggested_prompt_is_the_first_line_of_the_text(
    tmp_path: Path, start: str, documents: str | None, prompt: str | None
) -> None:
    """Guards against a prompt that this text does not know."""
    text = tmp_path / "text.txt"
    text.write_text(start + "\nmore of it" * 20)
    data = TextDataModule(corpus=str(text), block_size=8, batch_size=2, documents=documents)
    data.setup()
    assert first_line(data) == prompt


def test_names_in_the_closing_table_are_not_read_as_markup(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against the loss of square brackets in the name of a folder."""
    table("done", [("run folder", "a[lr=0.1]"), ("sample", "b[/c]")])
    err = capsys.readouterr().err
    assert "a[lr=0.1]" in err
    assert "b[/c]" in err


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl", "prompts.ndjson", "-"])
@pytest.mark.parametrize("content", ["", "\n", "\n\n\n"])
def test_a_file_without_a_prompt_is_refused(name: str, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """JSONL of blank lines gave no text and exit code 0."""
    Path("prompts.txt" if name == "-" else name).write_text(content, encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.StringIO(content))
    with pytest.raises(UserError, match="give one prompt per line") as caught:
        read_prompts(None, name)
    assert caught.value.setting == "prompts"


def test_spaces_are_a_prompt_in_a_text_file_and_blank_in_jsonl(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("prompts.txt", "prompts.jsonl"):
        Path(name).write_text("  \n", encoding="utf-8")
    assert read_prompts(None, "prompts.txt") == ["  "]
    with pytest.raises(UserError, match="every line is blank"):
        read_prompts(None, "prompts.jsonl")
    monkeypatch.setattr(sys, "stdin", io.StringIO("  \n"))
    assert read_prompts(None, "-") == ["  "]
