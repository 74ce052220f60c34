"""From names in a file to sampled names: documents through training, samples and `gptlit predict`."""

from pathlib import Path

import pytest
from command import gptlit, load, write_config

NAMES = [first + last for first in ("em", "ol", "av", "so", "char", "am", "is") for last in ("a", "ia", "ie", "ette")]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A short run on names, one a line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("\n".join(NAMES) + "\n")
    documents = {"data__documents": "lines", "data__separator": "|", "data__split": "documents", "data__split_seed": 7}
    config = write_config(tmp_path, **documents, trainer__max_steps=2, sample_text__max_new_tokens=10)
    assert gptlit("fit", "--config", config, "--run_dir", "run").code == 0
    return tmp_path / "run"


def test_samples_begin_and_end_with_a_document(run: Path) -> None:
    """A name begins after the separator, and `--one_document` stops before the next one."""
    assert load(run / "last.ckpt")["gptlit"]["corpus"]["document_start"] == "|"
    (sample, *_) = sorted((run / "samples").iterdir())
    assert sample.read_text().startswith("|")
    options = ("predict", "--ckpt_path", "run", "--max_new_tokens", 300, "--temperature", 2)
    whole, one = gptlit(*options), gptlit(*options, "--one_document", "true")
    assert whole.code == one.code == 0
    assert "begins with '|'" in whole.err
    assert "|" in whole.out
    assert one.out.rstrip("\n") == whole.out.split("|")[0].rstrip("\n")


def test_one_document_is_refused_for_a_run_on_a_single_text(run: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join(NAMES * 5))
    config = write_config(tmp_path, trainer__max_steps=1)
    assert gptlit("fit", "--config", config, "--run_dir", "whole").code == 0
    answer = gptlit("predict", "--ckpt_path", "whole", "--one_document", "true")
    assert answer.code == 2
    assert "one_document is true, but the model was trained on one whole text" in answer.err


def test_a_run_resumes_with_its_documents_and_refuses_others(run: Path) -> None:
    """Another split would train on held-out documents."""
    answer = gptlit("fit", "--ckpt_path", "run", "--trainer.max_steps", 3)
    assert answer.code == 0, answer.err
    for flag, value in (("data.split", "tail"), ("data.separator", "\n"), ("data.split_seed", 8)):
        answer = gptlit("fit", "--ckpt_path", "run", "--trainer.max_steps", 4, f"--{flag}", value)
        assert answer.code == 2, flag
        assert "Traceback" not in answer.err
