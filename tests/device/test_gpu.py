"""Tests that need a GPU: training does not synchronise with it, and its checkpoints work on other devices."""

from pathlib import Path

import pytest
import torch
from command import At, extra_callbacks, gptlit, load, write_config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
ON_GPU = {"trainer__accelerator": "gpu", "trainer__precision": "bf16-mixed"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in bfloat16, compiled, with dropout and Muon."""
    folder = tmp_path_factory.mktemp("gpu")
    config = write_config(folder, **ON_GPU, trainer__max_steps=40, model__compile=True)
    answer = gptlit("fit", "--config", config, "--run_dir", folder / "run")
    assert answer.code == 0
    assert "compiled in" in answer.err
    return folder / "run"


def validated(run: Path, *flags: object) -> float:
    answer = gptlit("validate", "--ckpt_path", run, *flags)
    assert answer.code == 0
    return float(answer.out.split()[1])


def test_a_model_trained_on_a_gpu_has_the_same_loss_on_a_cpu(run: Path) -> None:
    """Guards against a checkpoint that loads only on the device that wrote it."""
    here = validated(run, "--trainer.accelerator", "gpu", "--trainer.precision", "bf16-mixed")
    there = validated(run, "--trainer.accelerator", "cpu", "--trainer.precision", "32-true")
    assert here == pytest.approx(there, abs=0.01)


def test_cpu_and_gpu_generate_the_same_text(run: Path) -> None:
    """Up to the first token that differs because of rounding; at least some characters."""
    texts = []
    for accelerator in ("cpu", "gpu"):
        answer = gptlit("predict", "--ckpt_path", run, "--trainer.accelerator", accelerator, "--max_new_tokens", 40)
        assert answer.code == 0
        texts.append(answer.out)
    assert len(texts[0]) > 40
    assert texts[0][:10] == texts[1][:10]


def test_weights_stay_float32_and_finite_under_bfloat16(run: Path) -> None:
    """Only matmuls may use bfloat16, not the weights."""
    weights = load(run / "last.ckpt")["state_dict"]
    assert all(w.dtype == torch.float32 and w.isfinite().all() for w in weights.values() if w.is_floating_point())


def test_a_compiled_run_learns_like_an_eager_one(tmp_path: Path) -> None:
    """Compiled code may only round differently. Without dropout, since its masks differ."""
    losses = []
    for compiled in (False, True):
        changes = {"model__gpt__dropout": 0.0, "trainer__max_steps": 40, "model__compile": compiled}
        config = write_config(tmp_path, **ON_GPU, **changes)
        assert gptlit("fit", "--config", config, "--run_dir", tmp_path / str(compiled)).code == 0
        losses.append(validated(tmp_path / str(compiled)))
    assert losses[0] == pytest.approx(losses[1], abs=0.03)


def test_training_does_not_synchronise_with_the_device(tmp_path: Path) -> None:
    """Guards against a hidden device-to-host copy in every step between two logs.

    One wait is intended, for the loss of the step before the weights change; it uses an event, not a copy.
    """
    changes = {"trainer__max_steps": 30, "trainer__log_every_n_steps": 30, "trainer__val_check_interval": 30}
    config = write_config(tmp_path, **ON_GPU, **changes, average__decay=0.9)
    watch = (
        At("on_train_batch_start", 5, lambda: torch.cuda.set_sync_debug_mode("error")),
        At("on_train_batch_start", 25, lambda: torch.cuda.set_sync_debug_mode("default")),
    )
    try:
        with extra_callbacks(*watch):
            answer = gptlit("fit", "--config", config, "--run_dir", tmp_path / "run", "--save_every_n_steps", 100)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (answer.code, answer.err.count("synchroniz")) == (0, 0)
    assert all(callback.done for callback in watch)
