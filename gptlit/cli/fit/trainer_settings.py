"""Trainer settings that Lightning takes without a word, and that would not do what they say in a run of ours."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from gptlit.data import share_of_batch
from gptlit.errors import UserError, settings_under
from gptlit.training.lightning_internals import starts_processes_by_fork


def check_trainer_settings(settings: Mapping[str, Any], fit: bool) -> None:  # noqa: C901
    """Refuses what cannot work, before anything is loaded.

    Args:
        settings: of the whole command, nested.
        fit: whether they are for training.

    Raises:
        UserError: naming the setting.
    """
    if not fit:
        return
    trainer = settings["trainer"]
    if trainer["max_steps"] < 1 and not trainer["fast_dev_run"]:
        raise UserError(
            f"trainer.max_steps is {trainer['max_steps']}: the length of a run is counted in optimizer steps, give it"
        )
    if trainer["limit_train_batches"] not in (None, 1.0):
        raise UserError(
            f"trainer.limit_train_batches is {trainer['limit_train_batches']}: a run is one pass over "
            "trainer.max_steps batches, set that instead"
        )
    for name, harmless, instead in (
        ("max_epochs", (None, 1, -1), "trainer.max_steps"),
        ("min_epochs", (None, 0, 1), "trainer.max_steps"),
        ("check_val_every_n_epoch", (None, 1), "trainer.val_check_interval, in steps"),
    ):
        if trainer[name] not in harmless:
            raise UserError(f"trainer.{name} is {trainer[name]}: a run is one pass, set {instead}")
    if trainer["default_root_dir"] is not None:
        raise UserError(
            f"trainer.default_root_dir is {trainer['default_root_dir']}: what a run leaves lies in --run_dir, set that"
        )
    if trainer["min_steps"] is not None and trainer["min_steps"] > trainer["max_steps"]:
        raise UserError(
            f"trainer.min_steps is {trainer['min_steps']}, more than trainer.max_steps ({trainer['max_steps']})"
        )
    if not -(2**63) <= settings["seed_everything"] < 2**64:
        raise UserError(f"seed_everything is {settings['seed_everything']}: it must fit into 64 bits")
    interval = trainer["val_check_interval"]
    if isinstance(interval, int | float) and not 0 < interval <= (1 if isinstance(interval, float) else interval):
        raise UserError(
            f"trainer.val_check_interval is {interval}: it must be a number of steps, or a fraction of the run"
        )
    for name in ("accumulate_grad_batches", "log_every_n_steps"):
        if trainer[name] is not None and trainer[name] < 1:
            raise UserError(f"trainer.{name} is {trainer[name]}: it must be 1 or more")
    if trainer["gradient_clip_val"] is not None and trainer["gradient_clip_val"] < 0:
        raise UserError(f"trainer.gradient_clip_val is {trainer['gradient_clip_val']}: it must be 0 (off) or more")
    if settings["save_every_n_steps"] < 1:
        raise UserError(f"save_every_n_steps is {settings['save_every_n_steps']}: it must be 1 or more")
    if not 0 <= settings["average"]["decay"] < 1:
        raise UserError(f"average.decay is {settings['average']['decay']}: it must be 0 (off) or more, and less than 1")
    if settings["sample_text"]["max_new_tokens"] < 0:
        raise UserError(
            f"sample_text.max_new_tokens is {settings['sample_text']['max_new_tokens']}: it must be 0 (off) or more"
        )


def check_devices(trainer: pl.Trainer, batch_size: int, optimizer: str) -> None:
    """Refuses what the devices, once they are known, cannot share.

    Args:
        trainer: not yet running.
        batch_size: of one optimizer step.
        optimizer: its name.

    Raises:
        UserError: naming the setting.
    """
    if starts_processes_by_fork(trainer):
        raise UserError(
            "trainer.strategy starts its processes by spawn or fork, which a run of gptlit does not survive: choose "
            "trainer.strategy ddp"
        )
    with settings_under("data"):
        share_of_batch(batch_size, trainer.accumulate_grad_batches, trainer.world_size)
    if optimizer == "muon" and isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):
        raise UserError(
            "model.optimizer.name is muon, which needs whole matrices, and trainer.strategy spreads each over the "
            "devices: choose model.optimizer.name adamw, or trainer.strategy ddp"
        )


class NoProfiler(PassThroughProfiler):
    """Measures nothing, and makes no context for each of the seventy things in a step that could be measured."""

    nothing: Any = nullcontext()

    def profile(self, action_name: str) -> Any:
        return self.nothing
