"""The progress bar: what fits into a terminal, the time left, and lines where there is no terminal."""

import io
import itertools
import re
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command import start, write_config
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Timer
from rich.console import Console

from gptlit.callbacks.bar import Pace, RunBar, State, bar_line, clock, plain_line, validations_left

NUMBERS = ("loss 1.6031", "val 1.7421")


def shown(state: State, columns: int) -> str:
    """Return the line of the bar in a terminal with `width` columns."""
    file = io.StringIO()
    Console(file=file, width=columns, force_terminal=True, color_system=None).print(bar_line(state, columns))
    return file.getvalue().rstrip("\n")


@pytest.mark.parametrize("columns", [80, 100, 120, 200])
@pytest.mark.parametrize("steps", [300, 3_000, 100_000])
@pytest.mark.parametrize("seconds", [0, 59, 3_599, 40_000])
def test_nothing_is_cut_in_a_terminal_of_80_columns_or_more(columns: int, steps: int, seconds: float) -> None:
    line = shown(State(steps, steps, NUMBERS, seconds, seconds), columns)
    assert len(line) <= columns
    assert "…" not in line
    assert "\n" not in line
    for text in (f"step {steps:,}/{steps:,}", *NUMBERS, f"{clock(seconds)} left"):
        assert text in line


def test_at_80_columns_a_usual_run_shows_the_bar_and_both_times_with_their_names() -> None:
    line = shown(State(1250, 3000, NUMBERS, 65, 92), 80)
    assert line.startswith("step 1,250/3,000 ━━")
    assert line.rstrip().endswith("loss 1.6031 · val 1.7421 · 1:05 elapsed · 1:32 left")


def test_before_the_first_step_the_time_left_is_unknown() -> None:
    assert shown(State(0, 300, (), 0, None), 80).rstrip().endswith("0:00 elapsed · --:-- left")
    assert plain_line(State(0, 300, (), 0, None)) == "step   0 of 300 · 0:00 elapsed"


def test_a_line_without_a_terminal() -> None:
    assert plain_line(State(250, 3000, NUMBERS, 42, 125)) == (
        "step   250 of 3,000 · loss 1.6031 · val 1.7421 · 0:42 elapsed · 2:05 left"
    )


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (42.4, "0:42"), (725, "12:05"), (7800, "2:10:00")])
def test_times_are_written_as_on_a_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


# ---------------------------------------------------------------- the time left


class Clock:
    """A clock set by the test."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@settings(deadline=None)
@given(
    first=st.floats(0, 60),
    step_seconds=st.floats(1e-3, 10),
    validation_seconds=st.floats(0, 60),
    every=st.integers(1, 50),
    steps=st.integers(2, 300),
)
def test_at_a_steady_pace_the_time_left_is_exact_after_the_first_validation_and_never_grows(
    first: float, step_seconds: float, validation_seconds: float, every: int, steps: int
) -> None:
    """The first step takes longer, as with compiling; validations (with samples) are part of the estimate."""
    time = Clock()
    pace = Pace(time)
    estimates: list[tuple[float, float]] = []  # estimate, truth
    validations = [step for step in range(1, steps + 1) if step % every == 0 or step == steps]
    for step in range(1, steps + 1):
        pace.resume(step - 1)
        time.now += step_seconds + (first if step == 1 else 0)
        pace.lap(step)
        if step in validations:
            pace.pause(step)
            time.now += validation_seconds
        remaining = sum(1 for due in validations if due > step)
        truth = (steps - step) * step_seconds + remaining * validation_seconds
        if step > max(2, every + 1):
            estimates.append((pace.left(steps - step, remaining) or 0.0, truth))
    for estimate, truth in estimates:
        assert estimate == pytest.approx(truth, rel=1e-6, abs=1e-6)
    assert all(after <= before + 1e-6 for (before, _), (after, _) in itertools.pairwise(estimates))


@pytest.mark.parametrize(
    ("seconds", "times", "left"), [(900.0, 1, 90.0), (900.0, 2, None), (900.0, 3, 90 * 1806 / 8), (50.0, 1, None)]
)
def test_a_suspended_process_does_not_change_the_time_left(seconds: float, times: int, left: float | None) -> None:
    """Stopped by Ctrl-Z during one step of one second each, say; after two such steps in a row the machine is slow."""
    time = Clock()
    pace = Pace(time)
    for step in range(1, 11):
        pace.resume(step - 1)
        time.now += seconds if 5 <= step < 5 + times else 1.0
        pace.lap(step)
    estimate = pace.left(90, 0)
    assert estimate is not None
    assert estimate == left if left is not None else estimate > 100


def trainer_at(step: int, interval: Any, accumulate: int = 1, limit: float = 1.0) -> Any:
    return SimpleNamespace(
        global_step=step,
        max_steps=1000,
        val_check_interval=interval,
        accumulate_grad_batches=accumulate,
        limit_val_batches=limit,
    )


@pytest.mark.parametrize(
    ("step", "interval", "accumulate", "left"),
    [(0, 250, 1, 4), (0, 300, 1, 4), (999, 300, 1, 1), (1000, 300, 1, 0), (500, 500, 2, 2), (0, timedelta(1), 1, 1)],
)
def test_validations_to_come_include_the_one_at_the_end(step: int, interval: Any, accumulate: int, left: int) -> None:
    assert validations_left(trainer_at(step, interval, accumulate)) == left
    assert validations_left(trainer_at(step, interval, accumulate, limit=0)) == 0


# ---------------------------------------------------------------- without a terminal


def test_no_time_is_left_after_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends after the step or the validation in which the limit was passed."""
    bar, timer = RunBar(), Timer("00:00:00:02")
    monkeypatch.setattr(bar.pace, "left", lambda steps, validations: 60.0)
    trainer = trainer_at(1, 20)
    trainer.callbacks = [timer]
    assert bar.state(trainer).left == 2.0
    monkeypatch.setattr(timer, "time_elapsed", lambda stage: 3.0)
    assert bar.state(trainer).left == 0.0


def test_a_run_whose_output_is_no_terminal_shows_its_progress_line_by_line(tmp_path: Path) -> None:
    """A pipe, a log file, a notebook: lines with steps, losses and the time left, and no control characters."""
    config = write_config(tmp_path, sample_text__max_new_tokens=10)
    process = start("fit", "--config", config, "--run_dir", tmp_path / "run")
    said = process.communicate(timeout=240)[1]
    assert process.returncode == 0, said
    lines = [line for line in said.splitlines() if re.match(r" *step +\d", line)]
    assert any(
        re.search(r"step +\d+ of 20 · loss \d\.\d{4}.* · \d:\d\d elapsed · \d:\d\d left", line) for line in lines
    )
    assert re.search(r"step 20 of 20 · loss \d\.\d{4} · val \d\.\d{4}", said)
    assert "  sample after step 20:" in said
    assert not [line for line in said.splitlines() if line != line.rstrip()], "no spaces at the end of a line"
    assert "\x1b" not in said
    assert "\r" not in said
