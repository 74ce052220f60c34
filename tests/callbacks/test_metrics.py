"""MetricsLogger: logged values, their steps, training speed, and metrics.csv."""

import csv
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from command import gptlit, write_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gptlit.callbacks.metrics import MetricsFile, MetricsLogger, clock_stopped
from gptlit.optim import ScheduleConfig, learning_rate_factor

STEPS, EVERY, VALIDATE = 14, 4, 6  # none divides another, so that no count is right by coincidence
TRAIN = {"train/loss", "train/grad_norm", "perf/step_milliseconds", "perf/characters_per_second"}
RATES = {"lr/muon", "lr/adamw", "lr/head"}
VAL = {"val/loss", "val/bpc", "val/bpb", "val/perplexity", "val/loss_estimate", "train/loss_estimate"}
TRAIN_STEPS, VAL_STEPS = [4, 8, 12, 14], [0, 6, 12, 14]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run with two micro-batches a step."""
    folder = tmp_path_factory.mktemp("curves")
    config = write_config(
        folder,
        trainer__max_steps=STEPS,
        trainer__log_every_n_steps=EVERY,
        trainer__val_check_interval=VALIDATE,
        trainer__accumulate_grad_batches=2,
        data__estimate_batches=2,
        model__optimizer__lr=4e-3,
        model__optimizer__head_lr=1e-3,
    )
    assert gptlit("fit", "--config", config, "--run_dir", folder / "run").code == 0
    return folder / "run"


@pytest.fixture(scope="module")
def scalars(run: Path) -> dict[str, dict[int, float]]:
    """TensorBoard's curves: tag -> step -> value."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_point_is_logged_at_the_number_of_optimizer_steps_done(scalars: dict[str, dict[int, float]]) -> None:
    """Guards against Lightning's own count, which is one less, and against counting micro-batches."""
    found = {tag: list(points) for tag, points in scalars.items() if tag != "val/best_loss"}
    assert found == {
        **dict.fromkeys(TRAIN | RATES, TRAIN_STEPS),
        **dict.fromkeys(VAL, VAL_STEPS),
    }


def test_the_logged_rate_is_the_one_that_the_step_used(scalars: dict[str, dict[int, float]]) -> None:
    """Guards against logging the rate of the next step."""
    schedule = ScheduleConfig(shape="cosine", warmup_steps=3)
    factors = {step: learning_rate_factor(step - 1, STEPS, schedule) for step in TRAIN_STEPS}
    for name, peak in (("lr/muon", 0.02), ("lr/adamw", 4e-3), ("lr/head", 1e-3)):
        expected = {step: peak * factor for step, factor in factors.items()}
        assert scalars[name] == pytest.approx(expected, rel=1e-6), name


def test_the_csv_holds_the_numbers_of_tensorboard_in_one_row_a_step(
    run: Path, scalars: dict[str, dict[int, float]]
) -> None:
    """Guards against delayed, duplicate or split rows."""
    rows = table(run / "metrics.csv")
    assert [int(row["step"]) for row in rows] == sorted({*TRAIN_STEPS, *VAL_STEPS})
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for row in rows:
        for name, value in row.items():
            if value and name != "step":
                found[name][int(row["step"])] = float(value)
    for name in TRAIN | RATES | VAL:
        assert found[name] == pytest.approx(scalars[name], rel=1e-5)


def test_speed_is_characters_of_the_whole_batch_over_the_time_of_a_step(scalars: dict[str, dict[int, float]]) -> None:
    """Guards against leaving out the accumulated micro-batches, or counting them twice."""
    for step, milliseconds in scalars["perf/step_milliseconds"].items():
        assert scalars["perf/characters_per_second"][step] == pytest.approx(8 * 16 / (milliseconds / 1e3), rel=1e-4)


class Clock:
    """Replaces time.perf_counter."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Any:
    clock = Clock()
    with mock.patch("gptlit.callbacks.metrics.time.perf_counter", clock):
        yield clock


def one_step(curves: MetricsLogger, clock: Clock, trainer: Any, seconds: float) -> None:
    curves.on_train_batch_start(trainer, None, None, 0)
    clock.now += seconds
    trainer.global_step += 1
    curves.on_train_batch_end(trainer, SimpleNamespace(log_step=lambda: None), None, None, 0)


def make_trainer(curves: MetricsLogger) -> Any:
    return SimpleNamespace(
        callbacks=[curves],
        loggers=[],
        callback_metrics={},
        _logger_connector=SimpleNamespace(log_metrics=lambda metrics, step: None),
        global_step=0,
        max_steps=100,
        log_every_n_steps=2,
        fit_loop=SimpleNamespace(_should_accumulate=lambda: False),
        datamodule=SimpleNamespace(batch_size=4, block_size=25, chars_per_train_token=2.0),
    )


def test_the_clock_is_stopped_while_the_run_validates_or_writes(clock: Clock) -> None:
    """Guards against a speed that depends on how often checkpoints are written."""
    curves = MetricsLogger()
    trainer = make_trainer(curves)
    one_step(curves, clock, trainer, 1.0)
    curves.on_validation_start(trainer, None)
    clock.now += 50.0
    one_step(curves, clock, trainer, 3.0)
    assert curves.latest["perf/step_milliseconds"] == 2000.0
    assert curves.latest["perf/characters_per_second"] == 4 * 25 * 2.0 / 2.0

    with clock_stopped(trainer):
        clock.now += 50.0
    one_step(curves, clock, trainer, 5.0)
    one_step(curves, clock, trainer, 5.0)
    assert curves.latest["perf/step_milliseconds"] == 5000.0
    curves.on_train_end(trainer, None)
    assert curves.training_seconds == 14.0


@pytest.mark.parametrize(
    ("seconds", "counted"),
    [
        ([9.0, 3.0, 900.0, 1.0], 9 + 3 + 3 + 1),  # suspended during one step: it counts as one of mean length
        ([9.0, 3.0, 900.0, 800.0, 700.0, 1.0], 9 + 3 + 3 + 800 + 700 + 1),  # several in a row: a slow machine
        ([9.0, 3.0, 900.0, 1.0, 900.0, 2.0], 9 + 3 + 3 + 1 + 7 / 3 + 2),  # suspended twice
        ([9.0, 3.0, 50.0, 1.0], 9 + 3 + 50 + 1),  # less than a minute
        ([9.0, 40.0, 500.0, 40.0], 9 + 40 + 500 + 40),  # less than twenty usual steps
        ([60.0, 1.0, 600.0, 1.0], 60 + 1 + 1 + 1),  # the first step may compile, and is no usual one
        ([900.0, 1.0, 1.0, 1.0], 903),
    ],
)
@pytest.mark.parametrize("resumed", [False, True])
def test_a_suspended_process_does_not_change_training_time_and_speed(
    seconds: list[float], counted: float, resumed: bool, clock: Clock
) -> None:
    """Guards against a closing table that counts the time between Ctrl-Z and `fg` as training."""
    curves = MetricsLogger()
    before = 0.0
    if resumed:
        curves.load_state_dict({"training_seconds": 50.0, "steps_timed": 2})
        before = 50.0
    trainer = make_trainer(curves)
    for step in seconds:
        one_step(curves, clock, trainer, step)
    if len(seconds) == 4:
        assert curves.latest["perf/step_milliseconds"] == pytest.approx(1e3 * (counted - sum(seconds[:2])) / 2)
    curves.on_train_end(trainer, None)
    assert curves.training_seconds == pytest.approx(before + counted)


def test_a_checkpoint_written_while_the_clock_runs_holds_the_time_so_far(clock: Clock) -> None:
    """Guards against a closing table of a resumed run that lacks the time since the last validation."""
    curves = MetricsLogger()
    one_step(curves, clock, make_trainer(curves), 7.0)
    resumed = MetricsLogger()
    resumed.load_state_dict(curves.state_dict())
    assert (resumed.training_seconds, resumed.steps_timed) == (7.0, 1)

    trainer = make_trainer(resumed)
    trainer.global_step = 1
    one_step(resumed, clock, trainer, 3.0)
    assert resumed.latest["perf/step_milliseconds"] == 3000.0


def test_a_row_is_written_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    """Guards against an empty file after SIGKILL."""
    metrics = MetricsFile(tmp_path)
    metrics.log_metrics({"train/loss": 4.0}, step=10)
    assert (tmp_path / "metrics.csv").read_text() == "step,train/loss\n10,4\n"
    metrics.log_metrics({"val/loss": 3.5}, step=10)
    metrics.log_metrics({"train/loss": 3.25}, step=20)
    assert (tmp_path / "metrics.csv").read_text() == "step,train/loss,val/loss\n10,4,3.5\n20,3.25,\n"


def test_a_resumed_run_drops_the_rows_that_it_repeats(tmp_path: Path) -> None:
    """Guards against duplicate rows, lost earlier rows, and a last line cut short by a crash."""
    metrics = MetricsFile(tmp_path)
    for step in (10, 20, 30):
        metrics.log_metrics({"train/loss": float(step), "lr/adamw": 0.5}, step=step)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("40,0.")

    resumed = MetricsFile(tmp_path, resume_step=20)
    resumed.log_metrics({"val/loss": 2.0}, step=20)
    resumed.log_metrics({"train/loss": 31.0, "lr/adamw": 0.5}, step=30)
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines == ["step,lr/adamw,train/loss,val/loss", "10,0.5,10,", "20,0.5,20,2", "30,0.5,31,"]


def test_a_new_run_replaces_an_existing_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,train/loss\n10,4\n")
    MetricsFile(tmp_path).log_metrics({"train/loss": 1.0}, step=5)
    assert (tmp_path / "metrics.csv").read_text() == "step,train/loss\n5,1\n"
