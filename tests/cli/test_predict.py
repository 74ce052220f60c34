"""`gptlit predict` on one device: the same text as through the Trainer, without Lightning."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command import REPOSITORY, gptlit, write_config

from gptlit.cli.predict import command as predict_command
from gptlit.cli.predict.command import single_device
from gptlit.device.cpu import cpu_multiplies_bfloat16
from gptlit.generation.engine import small_weights

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


@pytest.mark.parametrize("verb", ["predict", "play"])
def test_an_empty_name_of_a_checkpoint_is_a_missing_one(verb: str) -> None:
    """It is no folder, and not the one here."""
    answer = gptlit(verb, "--ckpt_path", "")
    assert (answer.code, answer.out, answer.err.count("\n")) == (2, "", 1)
    assert answer.err.startswith(f"gptlit: gptlit {verb} needs --ckpt_path: a run folder or a checkpoint file")


@pytest.mark.parametrize(
    ("yaml", "flags", "texts"),
    [
        ("stop: END", (), ["END"]),
        ("stop: [END, FIN]", (), ["END", "FIN"]),
        ("stop: null", ("--stop", "a"), ["a"]),
        ("stop: END", ("--stop", "#x", "--stop=[a, b]"), ["END", "#x", "[a, b]"]),
        ("stop: [END, FIN]", ("--stop", "1", "--stop", "null"), ["END", "FIN", "1", "null"]),
    ],
)
def test_stop_texts_of_a_file_and_of_flags_add_up(
    tmp_path: Path, yaml: str, flags: tuple[str, ...], texts: list[str]
) -> None:
    """A text of a file is one text, not its characters; those of flags are taken as typed."""
    config = tmp_path / "stop.yaml"
    config.write_text(yaml, encoding="utf-8")
    options = predict_command.parse_predict(["--ckpt_path", "run", "--config", str(config), *flags])
    assert list(predict_command.generation_config(options).stop) == texts


@pytest.mark.parametrize("yaml", ["stop: 1", "stop: [END, 1]", "stop: {a: b}", "stop: ''", "stop: [END, '']"])
def test_a_stop_text_of_a_file_that_is_none_is_refused(tmp_path: Path, yaml: str) -> None:
    config = tmp_path / "stop.yaml"
    config.write_text(yaml, encoding="utf-8")
    answer = gptlit("predict", "--ckpt_path", "run", "--config", config, "--stop", "a")
    assert (answer.code, answer.out, answer.err.count("\n")) == (2, "", 1)
    assert answer.err.startswith("gptlit: --stop is ")


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["gpu", "cuda", "mps"])
@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_a_gpu_that_is_not_there_is_refused_in_one_line(run: Path, tmp_path: Path, verb: str, name: str) -> None:
    """By the flag, with what to give instead."""
    start = ["--config", "base", "--run_dir", tmp_path / "new"] if verb == "fit" else ["--ckpt_path", run]
    answer = gptlit(verb, *start, "--trainer.accelerator", name)
    line = f"gptlit: --trainer.accelerator is {name}, but torch finds none here: use cpu or auto\n"
    assert (answer.code, answer.err, answer.out) == (2, line, "")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("prompt", "unknown", "line"),
    [
        ("", "error", "prompt 1: it is empty, so that it begins with a newline\n"),
        ("\u00e9\u20ac~", "skip", "prompt 1: every character of it is skipped, so that it begins with a newline\n"),
        ("To\u20ac", "skip", ""),
    ],
)
def test_a_prompt_without_a_known_character_is_announced(run: Path, prompt: str, unknown: str, line: str) -> None:
    flags = ("--prompt", prompt, "--unknown", unknown, "--max_new_tokens", 3)
    answer = gptlit("predict", "--ckpt_path", run, "--trainer.accelerator", "cpu", *flags)
    assert (answer.code, answer.err) == (0, line)


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


# ---------------------------------------------------------------- weights in bfloat16 and int8


@pytest.mark.skipif(not cpu_multiplies_bfloat16(), reason="no instructions for bfloat16")
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_the_type_of_the_weights_is_obeyed_with_and_without_the_trainer(
    run: Path, tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`bf16-mixed` goes through the Trainer, and keeps float32 weights."""
    monkeypatch.setattr(small_weights, "SMALL_FROM_WEIGHT", 1)
    found = {}
    for name, options in {
        "model": (),
        "direct": ("--weights_dtype", dtype),
        "trainer": ("--weights_dtype", dtype, "--trainer.precision", "bf16-mixed"),
    }.items():
        file = tmp_path / f"{name}.jsonl"
        answer = gptlit("predict", "--ckpt_path", run, "--temperature", 0, "--output", file, *options)
        assert answer.code == 0, answer.err
        found[name] = json.loads(file.read_text(encoding="utf-8"))
    assert found["model"]["weights_dtype"] is None
    assert found["direct"]["weights_dtype"] == dtype
    assert found["direct"] == found["trainer"]
    first = [found[name]["log_probabilities"][0] for name in ("model", "direct")]
    assert first[0] != first[1]
    assert first[0] == pytest.approx(first[1], abs=0.02)


@pytest.mark.parametrize("options", [(), ("--trainer.precision", "bf16-mixed"), ("--trainer.precision", "64-true")])
def test_a_type_of_the_weights_that_does_not_serve_is_refused_in_one_line(
    run: Path, tmp_path: Path, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model too small, and one in another precision."""
    monkeypatch.setattr(small_weights, "cpu_multiplies_bfloat16", lambda: True)
    reason = "no matrix of this model's blocks has 131,072 numbers"
    if "64-true" in options:
        monkeypatch.setattr(small_weights, "SMALL_FROM_WEIGHT", 1)
        reason = "the model's weights are float64"
    output = tmp_path / "text.txt"
    common = ("predict", "--ckpt_path", run, "--prompt", "A", "--weights_dtype", "int8", *options)
    for command in (common, (*common, "--output", output)):
        answer = gptlit(*command)
        assert (answer.code, answer.out) == (2, "")
        assert answer.err.replace("\n", " ").startswith("gptlit: --weights_dtype is int8, but ")
        assert reason in answer.err.replace("\n", " ")
    assert not output.exists()


@pytest.mark.parametrize(("dtype", "said"), [("bfloat16", True), ("int8", False)])
def test_bfloat16_on_an_intel_cpu_says_that_it_may_not_pay(
    run: Path, dtype: str, said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict_command, "is_amd", lambda: False)
    answer = gptlit("predict", "--ckpt_path", run, "--prompt", "A", "--weights_dtype", dtype)
    assert ("was not faster than float32 on the Intel CPU" in answer.err.replace("\n", " ")) is said


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "SLURM_NTASKS"])
def test_several_processes_go_to_the_trainer(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would otherwise write all texts."""
    monkeypatch.setenv(variable, "2")
    assert single_device(TRAINER) is None
