"""The progress bar of a run: one line on stderr with step, loss, validation loss, speed and time left."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gptlit.callbacks.metrics import MetricsLogger
from gptlit.training.lightning_internals import log_interval

REFRESHES_PER_SECOND = 4


class RunBar(ProgressBar):
    """A bar on a terminal; elsewhere one line for each validation.

    Args:
        curves: where the numbers come from.
        console: of rich, writing to stderr.
    """

    def __init__(self, curves: MetricsLogger, console: Console | None = None) -> None:
        super().__init__()
        self.curves = curves
        self.console = console or Console(stderr=True, soft_wrap=True, highlight=False)
        self.progress: Progress | None = None
        self._enabled = True

    def disable(self) -> None:
        """Called by Lightning on every process but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Turns the bar on."""
        self._enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Shows the bar, where there is a terminal to show it on."""
        if not self._enabled or not self.console.is_terminal:
            return
        self.progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            refresh_per_second=REFRESHES_PER_SECOND,
            transient=True,
        )
        self.task = self.progress.add_task("", total=trainer.max_steps, completed=trainer.global_step, numbers="")
        self.progress.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves on; the text changes only when new numbers were logged."""
        if self.progress is not None and trainer.global_step % log_interval(trainer) == 0:
            self.progress.update(self.task, completed=trainer.global_step, numbers=numbers(self.curves, trainer))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A line that stays: step, both losses."""
        if trainer.sanity_checking or trainer.state.fn != "fit" or not self._enabled:
            return
        self.console.print(f"step {trainer.global_step:>6}  {numbers(self.curves, trainer)}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes the bar away."""
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Takes the bar away before anything is said."""
        self._stop()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """What Lightning prints goes above the bar."""
        self.console.print(*args)

    def _stop(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


def numbers(curves: MetricsLogger, trainer: pl.Trainer) -> str:
    """`loss 1.603 · val 1.742 · 9,120 characters/s`, as far as known."""
    parts = []
    if "train/loss" in curves.latest:
        parts.append(f"loss {curves.latest['train/loss']:.4f}")
    if "val/loss" in trainer.callback_metrics:
        parts.append(f"val {float(trainer.callback_metrics['val/loss']):.4f}")
    if "perf/characters_per_second" in curves.latest:
        parts.append(f"{curves.latest['perf/characters_per_second']:,.0f} characters/s")
    return " · ".join(parts)
