"""`gptlit predict` on one device: the same text as through the Trainer, without Lightning."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command import REPOSITORY, gptlit, write_config

from gptlit.cli.predict.command import single_device

TRAINER = {"accelerator": "cpu", "devices": 1, "strategy": "auto", "num_nodes": 1, "precision": "32-true"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predict")
    config = write_config(folder, trainer__max_steps=6)
    assert gptlit("fit", "--config", config, "--run_dir", folder / "run").code == 0
    return folder / "run"


def test_one_device_needs_no_lightning(run: Path) -> None:
    """Importing it takes several times as long as everything else that predict does."""
    probe = (
        "import sys; from gptlit.cli import run; code = run('predict', sys.argv[1:]); "
        "sys.exit(code or ('lightning' in sys.modules) * 9)"
    )
    command = [sys.executable, "-c", probe, "--ckpt_path", str(run), "--max_new_tokens", "3"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_trainer_gives_the_same_text(run: Path, tmp_path: Path) -> None:
    """Text, JSONL and stop texts; `64-true` goes through the Trainer."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("MARENNA:\nthe\n\n", encoding="utf-8")
    common = ("predict", "--ckpt_path", run, "--prompts", prompts, "--max_new_tokens", 30, "--num_samples", 2)
    for output in ("text.txt", "text.jsonl"):
        files = [tmp_path / f"{way}-{output}" for way in ("direct", "trainer")]
        assert gptlit(*common, "--output", files[0], "--stop", "e").code == 0
        assert gptlit(*common, "--output", files[1], "--stop", "e", "--trainer.precision", "64-true").code == 0
        texts = [file.read_text(encoding="utf-8") for file in files]
        assert "MARENNA:" in texts[0]
        if output == "text.txt":
            assert texts[0] == texts[1]
        else:  # log-probabilities are rounded differently
            assert [line.partition('"log_prob')[0] for line in texts[0].splitlines()] == [
                line.partition('"log_prob')[0] for line in texts[1].splitlines()
            ]


@pytest.mark.parametrize(
    ("changes", "device"),
    [
        ({}, "cpu"),
        ({"devices": "1"}, "cpu"),
        ({"devices": "auto"}, "cpu"),
        ({"devices": 2}, None),
        ({"strategy": "ddp"}, None),
        ({"num_nodes": 2}, None),
        ({"precision": "bf16-true"}, None),
        ({"accelerator": "tpu"}, None),
        ({"accelerator": "abacus"}, None),
    ],
)
def test_settings_beyond_one_device_go_to_the_trainer(changes: dict[str, Any], device: str | None) -> None:
    """A setting that the direct way does not know must not be ignored."""
    found = single_device({**TRAINER, **changes})
    assert found == (None if device is None else torch.device(device))


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "SLURM_NTASKS"])
def test_several_processes_go_to_the_trainer(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would otherwise write all texts."""
    monkeypatch.setenv(variable, "2")
    assert single_device(TRAINER) is None
