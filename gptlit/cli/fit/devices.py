"""What the devices and the strategy of a Trainer cannot do, refused once they are known."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

from gptlit.data import share_of_batch
from gptlit.errors import UserError, settings_under
from gptlit.training.checks import check_processes
from gptlit.training.lightning_internals import to_save_one_file


def check_strategy(trainer: pl.Trainer, devices: Any) -> None:
    """Refuse strategies that no verb can use.

    Args:
        trainer: not yet running.
        devices: the setting `trainer.devices`.

    Raises:
        UserError: names `trainer.strategy`.
    """
    check_processes(trainer)
    if isinstance(trainer.strategy, SingleDeviceStrategy) and devices not in (None, "auto"):
        asked = trainer.accelerator.parse_devices(devices)
        number = asked if isinstance(asked, int) else len(asked or ())
        if number > 1:
            raise UserError(
                f"uses one device, but trainer.devices asks for {number}: choose trainer.strategy ddp",
                "trainer.strategy",
            )


def check_devices(trainer: pl.Trainer, batch_size: int, optimizer: str) -> None:
    """Refuse what the devices of a training run cannot share.

    Args:
        trainer: not yet running.
        batch_size: sequences of one optimizer step, over all devices.
        optimizer: its name.

    Raises:
        UserError: names the setting.
    """
    with settings_under("data"):
        share_of_batch(batch_size, trainer.accumulate_grad_batches, trainer.world_size)
    if optimizer == "muon" and isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):
        raise UserError(
            "is muon, which needs whole matrices, and trainer.strategy spreads each over the devices: choose "
            "model.optimizer.name adamw, or trainer.strategy ddp",
            "model.optimizer.name",
        )
    if trainer.world_size > 1 and trainer.val_check_interval is None:
        raise UserError(
            "is a time, which every process would measure for itself: give a number of steps, or a part of the run",
            "trainer.val_check_interval",
        )
    if trainer.checkpoint_callbacks and (change := to_save_one_file(trainer)):
        raise UserError(
            f"saves folders, which no verb of gptlit can read: {change}",
            "trainer.strategy",
        )
