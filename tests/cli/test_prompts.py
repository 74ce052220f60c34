"""Prompts before they are encoded: where they are read from, and where one ends and the next begins."""

import io
import sys
from pathlib import Path

import pytest

from gptlit.cli.fit.messages import sample_command
from gptlit.cli.messages import table
from gptlit.cli.predict.prompts import read_prompts
from gptlit.errors import UserError
from gptlit.tokenizer import CharTokenizer


def test_lines_end_with_a_newline_and_with_nothing_else(tmp_path: Path) -> None:
    """Guards against a prompt that is cut at a form feed, or JSON that is cut at a line separator inside a text."""
    path = tmp_path / "prompts.txt"
    path.write_text("one\x0ctwo\u2028three\n\nfour\n", encoding="utf-8")
    assert read_prompts(None, str(path)) == ["one\x0ctwo\u2028three", "", "four"]
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"prompt": "a\u2028b"}\n\n{"prompt": "c"}\n\n', encoding="utf-8")
    assert read_prompts(None, str(lines)) == ["a\u2028b", "c"]


def test_a_mistake_in_json_is_told_by_its_line_in_the_file(tmp_path: Path) -> None:
    """Empty lines count."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"text": "b"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="line 3"):
        read_prompts(None, str(path))


def test_stdin_is_utf_8_whatever_the_terminal_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is not is refused by the place of the byte."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\ufeffcafé\r\n".encode()), encoding="latin1"))
    assert read_prompts("-", None) == ["café\n"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    with pytest.raises(UserError, match="--prompt -: not UTF-8 at byte 3"):
        read_prompts("-", None)
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match="stdin is closed"):
        read_prompts(None, "-")


def test_what_comes_next_can_be_typed_as_it_stands() -> None:
    """Guards against a path that the shell cuts, and against a prompt that the run's own text does not have."""
    run = Path("my run")
    assert sample_command(run, CharTokenizer.train("ROMEO: o")) == (
        "gptlit predict --ckpt_path 'my run' --prompt \"ROMEO:\""
    )
    assert sample_command(run, CharTokenizer.train("romeo")) == "gptlit predict --ckpt_path 'my run'"


def test_names_in_the_closing_table_stand_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against a folder's name that is taken for markup, and lost."""
    table("done", [("run folder", "a[lr=0.1]"), ("sample", "b[/c]")])
    err = capsys.readouterr().err
    assert "a[lr=0.1]" in err
    assert "b[/c]" in err
