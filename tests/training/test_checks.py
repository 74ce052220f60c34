"""Callbacks of Lightning that a run of gptlit refuses, epochs without a step, and averages that Lightning keeps."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from command import extra_callbacks, gptlit, load, write_config
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
)

from gptlit import GPTConfig, LitGPT, OptimizerConfig, TextDataModule, UserError
from gptlit.callbacks.averaging import AverageWeights

TEXT = "To learn a tongue, one letter at a time,\nIs all the craft that lies behind this rhyme.\n" * 20


class PyTorchLightningPruningCallback(Callback):
    """Named like that of Optuna, which reports epochs (findings/optuna-pruning-within-an-epoch.sh)."""


class OwnPruning(PyTorchLightningPruningCallback):
    """A user's own, which may report steps."""


def fit(folder: Path, *callbacks: Callback, **settings: Any) -> pl.Trainer:
    """Train a tiny model with a plain Trainer."""
    (folder / "rhyme.txt").write_text(TEXT)
    defaults: dict[str, Any] = {"max_steps": 6, "val_check_interval": 3, "check_val_every_n_epoch": None}
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        default_root_dir=folder,
        **(defaults | settings),
    )
    model = LitGPT(GPTConfig(block_size=8, n_layer=1, n_head=1, n_embd=8), OptimizerConfig(name="adamw", lr=1e-2))
    trainer.fit(model, datamodule=TextDataModule(str(folder / "rhyme.txt"), block_size=8, batch_size=6))
    return trainer


@pytest.mark.parametrize(
    ("callback", "instead"),
    [
        (GradientAccumulationScheduler({0: 2}), "set trainer.accumulate_grad_batches"),
        (StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1), "set average.decay"),
        (PyTorchLightningPruningCallback(), "report under trainer.global_step"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_callback_that_cannot_work_is_refused_from_python(tmp_path: Path, callback: Callback, instead: str) -> None:
    with pytest.raises(UserError, match=instead):
        fit(tmp_path, callback)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_an_average_that_validations_round_is_refused(tmp_path: Path, precision: str) -> None:
    """Of Lightning's callback (findings/lightning-ema-rounded-by-validation.sh); ours keeps its digits."""
    with pytest.raises(UserError, match=f"precision is {precision}: set average.decay"):
        fit(tmp_path, EMAWeightAveraging(decay=0.5), precision=precision)
    assert fit(tmp_path, EMAWeightAveraging(decay=0.5), precision="bf16-mixed").global_step == 6


def test_a_callback_of_the_users_own_is_taken(tmp_path: Path) -> None:
    """The reason holds for the class of that name alone."""
    assert fit(tmp_path, OwnPruning()).global_step == 6


@pytest.mark.parametrize(
    "flags",
    [
        ("GradientAccumulationScheduler", "--trainer.callbacks.scheduling", "{0: 2}"),
        ("StochasticWeightAveraging", "--trainer.callbacks.swa_lrs", 0.01, "--trainer.callbacks.swa_epoch_start", 1),
    ],
    ids=lambda flags: flags[0],
)
def test_a_callback_that_cannot_work_is_refused_by_the_command(
    tmp_path: Path, flags: tuple[object, ...], recwarn: pytest.WarningsRecorder
) -> None:
    """In one line that names it, without a warning about its defaults; no run folder is left."""
    config = write_config(tmp_path)
    answer = gptlit("fit", "--config", config, "--run_dir", tmp_path / "run", "--trainer.callbacks", *flags)
    assert (answer.code, answer.out) == (2, "")
    assert str(flags[0]) in answer.err.splitlines()[-1]
    assert not [warning for warning in recwarn if "serialize" in str(warning.message)]
    assert not (tmp_path / "run").exists()


def test_an_epoch_without_a_step_ends_the_run(tmp_path: Path) -> None:
    """Whatever keeps the optimizer from stepping: the alternative is a run that never ends."""

    class Skip(Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            pl_module.on_train_batch_start = lambda batch, batch_idx: -1  # Lightning: leave the epoch

    with pytest.raises(UserError, match="no optimizer step was made in an epoch, after step 0 of 6"):
        fit(tmp_path, Skip())


def test_a_run_longer_than_its_average_resumes_from_the_trained_weights(tmp_path: Path) -> None:
    """When training ends, Lightning's averaging replaces them in the model, before a last file would be written."""
    config = write_config(tmp_path, model__schedule__shape="constant", model__schedule__warmup_steps=0)
    runs = {"whole": 16, "short": 10}
    for name, steps in runs.items():
        with extra_callbacks(EMAWeightAveraging(decay=0.9)):
            answer = gptlit("fit", "--config", config, "--run_dir", tmp_path / name, "--trainer.max_steps", steps)
            assert answer.code == 0, answer.err
    with extra_callbacks(EMAWeightAveraging(decay=0.9)):
        assert gptlit("fit", "--ckpt_path", tmp_path / "short", "--trainer.max_steps", 16).code == 0
    whole, short = (load(tmp_path / name / "last.ckpt") for name in runs)
    for key in ("state_dict", "current_model_state"):
        assert all(torch.equal(short[key][name], weight) for name, weight in whole[key].items()), key


@pytest.mark.parametrize("average", [AverageWeights(0.5), EMAWeightAveraging(decay=0.5)], ids=["ours", "Lightning's"])
def test_a_file_of_weights_alone_holds_the_average_that_was_validated(tmp_path: Path, average: Callback) -> None:
    """Lightning writes the trained weights there, under the loss of the average."""
    saving = ModelCheckpoint(tmp_path, monitor="val/loss", save_weights_only=True, filename="best")
    trainer = fit(tmp_path, average, saving)
    assert saving.best_model_score is not None
    model = LitGPT.load_from_checkpoint(tmp_path / "best.ckpt", weights_only=True)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    data = TextDataModule(str(tmp_path / "rhyme.txt"), block_size=8, batch_size=6)
    (metrics,) = pl.Trainer(**quiet).validate(model, datamodule=data, verbose=False)
    assert metrics["val/loss"] == pytest.approx(float(saving.best_model_score), abs=1e-6)
    assert trainer.global_step == 6


def test_a_second_average_is_refused(tmp_path: Path) -> None:
    """Each would save the other's average in place of the trained weights."""
    with pytest.raises(UserError, match=r"EMAWeightAveraging is one average .* and average\.decay another"):
        fit(tmp_path, AverageWeights(0.9), EMAWeightAveraging(decay=0.5))
