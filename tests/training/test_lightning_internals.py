"""The private names of Lightning in `gptlit/training/lightning_internals.py`, checked against the installed version."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

from gptlit import GPT, GPTConfig, LitGPT, TextDataModule
from gptlit.training import lightning_internals as internals

VERSION = f"Lightning {pl.__version__}"
NAMES = {
    "trainer": [
        "callbacks",
        "datamodule",
        "log_every_n_steps",
        "_signal_connector.received_sigterm",
        "_logger_connector._first_loop_iter",
        "_checkpoint_connector.dump_checkpoint",
        "fit_loop._should_accumulate",
        "fit_loop.epoch_loop.max_steps",
        "fit_loop.epoch_loop._batches_that_stepped",
        "fit_loop.epoch_loop.val_loop.run",
    ],
    "module": ["_trainer"],
    "average": ["_average_model", "_use_buffers", "_latest_update_step"],
}


class During(pl.Callback):
    """Calls a function after an optimizer step."""

    def __init__(self, step: int, action: Callable[[pl.Trainer], Any]) -> None:
        self.step, self.action = step, action

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.action(trainer)


def fit(folder: Path, *callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    """Train a tiny model for 4 steps with a plain Trainer."""
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 40, encoding="utf-8")
    options = {"max_steps": 4, "check_val_every_n_epoch": None, "val_check_interval": 2, "logger": False} | settings
    trainer = pl.Trainer(
        callbacks=list(callbacks),
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    model = LitGPT(GPTConfig(block_size=8, n_layer=1, n_head=1, n_embd=8))
    trainer.fit(model, datamodule=TextDataModule(str(text), block_size=8, batch_size=4))
    return trainer


@pytest.fixture(scope="module")
def owners(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The objects whose names are used, after a fit."""
    average = WeightAveraging()
    trainer = fit(tmp_path_factory.mktemp("internals"), average)
    return {"trainer": trainer, "module": trainer.lightning_module, "average": average}


@pytest.mark.parametrize(("owner", "name"), [(owner, name) for owner, names in NAMES.items() for name in names])
def test_the_installed_lightning_has_the_name(owners: dict[str, Any], owner: str, name: str) -> None:
    """A renamed attribute would otherwise be set on an object that never reads it."""
    value = owners[owner]
    for part in name.split("."):
        assert hasattr(value, part), (
            f"{VERSION} has no {type(value).__name__}.{part} (of {owner}.{name}): adapt lightning_internals.py"
        )
        value = getattr(value, part)


def test_declared_types_are_the_real_ones(owners: dict[str, Any]) -> None:
    trainer = owners["trainer"]
    assert owners["average"] in internals.callbacks_of(trainer), VERSION
    assert isinstance(internals.datamodule_of(trainer), TextDataModule), VERSION
    assert internals.log_interval(trainer) == 50, VERSION
    assert internals.trainer_of(owners["module"]) is trainer, VERSION
    assert internals.trainer_of(LitGPT()) is None, VERSION


def test_a_stop_request_ends_the_run_after_the_step(tmp_path: Path) -> None:
    with pytest.raises(SIGTERMException):
        fit(tmp_path, stopped := During(2, internals.stop_after_this_step))
    assert stopped.step == 2, VERSION


def test_the_logged_step_is_the_one_that_was_set(tmp_path: Path) -> None:
    """Lightning's own count is one less while the callbacks see the end of a step."""
    seen: list[int] = []

    class Logs(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            internals.set_logged_step(trainer)
            self.log("number", float(trainer.global_step), on_step=True)

    from lightning.pytorch.loggers.logger import DummyLogger

    logger = DummyLogger()
    logger.log_metrics = lambda metrics, step: seen.append(step) if "number" in metrics else None  # type: ignore[method-assign]
    fit(tmp_path, Logs(), logger=logger, log_every_n_steps=1, limit_val_batches=0)
    assert seen == [1, 2, 3, 4], VERSION


def test_a_run_ends_at_the_number_of_steps_that_was_set(tmp_path: Path) -> None:
    trainer = fit(tmp_path, During(1, lambda trainer: internals.set_max_steps(trainer, 3)))
    assert trainer.global_step == 3, VERSION


def test_a_validation_out_of_schedule_runs_once_and_training_continues(tmp_path: Path) -> None:
    steps: list[int] = []

    class Counts(pl.Callback):
        def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if not trainer.sanity_checking and trainer.global_step:
                steps.append(trainer.global_step)

    fit(tmp_path, Counts(), During(3, internals.validate_now))
    assert steps == [2, 3, 4], VERSION


def test_contents_are_what_save_checkpoint_writes(tmp_path: Path) -> None:
    path, contents = tmp_path / "saved.ckpt", {}

    def save(trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(path)
        contents.update(internals.checkpoint_contents(trainer))

    fit(tmp_path, During(2, save))
    saved = torch.load(path, weights_only=True)
    assert saved.keys() == contents.keys(), VERSION
    assert saved["global_step"] == contents["global_step"] == 2, VERSION


@pytest.mark.parametrize("accumulate", [1, 3])
def test_progress_is_set_to_whole_optimizer_steps(tmp_path: Path, accumulate: int) -> None:
    """Every counter that Lightning stores is known, and stands at a boundary."""
    contents: dict[str, Any] = {}
    fit(tmp_path, During(2, lambda trainer: contents.update(internals.checkpoint_contents(trainer))))
    internals.set_progress_to_step_boundary(contents, accumulate, one_epoch=True)
    loop = contents["loops"]["fit_loop"]
    known = {"total", "current", "is_last_batch"}
    for name in ("epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress"):
        assert loop[name].keys() == known, f"{VERSION} stores other counters in {name}"
        assert set(loop[name]["total"]) == {"ready", "started", "processed", "completed"}, VERSION
    assert loop["epoch_loop.batch_progress"]["current"]["completed"] == 2 * accumulate
    assert loop["epoch_loop.state_dict"].keys() == {"_batches_that_stepped"}, VERSION


def test_a_checkpoint_without_progress_is_left_as_it_is() -> None:
    checkpoint = {"global_step": 3, "state_dict": {}}
    internals.set_progress_to_step_boundary(checkpoint, 1, one_epoch=True)
    assert checkpoint == {"global_step": 3, "state_dict": {}}


@pytest.mark.parametrize(("method", "forks"), [("popen", False), ("spawn", True), ("fork", True)])
def test_strategies_that_fork_are_recognised(method: Any, forks: bool) -> None:
    strategy = DDPStrategy(start_method=method)
    strategy.cluster_environment = SimpleNamespace(creates_processes_externally=False)  # type: ignore[assignment]
    strategy._configure_launcher()
    assert internals.starts_processes_by_fork(SimpleNamespace(strategy=strategy)) is forks, VERSION


def test_an_average_of_the_weights_leaves_constant_tables_as_they_are(tmp_path: Path) -> None:
    """An average changes them by rounding, and no checkpoint holds them: a resumed run validated with others."""
    average = EMAWeightAveraging(decay=0.9)
    module = fit(tmp_path, average, max_steps=8).lightning_module
    assert isinstance(module, LitGPT)
    assert average._average_model is not None
    tables = dict(average._average_model.module.named_buffers())
    for name, table in GPT(module.network.config).named_buffers():
        assert torch.equal(tables[f"net.{name}"], table), name
