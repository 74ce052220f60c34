"""The number of CPU threads of a run."""

import lightning.pytorch as pl
import torch


class UseThreads(pl.Callback):
    """Sets the number of CPU threads, in every process of a run, after Lightning has set its own.

    Args:
        number: of threads; None leaves torch's or Lightning's.
    """

    def __init__(self, number: int | None) -> None:
        self.number = number

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.number is not None:
            torch.set_num_threads(self.number)
