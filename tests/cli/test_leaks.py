"""Runs that have seen the validation part of the run that learns from them, and losses that are too low for it."""

from pathlib import Path

import pytest
import torch
from command import digest, gptlit, load, write_config

DOCUMENTS = {"data__documents": "blank_lines", "data__split": "documents"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With `run`, trained on 9 tenths of 6,000 characters."""
    folder = tmp_path_factory.mktemp("leaks")
    assert gptlit("fit", "--config", write_config(folder, trainer__max_steps=2), "--run_dir", folder / "run").code == 0
    return folder


def notes(err: str) -> list[str]:
    """The lines about other runs."""
    return [line for line in err.splitlines() if "was trained on" in line]


@pytest.mark.parametrize("setting", ["model.teachers", "model.init_from"])
def test_a_run_that_has_seen_the_validation_part_is_announced(folder: Path, tmp_path: Path, setting: str) -> None:
    """Guards against a loss that looks good because the text was known."""
    flags = ("--config", folder / "small.yaml", f"--{setting}", folder / "run", "--run_dir")
    answer = gptlit("fit", *flags, tmp_path / "same")
    assert (answer.code, notes(answer.err)) == (0, [])
    answer = gptlit("fit", *flags, tmp_path / "less_validation", "--data.val_fraction", 0.05)
    assert (answer.code, notes(answer.err)) == (0, [])
    answer = gptlit("fit", *flags, tmp_path / "more_validation", "--data.val_fraction", 0.3)
    assert answer.code == 0
    assert notes(answer.err) == [
        f"--{setting} {folder / 'run' / 'best.ckpt'} was trained on the first 1,200 characters of this validation "
        "part: val/loss is too low; set --data.val_fraction 0.1"
    ]


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_evaluation_on_the_training_part_is_announced(folder: Path, verb: str) -> None:
    assert notes(gptlit(verb, "--ckpt_path", folder / "run").err) == []
    answer = gptlit(verb, "--ckpt_path", folder / "run", "--data.val_fraction", 0.2)
    assert answer.code == 0
    assert [line.partition(" was ")[0] for line in notes(answer.err)] == [str(folder / "run" / "best.ckpt")]


def test_another_version_of_the_text_may_hold_it_and_another_text_does_not(folder: Path, tmp_path: Path) -> None:
    """A version is known by its beginning, whatever its name; another text of the same name is no version."""
    config = write_config(tmp_path, trainer__max_steps=2)
    text = (tmp_path / "text.txt").read_text(encoding="utf-8")
    (tmp_path / "other.txt").write_text(text[:-10], encoding="utf-8")
    flags = ("--config", config, "--model.teachers", folder / "run", "--run_dir")
    (line,) = notes(gptlit("fit", *flags, tmp_path / "version", "--data.corpus", tmp_path / "other.txt").err)
    assert "was trained on another version or split of this text (text): if it holds parts of" in line
    lines = text.split("\n")
    (tmp_path / "text.txt").write_text("\n".join([*lines[50:], *lines[:50]]), encoding="utf-8")
    answer = gptlit("fit", *flags, tmp_path / "other")
    assert answer.code == 0, answer.err
    assert notes(answer.err) == []


def test_a_student_with_another_seed_holds_out_the_documents_of_its_teacher(tmp_path: Path) -> None:
    config = write_config(tmp_path, trainer__max_steps=2, **DOCUMENTS)
    assert gptlit("fit", "--config", config, "--run_dir", tmp_path / "teacher").code == 0
    flags = ("--config", config, "--model.teachers", tmp_path / "teacher", "--seed_everything", 8, "--run_dir")
    answer = gptlit("fit", *flags, tmp_path / "student")
    assert (answer.code, notes(answer.err)) == (0, [])
    answer = gptlit("fit", *flags, tmp_path / "other", "--data.split_seed", 8)
    assert (answer.code, len(notes(answer.err))) == (0, 1)


def test_a_run_of_a_version_without_split_seed_keeps_its_documents(tmp_path: Path) -> None:
    """There the seed of the run, 7 here, chose them; with others, the run would be refused as one on another text."""
    config = write_config(tmp_path, trainer__max_steps=4, data__split_seed=7, **DOCUMENTS)
    whole, run = tmp_path / "whole", tmp_path / "run"
    constant = ("--config", config, "--model.schedule.shape", "constant", "--run_dir")
    assert gptlit("fit", *constant, whole).code == 0
    assert gptlit("fit", *constant, run, "--trainer.max_steps", 2).code == 0
    checkpoint = load(run / "last.ckpt")
    settings = checkpoint["gptlit"]["config"]
    checkpoint["gptlit"]["config"] = settings.replace("  split_seed: 7\n", "")
    assert checkpoint["gptlit"]["config"] != settings
    torch.save(checkpoint, run / "last.ckpt")
    config = run / "config.yaml"
    config.write_text(config.read_text(encoding="utf-8").replace("  split_seed: 7\n", ""), encoding="utf-8")
    again = tmp_path / "again"
    assert gptlit("fit", "--config", config, "--run_dir", again).code == 0
    corpora = [load(folder / "last.ckpt")["gptlit"]["corpus"]["sha256"] for folder in (whole, again)]
    assert corpora[0] == corpora[1]
    answer = gptlit("fit", "--ckpt_path", run, "--trainer.max_steps", 4)
    assert answer.code == 0, answer.err
    assert digest(run / "last.ckpt") == digest(whole / "last.ckpt")
