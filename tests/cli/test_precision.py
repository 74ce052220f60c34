"""`--trainer.precision auto`: what it means on which device, and that the run keeps it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from command import gptlit, load, start, write_config

from gptlit.cli.fit import precision
from gptlit.cli.fit.precision import PRECISION, device_type, fastest_precision, slow_precision
from gptlit.cli.parser import members

CPU = {"accelerator": "cpu", "precision": "bf16-mixed"}
SLOW = "trainer.precision bf16-mixed is several times slower on this CPU, which has no instructions for bfloat16: "
SLOW += "--trainer.precision 32-true"


@pytest.fixture
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Sets whether this CPU multiplies bfloat16."""

    def set_it(fast: bool) -> None:
        monkeypatch.setattr(precision, "cpu_multiplies_bfloat16", lambda: fast)
        monkeypatch.setattr(precision, "cpu_kernels", lambda: "AVX512")

    return set_it


def stored(run: Path) -> Any:
    """The precision in config.yaml, which equals that in the checkpoint."""
    text = (run / "config.yaml").read_text(encoding="utf-8")
    assert load(run / "last.ckpt")["gptlit"]["config"] == text
    return yaml.safe_load(text)["trainer"]["precision"]


@pytest.mark.parametrize(("fast", "meant"), [(True, "bf16-mixed"), (False, "32-true")])
def test_a_run_keeps_what_auto_meant_at_its_start(
    tmp_path: Path, bfloat16: Callable[[bool], None], fast: bool, meant: str
) -> None:
    config, run = write_config(tmp_path, trainer__max_steps=2, trainer__precision="auto"), tmp_path / "run"
    bfloat16(fast)
    answer = gptlit("fit", "--config", config, "--run_dir", run)
    assert answer.code == 0, answer.err
    assert f"precision   {meant} (auto)\n" in answer.err
    assert stored(run) == meant
    bfloat16(not fast)  # another machine
    answer = gptlit("fit", "--ckpt_path", run, "--trainer.max_steps", 4)
    assert answer.code == 0, answer.err
    assert "changed: trainer.precision" not in answer.err
    assert "(auto)" not in answer.err
    assert stored(run) == meant
    answer = gptlit("fit", "--ckpt_path", run, "--trainer.max_steps", 6, "--trainer.precision", "auto")
    other = fastest_precision(CPU)
    assert f"changed: trainer.precision {meant} -> {other}" in answer.err
    assert stored(run) == other


def test_auto_leaves_the_precision_to_a_plugin(tmp_path: Path, bfloat16: Callable[[bool], None]) -> None:
    config, run = write_config(tmp_path, trainer__max_steps=1, trainer__precision="auto"), tmp_path / "run"
    bfloat16(True)
    plugin = "lightning.pytorch.plugins.precision.DoublePrecision"
    answer = gptlit("fit", "--config", config, "--run_dir", run, "--trainer.plugins", plugin)
    assert answer.code == 0, answer.err
    assert "(auto)" not in answer.err
    assert stored(run) is None
    assert {x.dtype for x in load(run / "last.ckpt")["state_dict"].values()} == {torch.float64}


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_an_evaluation_takes_auto(tmp_path: Path, bfloat16: Callable[[bool], None], verb: str) -> None:
    """The loss is that of the precision that it means."""
    config, run = write_config(tmp_path, trainer__max_steps=2), tmp_path / "run"
    assert gptlit("fit", "--config", config, "--run_dir", run).code == 0

    def evaluate(name: str) -> str:
        answer = gptlit(verb, "--ckpt_path", run, "--trainer.accelerator", "cpu", "--trainer.precision", name)
        assert answer.code == 0, answer.err
        return answer.out

    for fast, meant in ((True, "bf16-mixed"), (False, "32-true")):
        bfloat16(fast)
        assert evaluate("auto") == evaluate(meant)


def test_a_precision_that_is_slow_here_is_obeyed_and_announced(
    tmp_path: Path, bfloat16: Callable[[bool], None]
) -> None:
    config, run = write_config(tmp_path, trainer__max_steps=2, trainer__precision="bf16-mixed"), tmp_path / "run"
    bfloat16(False)
    answer = gptlit("fit", "--config", config, "--run_dir", run)
    assert answer.code == 0, answer.err
    assert answer.err.count(SLOW) == 1
    assert stored(run) == "bf16-mixed"
    assert SLOW in gptlit("validate", "--ckpt_path", run, "--trainer.accelerator", "cpu").err
    bfloat16(True)
    assert SLOW not in gptlit("validate", "--ckpt_path", run, "--trainer.accelerator", "cpu").err


@pytest.mark.parametrize("name", ["32-true", "64-true", None, 32])
def test_other_precisions_are_not_announced(bfloat16: Callable[[bool], None], name: Any) -> None:
    bfloat16(False)
    assert slow_precision({"accelerator": "cpu", "precision": name}) is None


@pytest.mark.parametrize("kernels", ["AVX2", "DEFAULT"])
def test_auto_is_float32_where_kernels_without_bfloat16_are_chosen(
    monkeypatch: pytest.MonkeyPatch, bfloat16: Callable[[bool], None], kernels: str
) -> None:
    """The environment, ATEN_CPU_CAPABILITY, is read once per process."""
    bfloat16(True)
    assert fastest_precision(CPU) == "bf16-mixed"
    monkeypatch.setattr(precision, "cpu_kernels", lambda: kernels)
    assert fastest_precision(CPU) == "32-true"


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="needs x86")
def test_the_environment_chooses_kernels_without_bfloat16(tmp_path: Path) -> None:
    config, run = write_config(tmp_path, trainer__max_steps=1, trainer__precision="auto"), tmp_path / "run"
    process = start("fit", "--config", config, "--run_dir", run, env={"ATEN_CPU_CAPABILITY": "avx2"})
    assert "precision   32-true (auto)\n" in process.communicate()[1]
    assert stored(run) == "32-true"


def test_a_gpu_decides_for_itself(monkeypatch: pytest.MonkeyPatch, bfloat16: Callable[[bool], None]) -> None:
    bfloat16(False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for fast, meant in ((True, "bf16-mixed"), (False, "32-true")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, fast=fast: fast)
        assert [fastest_precision({"accelerator": name}) for name in ("auto", "gpu", "cuda", "cpu")] == [
            *[meant] * 3,
            "32-true",
        ]


def test_the_device_is_that_of_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert [device_type(name) for name in ("auto", "cpu", "tpu", "gpu")] == ["cpu", "cpu", "other", "other"]
    assert device_type({"class_path": "lightning.pytorch.accelerators.CPUAccelerator"}) == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert device_type("auto") == "other"


def test_all_precisions_of_lightning_are_taken() -> None:
    """From the signature of the installed Lightning."""
    names = [name for part in members(PRECISION) for name in get_args(part)]
    assert {"auto", "32-true", "bf16-mixed", "64-true", "16-true"} <= set(names)
