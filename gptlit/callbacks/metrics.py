"""MetricsLogger: every number goes to the loggers through one function, under the number of optimizer steps done."""

import csv
import io
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from gptlit.checkpoint.atomic import atomic_write_text
from gptlit.training.lightning_internals import callbacks_of, datamodule_of, log_interval


def log_metrics(trainer: pl.Trainer, metrics: Mapping[str, float]) -> None:
    """Hands numbers to every logger, at the true step."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=trainer.global_step)


class MetricsLogger(pl.Callback):
    """`train/loss`, `train/grad_norm`, `lr/…`, `perf/…` every `log_every_n_steps` steps, `val/…` at each validation.

    Speed counts training alone: the clock stands still while the run validates, draws samples or writes checkpoints.
    """

    def __init__(self) -> None:
        self.latest: dict[str, float] = {}
        self.training_seconds = 0.0  # up to when the clock was last stopped
        self.steps_timed = 0
        self._since: float | None = None  # when the clock was last started; None while it stands still
        self._window = (0, 0.0)  # steps and seconds at the last log

    def state_dict(self) -> dict[str, Any]:
        """Training time so far, for the closing table of a resumed run."""
        return {"training_seconds": self._seconds(), "steps_timed": self.steps_timed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self.training_seconds, self.steps_timed = state_dict["training_seconds"], state_dict["steps_timed"]
        self._window = (self.steps_timed, self.training_seconds)

    def start_clock(self) -> None:
        """Starts the clock, unless it runs."""
        if self._since is None:
            self._since = time.perf_counter()

    def stop_clock(self) -> bool:
        """Stops the clock; whether it ran."""
        ran = self._since is not None
        self.training_seconds, self._since = self._seconds(), None
        return ran

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Starts the clock."""
        self.start_clock()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops the clock."""
        self.stop_clock()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops the clock."""
        self.stop_clock()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stops the clock."""
        self.stop_clock()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Logs when its turn has come; reads from the device only then."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self.steps_timed += 1
        step = trainer.global_step
        if step % log_interval(trainer) and step < trainer.max_steps:
            return
        self.latest["train/loss"] = pl_module.train_loss.item()
        if pl_module.grad_norm is not None:
            self.latest["train/grad_norm"] = float(pl_module.grad_norm)
        for group in trainer.optimizers[0].param_groups:
            self.latest[f"lr/{group['role']}"] = group["lr"]
        self.latest.update(self._speed(datamodule_of(trainer)))
        log_metrics(trainer, self.latest)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs what the validation gave."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        log_metrics(trainer, {name: float(value) for name, value in trainer.callback_metrics.items()})

    def _speed(self, datamodule: Any) -> dict[str, float]:
        """Milliseconds of a step, and characters read in a second, since the last log."""
        seconds = self._seconds()
        steps_before, seconds_before = self._window
        self._window = (self.steps_timed, seconds)
        step_seconds = max(seconds - seconds_before, 1e-9) / (self.steps_timed - steps_before)
        characters = datamodule.batch_size * datamodule.block_size * datamodule.chars_per_train_token
        return {
            "perf/step_milliseconds": 1e3 * step_seconds,
            "perf/characters_per_second": characters / step_seconds,
        }

    def _seconds(self) -> float:
        return self.training_seconds + (0.0 if self._since is None else time.perf_counter() - self._since)


@contextmanager
def clock_stopped(trainer: pl.Trainer) -> Iterator[None]:
    """What happens inside does not count as training time."""
    stopped = [curves for curves in callbacks_of(trainer) if isinstance(curves, MetricsLogger) and curves.stop_clock()]
    try:
        yield
    finally:
        for curves in stopped:
            curves.start_clock()


class MetricsFile(Logger):
    """`metrics.csv` of a run: one row a step, written at once, and carried on by a resumed run.

    Lightning's CSVLogger empties its file when a run is resumed, and holds rows back until the run ends.

    Args:
        run_dir: folder of the run.
        resume_step: optimizer steps of the checkpoint that the run goes on from; rows behind it are dropped, since
            those steps come again. None begins a new file.
    """

    def __init__(self, run_dir: str | Path, resume_step: int | None = None) -> None:
        super().__init__()
        self.path = Path(run_dir) / "metrics.csv"
        self.resume_step = resume_step
        self._columns: list[str] | None = None  # None until the file is opened
        self._row: dict[str, str] = {}  # of the latest step, the last line of the file
        self._row_start = 0  # where in the file that line begins, in bytes

    @property
    def name(self) -> str:
        """Loggers must have a name; this one is told by its folder."""
        return ""

    @property
    def version(self) -> str:
        """Likewise."""
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Puts numbers into the row of a step, which is a new row or the last one."""
        numbers = {name: f"{value:.8g}" for name, value in metrics.items()}
        if self._columns is None:
            self._open()
        assert self._columns is not None
        new_columns = sorted(numbers.keys() - set(self._columns))
        if new_columns:
            rows = self._read()
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
        """Nothing: they stand in config.yaml."""

    def _open(self) -> None:
        self._columns, rows = ["step"], []
        if self.resume_step is not None and self.path.is_file():
            rows = [row for row in self._read() if row["step"].isdigit() and int(row["step"]) <= self.resume_step]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._write(rows)

    def _read(self) -> list[dict[str, str]]:
        """The rows of the file; takes over its columns. A line that a crash cut short is left out."""
        with self.path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, restval=None)
            self._columns = list(reader.fieldnames or ["step"])
            return [row for row in reader if None not in row and None not in row.values()]

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
