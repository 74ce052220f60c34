"""Says when the steps of a run on a CPU have become slow, and which command continues faster."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from gptlit.callbacks.console import console
from gptlit.callbacks.metrics import MetricsLogger
from gptlit.errors import shell_option

WINDOW_SECONDS = 5.0  # a step's time is the mean over so long
SLOW = 2.0  # times the best pace
RECOVERED = 1.5  # times the best pace; below it the next slowdown is said again
LEAST_WINDOWS, LEAST_SECONDS = 3, 20.0  # of a slowdown that is said


@dataclass(frozen=True)
class Watch:
    """What is known about the pace of a run. `slow_…` count the consecutive slow windows until now."""

    best: float = math.inf
    """Seconds of a step in the fastest window."""
    slow_windows: int = 0
    slow_steps: int = 0
    slow_seconds: float = 0.0
    said: bool = False
    """Whether this slowdown was said."""

    @property
    def due(self) -> bool:
        """Whether the slowdown has lasted long enough, and was not said."""
        return not self.said and self.slow_windows >= LEAST_WINDOWS and self.slow_seconds >= LEAST_SECONDS


def add_window(watch: Watch, steps: int, seconds: float) -> Watch:
    """Return what is known after some more steps, which took so many seconds in all."""
    pace = seconds / steps
    if pace <= SLOW * watch.best:
        return Watch(min(watch.best, pace), said=watch.said and pace > RECOVERED * watch.best)
    return replace(
        watch,
        slow_windows=watch.slow_windows + 1,
        slow_steps=watch.slow_steps + steps,
        slow_seconds=watch.slow_seconds + seconds,
    )


def slowdown_line(watch: Watch, threads: int, run_dir: Path) -> str:
    """Return what has happened, and the command that continues faster.

    Threads that share a core with another program wait for each other. Half of them take at most twice the best time.
    """
    now, best = (milliseconds(seconds) for seconds in (watch.slow_seconds / watch.slow_steps, watch.best))
    command = f"gptlit fit {shell_option('--ckpt_path', run_dir)} --threads {threads // 2}"
    return f"a step takes {now} ms, {best} before: another program seems to use the processor. Ctrl-C, then: {command}"


def milliseconds(seconds: float) -> str:
    """Return `225`, or `2.3` for short times."""
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.01 else f"{1e3 * seconds:.1f}"


class SlowdownNotice(pl.Callback):
    """Prints one line when steps have taken more than twice the run's best time for a while.

    Only in a single process on a CPU with more than one thread, where fewer threads would help.

    Args:
        curves: measures the training time, without validations and checkpoints.
        run_dir: folder of the run.
    """

    def __init__(self, curves: MetricsLogger, run_dir: Path) -> None:
        self.curves, self.run_dir = curves, run_dir
        self.watch = Watch()
        self._mark = (0, 0.0)  # steps and seconds at which the window began

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._mark = (self.curves.steps_timed, self.curves.seconds)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        steps, seconds = self.curves.steps_timed - self._mark[0], self.curves.seconds - self._mark[1]
        if not steps or seconds < WINDOW_SECONDS:
            return
        self._mark = (self.curves.steps_timed, self.curves.seconds)
        self.watch = add_window(self.watch, steps, seconds)
        if self.watch.due and fewer_threads_help(trainer):
            self.watch = replace(self.watch, said=True)
            console().print(slowdown_line(self.watch, torch.get_num_threads(), self.run_dir), style="yellow")


def fewer_threads_help(trainer: pl.Trainer) -> bool:
    """Return whether this is a single process on a CPU with several threads."""
    return trainer.world_size == 1 and trainer.strategy.root_device.type == "cpu" and torch.get_num_threads() > 1
