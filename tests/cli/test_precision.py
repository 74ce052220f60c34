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
from gptlit.device.cpu import cpu_multiplies_bfloat16

CPU = {"accelerator": "cpu", "precision": "bf16-mixed"}
SLOW = "trainer.precision bf16-mixed is several times slower here, where torch uses no CPU instructions for bfloat16: "
SLOW += "use --trainer.precision 32-true"


@pytest.fixture
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Sets whether this CPU multiplies bfloat16."""

    def set_it(fast: bool) -> None:
        monkeypatch.setattr(precision, "cpu_multiplies_bfloat16", lambda: fast)

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
    assert f"precision   {meant}\n" in answer.err
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
    assert "precision   64-true\n" in answer.err
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


def test_predict_takes_auto(tmp_path: Path, bfloat16: Callable[[bool], None]) -> None:
    """It samples as both of its meanings do, in the precision of the weights."""
    config, run = write_config(tmp_path, trainer__max_steps=2), tmp_path / "run"
    assert gptlit("fit", "--config", config, "--run_dir", run).code == 0
    bfloat16(True)
    texts = []
    for name in ("auto", "32-true", "bf16-mixed"):
        file = tmp_path / f"{name}.jsonl"
        flags = ("--trainer.accelerator", "cpu", "--trainer.precision", name, "--output", file)
        answer = gptlit("predict", "--ckpt_path", run, "--prompt", "the", "--max_new_tokens", 8, *flags)
        assert answer.code == 0, answer.err
        texts.append(file.read_text(encoding="utf-8"))
    assert texts == texts[:1] * 3


def test_predict_announces_weights_that_are_slow_here(
    tmp_path: Path, bfloat16: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixed precisions are as fast as float32."""
    config, run = write_config(tmp_path, trainer__max_steps=2), tmp_path / "run"
    assert gptlit("fit", "--config", config, "--run_dir", run).code == 0
    common = ("predict", "--ckpt_path", run, "--max_new_tokens", 2, "--trainer.accelerator", "cpu")
    cases = ((False, "bf16-true", 1), (True, "bf16-true", 0), (False, "bf16-mixed", 0), (True, "16-true", 1))
    monkeypatch.setattr(precision, "cpu_multiplies_float16", lambda: False)
    for fast, name, announced in cases:
        bfloat16(fast)
        answer = gptlit(*common, "--trainer.precision", name)
        assert answer.code == 0, answer.err
        assert answer.err.count("is several times slower here") == announced


def test_a_ladder_with_auto_is_not_trained_again(tmp_path: Path, bfloat16: Callable[[bool], None]) -> None:
    """Its runs hold what auto meant at their start, also on another machine."""
    config = write_config(tmp_path)  # writes the text
    flags = ("--data.corpus", config.parent / "text.txt", "--run_dir", tmp_path / "ladder", "--trainer.max_steps=2")
    flags += ("--trainer.val_check_interval=2", "--pictures.when=never", "--trainer.accelerator=cpu")
    climb = ("ladder", "--rungs", "1", *flags, "--trainer.precision", "auto")
    bfloat16(True)
    first = gptlit(*climb)
    assert first.code == 0, first.err
    assert stored(tmp_path / "ladder" / "1_bigram") == "bf16-mixed"
    bfloat16(False)
    again = gptlit(*climb)
    assert again.code == 0, again.err
    assert again.out == first.out


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


@pytest.mark.parametrize("fast", [False, True])
def test_float16_is_announced_where_the_cpu_cannot_multiply_it(
    bfloat16: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    """With `16-true` a step of `base` took ten times as long, and nothing said so. Instructions for bfloat16 do not
    help it.
    """
    bfloat16(True)
    monkeypatch.setattr(precision, "cpu_multiplies_float16", lambda: fast)
    line = slow_precision({"accelerator": "cpu", "precision": "16-true"})
    wanted = SLOW.replace("bf16-mixed", "16-true").replace("bfloat16", "float16")
    assert line == (None if fast else wanted)


@pytest.mark.parametrize("name", ["32-true", "64-true", None, 32])
def test_other_precisions_are_not_announced(bfloat16: Callable[[bool], None], name: Any) -> None:
    bfloat16(False)
    assert slow_precision({"accelerator": "cpu", "precision": name}) is None


@pytest.mark.skipif(not cpu_multiplies_bfloat16(), reason="needs a CPU with bfloat16")
@pytest.mark.parametrize(
    ("variable", "value", "meant"),
    [
        ("ONEDNN_MAX_CPU_ISA", "AVX2", "32-true"),
        ("DNNL_MAX_CPU_ISA", "avx512_core", "32-true"),
        ("ATEN_CPU_CAPABILITY", "avx2", "bf16-mixed"),
    ],
)
def test_the_environment_can_keep_torch_from_instructions(
    tmp_path: Path, variable: str, value: str, meant: str
) -> None:
    """Only the limit of oneDNN counts, which multiplies. Each library reads the environment once per process."""
    config, run = write_config(tmp_path, trainer__max_steps=1, trainer__precision="auto"), tmp_path / "run"
    process = start("fit", "--config", config, "--run_dir", run, env={variable: value})
    err = process.communicate()[1]
    assert f"precision   {meant} (auto)\n" in err
    assert stored(run) == meant
    process = start("validate", "--ckpt_path", run, "--trainer.precision", "bf16-mixed", env={variable: value})
    assert (SLOW in process.communicate()[1]) == (meant == "32-true")


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
