"""The progress of a run on stderr: a bar on a terminal, lines elsewhere."""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar, Timer
from rich.live import Live
from rich.progress_bar import ProgressBar as Bar
from rich.table import Table
from rich.text import Text

from gptlit.callbacks.console import console
from gptlit.callbacks.suspension import Suspensions
from gptlit.training.lightning_internals import callbacks_of
from gptlit.training.metrics import at_log_interval, validation_counts

REFRESHES_PER_SECOND = 4
WIDEST_BAR = 40  # characters
NARROWEST_BAR = 5
WINDOW = 200  # steps that the time of a step is averaged over
FIRST_MINUTE, OFTEN, SELDOM = (
    60.0,
    5.0,
    30.0,
)  # seconds; without a terminal: a line every 5 s, after a minute every 30 s


@dataclass
class Pace:
    """Measures the wall-clock time of a step and of a validation; estimates the time left.

    The time of a validation includes its samples, pictures and `best.ckpt`. A step during which the process was
    suspended does not count (`Suspensions`).

    Args:
        clock: returns seconds.
    """

    clock: Callable[[], float] = time.monotonic
    started: float | None = None
    validations: list[float] = field(default_factory=list)
    """Seconds of each validation since this start of the run."""
    _intervals: deque[tuple[int, float]] = field(default_factory=deque)  # steps, seconds
    _steps: int = 0  # sums over the intervals, so that the bar's thread can read them at any time
    _seconds: float = 0.0
    _warm: bool = False  # whether the first interval has ended, which includes one-time work such as compiling
    _mark: tuple[int, float] | None = None  # step and time at which the current interval began
    _paused: float | None = None
    _suspensions: Suspensions = field(default_factory=Suspensions)

    def resume(self, step: int) -> None:
        """Count the time from now on as training; end the validation if one was running."""
        now = self.clock()
        self.started = now if self.started is None else self.started
        if self._paused is not None:
            self.validations.append(now - self._paused)
            self._paused = None
        self._mark = (step, now) if self._mark is None else self._mark

    def pause(self, step: int) -> None:
        """Count the time from now on as validation."""
        if self._paused is None:
            self.lap(step)
            self._paused, self._mark = self.clock(), None

    def lap(self, step: int) -> None:
        """End an interval of training steps, and begin the next one."""
        if self._mark is None or step <= self._mark[0]:
            return
        now = self.clock()
        interval = (step - self._mark[0], now - self._mark[1])
        usual = None if self.step_seconds is None else interval[0] * self.step_seconds
        self._mark = (step, now)
        if not self._suspensions.counts(interval[1], usual):
            return
        if len(self._intervals) == 1 and not self._warm:
            self._drop_oldest()
            self._warm = True
        self._intervals.append(interval)
        self._steps, self._seconds = self._steps + interval[0], self._seconds + interval[1]
        if len(self._intervals) > WINDOW:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        steps, seconds = self._intervals.popleft()
        self._steps, self._seconds = self._steps - steps, self._seconds - seconds

    @property
    def elapsed(self) -> float:
        """Seconds since training started."""
        return 0.0 if self.started is None else self.clock() - self.started

    @property
    def step_seconds(self) -> float | None:
        """Mean seconds of the latest training steps; None before the first one ended."""
        return max(self._seconds, 0.0) / self._steps if self._steps else None

    def left(self, steps: int, validations: float) -> float | None:
        """Estimate the seconds of a number of steps and validations; None while unknown."""
        if self.step_seconds is None:
            return None
        validation = sum(self.validations) / len(self.validations) if self.validations else 0.0
        return steps * self.step_seconds + validations * validation


class RunBar(ProgressBar):
    """Shows step, losses, elapsed time and time left.

    On a terminal: one line that stays at the bottom, and a line for each validation above it. Elsewhere (a pipe, a log
    file, a notebook): a line every 5 seconds, after the first minute every 30 seconds, and a line for each validation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pace = Pace()
        self._live: Live | None = None
        self._enabled = True
        self._printed = -math.inf  # when the last line was printed, without a terminal
        self._numbers: tuple[str, ...] = ()

    def disable(self) -> None:
        """Turn the bar off; Lightning calls this on every rank but 0."""
        self._enabled = False

    def enable(self) -> None:
        """Turn the bar on."""
        self._enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.pace.resume(trainer.global_step)
        if self._enabled and console().is_terminal:
            self._live = Live(
                get_renderable=lambda: bar_line(self.state(trainer), console().width),
                console=console(),
                refresh_per_second=REFRESHES_PER_SECOND,
                transient=True,
            )
            self._live.start()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.pace.resume(trainer.global_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        self.pace.lap(step)
        if not at_log_interval(trainer, step):
            return
        self._numbers = numbers(trainer.callback_metrics)
        gap = OFTEN if self.pace.elapsed < FIRST_MINUTE else SELDOM
        if self._enabled and self._live is None and self.pace.elapsed - self._printed >= gap:
            self._print(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.pace.pause(trainer.global_step)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._enabled and validation_counts(trainer):
            self._numbers = numbers(trainer.callback_metrics)
            self._print(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar; called by `LightningModule.print`."""
        console().print(*args)

    def state(self, trainer: pl.Trainer) -> "State":
        """Return what the bar shows. It runs in the bar's thread, so it must not read what training modifies."""
        step = trainer.global_step
        left = self.pace.left(trainer.max_steps - step, validations_left(trainer))
        limits = [timer.time_remaining() for timer in callbacks_of(trainer) if isinstance(timer, Timer)]
        if left is not None:
            left = max(0.0, min([left, *(limit for limit in limits if limit is not None)]))
        return State(step, trainer.max_steps, self._numbers, self.pace.elapsed, left)

    def _print(self, trainer: pl.Trainer) -> None:
        self._printed = self.pace.elapsed
        console().print(plain_line(self.state(trainer)))

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


# ---------------------------------------------------------------- what is shown


@dataclass(frozen=True)
class State:
    """What a line shows: steps, `numbers` such as `loss 1.6031`, and seconds."""

    step: int
    max_steps: int
    numbers: tuple[str, ...]
    elapsed: float
    left: float | None


def numbers(metrics: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the latest losses as texts, `("loss 1.6031", "val 1.7421")`; an unknown one is left out."""
    names = {"train/loss": "loss", "val/loss": "val"}
    return tuple(f"{short} {float(metrics[name]):.4f}" for name, short in names.items() if name in metrics)


def validations_left(trainer: pl.Trainer) -> float:
    """Return the number of validations from this step to the end of the run, including the one at the end."""
    if not trainer.limit_val_batches:
        return 0
    interval: Any = trainer.val_check_interval  # micro-batches, or a time
    if isinstance(interval, timedelta | str | dict) or interval is None:
        return 1
    every = max(1, int(interval) // trainer.accumulate_grad_batches)
    step, last = trainer.global_step, trainer.max_steps
    return last // every - step // every + (last % every != 0 and step < last)


def plain_line(state: State) -> str:
    """Return `step   250 of 3,000 · loss 1.6031 · val 1.7421 · 0:42 elapsed · 2:05 left`."""
    width = len(f"{state.max_steps:,}")
    parts = [f"step {state.step:>{width},} of {state.max_steps:,}", *state.numbers, f"{clock(state.elapsed)} elapsed"]
    if state.left is not None and state.step < state.max_steps:
        parts.append(f"{clock(state.left)} left")
    return " · ".join(parts)


def bar_line(state: State, width: int) -> Table:
    """Return the line of a terminal with `width` columns: step, bar, losses, elapsed, left.

    If it is too narrow, the elapsed time is left out first, then the bar.
    """
    left = "--:--" if state.left is None else clock(state.left)
    head = f"step {state.step:,}/{state.max_steps:,}"
    parts = [*state.numbers, f"{clock(state.elapsed)} elapsed", f"{left} left"]
    bar_width = width - len(head) - 2 - len(" · ".join(parts))
    if bar_width < NARROWEST_BAR:
        parts.pop(-2)
        bar_width = width - len(head) - 2 - len(" · ".join(parts))
    grid = Table.grid(padding=(0, 1, 0, 0))
    cells: list[Any] = [Text(head, no_wrap=True)]
    if bar_width >= NARROWEST_BAR:
        cells.append(Bar(total=state.max_steps, completed=state.step, width=min(bar_width, WIDEST_BAR)))
    cells.append(Text(" · ".join(parts), no_wrap=True))
    grid.add_row(*cells)
    return grid


def clock(seconds: float) -> str:
    """Format seconds as `0:42`, `12:05` or `2:10:00`."""
    total = round(seconds)
    minutes, hours = total // 60, total // 3600
    return f"{hours}:{minutes % 60:02}:{total % 60:02}" if hours else f"{minutes}:{total % 60:02}"
