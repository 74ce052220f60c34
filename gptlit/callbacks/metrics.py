"""Training time and speed, and `metrics.csv`, the table of all metrics of a run."""

import csv
import io
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from gptlit.callbacks.suspension import Suspensions
from gptlit.checkpoint.atomic import atomic_write_text
from gptlit.checkpoint.metrics_file import read_metrics
from gptlit.training.lightning_internals import callbacks_of, completes_step, datamodule_of, log_to_loggers
from gptlit.training.metrics import is_logged


class MetricsLogger(pl.Callback):
    """Measures training time and logs `perf/step_milliseconds` and `perf/characters_per_second`.

    Only training counts: the clock is stopped while the run validates, samples or writes checkpoints, and a step during
    which the process was suspended (`Suspensions`) counts as one of mean length. All other metrics are logged by
    `LitGPT`; `latest` collects the last values of the training step for the progress bar.
    """

    def __init__(self) -> None:
        self.latest: dict[str, float] = {}
        self.training_seconds = 0.0  # until the clock was last stopped
        self.steps_timed = 0
        self._before = (0, 0.0)  # steps and seconds of earlier starts of the run
        self._started_at: float | None = None  # None while the clock is stopped
        self._window = (0, 0.0)  # steps and seconds at the last log
        self._start: tuple[int, float] | None = None  # steps and seconds after the first step here, which may compile
        self._step_began = 0.0  # seconds at the end of the step before
        self._suspensions = Suspensions()

    def state_dict(self) -> dict[str, Any]:
        """Return the training time so far, for the closing table of a resumed run."""
        return {"training_seconds": self.seconds, "steps_timed": self.steps_timed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.training_seconds, self.steps_timed = state_dict["training_seconds"], state_dict["steps_timed"]
        self._window = self._before = (self.steps_timed, self.training_seconds)
        self._start, self._step_began = None, self.training_seconds

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let `metrics.csv` count the optimizer steps of this Trainer."""
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile):
                logger.current_step = lambda: trainer.global_step

    def start_clock(self) -> None:
        """Start the clock, if it is stopped."""
        if self._started_at is None:
            self._started_at = time.perf_counter()

    def stop_clock(self) -> bool:
        """Stop the clock; return whether it was running."""
        ran = self._started_at is not None
        self.training_seconds, self._started_at = self.seconds, None
        return ran

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.start_clock()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stop_clock()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stop_clock()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.stop_clock()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the speed of the steps that are logged; read from the device only then."""
        if not completes_step(trainer):
            return
        self._leave_out_suspension()
        self.steps_timed += 1
        if not is_logged(trainer, trainer.global_step):
            return
        pl_module.log_step()
        for name, value in trainer.callback_metrics.items():
            if name.startswith(("train/", "lr/")):
                self.latest[name] = float(value)
        speed = self._speed(datamodule_of(trainer))
        self.latest |= speed
        log_to_loggers(trainer, {name: torch.tensor(value) for name, value in speed.items()}, trainer.global_step)

    def _leave_out_suspension(self) -> None:
        """End the time of a step; count it with the mean time of a step if the process was suspended during it."""
        step, usual = self.seconds - self._step_began, 0.0
        if self._start is not None and self.steps_timed > self._start[0]:
            usual = (self._step_began - self._start[1]) / (self.steps_timed - self._start[0])
        if not self._suspensions.counts(step, usual or None):
            self.training_seconds -= step - usual
        self._step_began = self.seconds
        self._start = self._start or (self.steps_timed + 1, self.seconds)

    def _speed(self, datamodule: Any) -> dict[str, float]:
        """Return milliseconds per step and characters per second since the last log."""
        seconds = self.seconds
        steps_before, seconds_before = self._window
        self._window = (self.steps_timed, seconds)
        step_seconds = max(seconds - seconds_before, 1e-9) / (self.steps_timed - steps_before)
        characters = datamodule.batch_size * datamodule.block_size * datamodule.chars_per_train_token
        return {
            "perf/step_milliseconds": 1e3 * step_seconds,
            "perf/characters_per_second": characters / step_seconds,
        }

    @property
    def of_this_start(self) -> tuple[int, float]:
        """Steps and seconds since the run was started or resumed; earlier starts may have had other batches."""
        return self.steps_timed - self._before[0], self.seconds - self._before[1]

    @property
    def seconds(self) -> float:
        """Training time until now."""
        return self.training_seconds + (0.0 if self._started_at is None else time.perf_counter() - self._started_at)


@contextmanager
def clock_stopped(trainer: pl.Trainer) -> Iterator[None]:
    """Exclude what happens inside from the training time."""
    clocks = [clock for clock in callbacks_of(trainer) if isinstance(clock, MetricsLogger) and clock.stop_clock()]
    try:
        yield
    finally:
        for clock in clocks:
            clock.start_clock()


class MetricsFile(Logger):
    """`metrics.csv` of a run: one row per optimizer step, in ascending order, for all callers.

    Each row is written immediately, and a resumed run continues the file; Lightning's CSVLogger would delete the
    earlier rows. In a run with `MetricsLogger`, a row belongs to the number of optimizer steps made when it is logged,
    not to the step that the caller gives: Lightning's own callbacks count one less, or validation batches.

    Args:
        run_dir: folder of the run.
        resume_step: optimizer steps of the checkpoint that the run resumes from; later rows are dropped, since those
            steps are made again. None starts a new file.
    """

    def __init__(self, run_dir: str | Path, resume_step: int | None = None) -> None:
        super().__init__()
        self.path = Path(run_dir) / "metrics.csv"
        self.resume_step = resume_step
        self.current_step: Callable[[], int] | None = None
        self._columns: list[str] | None = None  # None until the file is opened
        self._row: dict[str, str] = {}  # the last line of the file
        self._row_start = 0  # its offset in the file, in bytes

    @property
    def name(self) -> str:
        """Empty: the folder identifies the run."""
        return ""

    @property
    def version(self) -> str:
        """Empty, as `name`."""
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write metrics into the row of a step: a new row, or the last one."""
        numbers = {name: f"{value:.8g}" for name, value in metrics.items()}
        if self._columns is None:
            self._open()
        assert self._columns is not None
        step = max(self._last_step(), (step or 0) if self.current_step is None else self.current_step())
        new_columns = sorted(numbers.keys() - set(self._columns))
        if new_columns:
            _, rows = read_metrics(self.path)
            self._columns += new_columns
            self._write(rows)
        if self._row.get("step") != str(step):
            self._row, self._row_start = {"step": str(step)}, self.path.stat().st_size
        self._row.update(numbers)
        with self.path.open("r+b") as file:
            file.seek(self._row_start)
            file.truncate()
            file.write(self._lines([self._row]).encode())

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: config.yaml holds them."""

    def _last_step(self) -> int:
        return int(self._row.get("step", 0))

    def _open(self) -> None:
        rows: list[dict[str, str]] = []
        self._columns = ["step"]
        if self.resume_step is not None and self.path.is_file():
            self._columns, rows = read_metrics(self.path)
            rows = [row for row in rows if row.get("step", "").isdigit() and int(row["step"]) <= self.resume_step]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._write(rows)

    def _write(self, rows: list[dict[str, str]]) -> None:
        header = ",".join(self._columns or []) + "\n"
        atomic_write_text(self.path, header + self._lines(rows))
        if rows:
            self._row = {name: value for name, value in rows[-1].items() if value}
            self._row_start = self.path.stat().st_size - len(self._lines(rows[-1:]).encode())

    def _lines(self, rows: list[dict[str, str]]) -> str:
        text = io.StringIO(newline="")
        csv.DictWriter(text, self._columns or [], restval="", lineterminator="\n").writerows(rows)
        return text.getvalue()
