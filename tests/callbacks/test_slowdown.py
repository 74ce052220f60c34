"""A run says once that its steps have become slow, and which command continues faster."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
from command import extra_callbacks, gptlit, write_config

from gptlit.callbacks.metrics import MetricsLogger, clock_stopped
from gptlit.callbacks.slowdown import LEAST_SECONDS, WINDOW_SECONDS, SlowdownNotice, Watch, add_window, slowdown_line
from gptlit.cli.fit.command import run_fit
from gptlit.cli.fit.plan import parse_fit

RUN = Path("my runs/base")
COMMAND = "Ctrl-C, then: gptlit fit --ckpt_path 'my runs/base' --threads 1"


def said_at(step_seconds: list[float]) -> list[int]:
    """Windows of 6 s after which a line is due; each has the given time of a step."""
    watch, said = Watch(), []
    for index, seconds in enumerate(step_seconds):
        watch = add_window(watch, max(1, round(6 / seconds)), seconds * max(1, round(6 / seconds)))
        if watch.due:
            said.append(index)
            watch = Watch(watch.best, watch.slow_windows, watch.slow_steps, watch.slow_seconds, said=True)
    return said


@pytest.mark.parametrize(
    ("paces", "said"),
    [
        ([0.059] * 50, []),
        ([0.059, *[0.225] * 20], [4]),  # once, after 24 s
        ([0.059, *[0.110] * 20], []),  # less than twice
        ([0.225, 0.225, *[0.059] * 10], []),  # slow at first, such as a warm-up
        ([0.059, 0.225, 0.225, 0.225, 0.059, 0.225, 0.225, 0.225, 0.059], []),  # short ones
        ([0.059, *[0.225] * 6, 0.059, *[0.225] * 6], [4, 11]),  # two episodes
        ([0.059, *[0.225] * 6, 0.115, *[0.225] * 6], [4]),  # it did not recover
        ([0.059, 3600.0, *[0.059] * 5], []),  # the process was stopped for an hour
        ([0.059, 0.080, 0.100, 0.115, 0.130, 0.150, 0.170, 0.200], [7]),  # slower and slower
    ],
)
def test_a_lasting_slowdown_is_said_once(paces: list[float], said: list[int]) -> None:
    assert said_at(paces) == said


def test_a_slowdown_of_long_steps_takes_several_of_them() -> None:
    """A step of a large model may take a minute: one is not enough."""
    assert said_at([60.0, 60.0, *[200.0] * 5]) == [4]


@pytest.mark.parametrize(
    ("best", "now", "text"),
    [(0.059, 0.225, "225 ms, 59 before"), (1.2, 4.0, "4,000 ms, 1,200 before"), (0.0014, 0.0046, "4.6 ms, 1.4 before")],
)
def test_the_line_names_both_times_and_the_command(best: float, now: float, text: str) -> None:
    watch = Watch(best, 4, 10, 10 * now)
    assert slowdown_line(watch, 2, RUN) == (
        f"a step takes {text}: another program seems to use the processor. {COMMAND}"
    )
    assert slowdown_line(watch, 16, RUN).endswith(" --threads 8")
    assert slowdown_line(watch, 3, RUN).endswith(" --threads 1")


# ---------------------------------------------------------------- the callback


class Clock:
    """Replaces time.perf_counter."""

    def __init__(self) -> None:
        self.value = 100.0

    def __call__(self) -> float:
        return self.value


class Run:
    """Callbacks of a run, called as the Trainer does, under a clock that stands still between steps."""

    def __init__(self, now: Clock, device: str = "cpu", world_size: int = 1) -> None:
        self.now = now
        self.curves = MetricsLogger()
        self.notice = SlowdownNotice(self.curves, RUN)
        self.first_half = False  # of a step's micro-batches
        strategy = SimpleNamespace(root_device=torch.device(device))
        self.trainer: Any = SimpleNamespace(
            callbacks=[self.curves],
            fit_loop=SimpleNamespace(_should_accumulate=lambda: self.first_half),
            global_step=0,
            world_size=world_size,
            strategy=strategy,
        )
        self.trainer.max_steps, self.trainer.log_every_n_steps = 10**9, 10**9
        self.notice.on_train_start(self.trainer, None)

    def steps(self, count: int, seconds: float) -> str:
        """Return what is printed during some steps of two micro-batches."""
        err = io.StringIO()
        with contextlib.redirect_stderr(err):
            for batch in range(2 * count):
                self.curves.on_train_batch_start(self.trainer, None, None, batch)
                self.now.value += seconds / 2
                self.first_half = batch % 2 == 0
                self.trainer.global_step += batch % 2
                for callback in (self.curves, self.notice):
                    callback.on_train_batch_end(self.trainer, None, None, None, batch)
        return err.getvalue()


@pytest.fixture
def now() -> Iterator[Clock]:
    clock = Clock()
    torch.set_num_threads(2)
    with mock.patch("gptlit.callbacks.metrics.time.perf_counter", clock):
        yield clock


def test_a_run_says_that_it_is_slow_once_in_each_episode(now: Clock) -> None:
    run = Run(now)
    assert run.steps(300, 0.06) == ""
    err = run.steps(300, 0.25)
    assert err.count("\n") == 1
    assert err.endswith(f" ms, 60 before: another program seems to use the processor. {COMMAND}\n")
    assert run.steps(300, 0.06) == ""
    assert COMMAND in run.steps(300, 0.25)


def test_time_outside_of_training_does_not_count(now: Clock) -> None:
    """Validations and checkpoints."""
    run = Run(now)
    for _ in range(20):
        assert run.steps(100, 0.06) == ""
        with clock_stopped(run.trainer):
            now.value += 600.0
        run.curves.on_validation_start(run.trainer, None)
        now.value += 600.0


@pytest.mark.parametrize(("device", "world_size", "threads"), [("cuda", 1, 2), ("cpu", 2, 2), ("cpu", 1, 1)])
def test_nothing_is_said_where_fewer_threads_would_not_help(
    now: Clock, device: str, world_size: int, threads: int
) -> None:
    torch.set_num_threads(threads)
    run = Run(now, device, world_size)
    assert run.steps(300, 0.06) + run.steps(300, 0.25) == ""


def test_a_slowdown_needs_some_seconds(now: Clock) -> None:
    run = Run(now)
    run.steps(300, 0.06)
    assert run.steps(int((LEAST_SECONDS - WINDOW_SECONDS) / 0.25), 0.25) == ""


def test_the_command_that_the_line_names_works(tmp_path: Path) -> None:
    """In a fit of slow steps: the clock of the run says so, no real time passes."""
    config, run = write_config(tmp_path, trainer__max_steps=16, trainer__val_check_interval=16), tmp_path / "run"
    torch.set_num_threads(2)
    clock = Clock()

    class Slow(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            clock.value += 6.0 if trainer.global_step < 4 else 60.0

    with mock.patch("gptlit.callbacks.metrics.time.perf_counter", clock), extra_callbacks(Slow()):
        answer = gptlit("fit", "--config", config, "--run_dir", run)
    assert answer.code == 0, answer.err
    (line,) = [line for line in answer.err.splitlines() if "another program" in line]
    assert line.startswith("a step takes 60,000 ms, 6,000 before: ")
    verb, *flags = line.partition("then: gptlit ")[2].split()
    answer = gptlit(verb, *flags, "--trainer.max_steps", 17)
    assert answer.code == 0, answer.err
    assert "changed: threads 2 -> 1\n" in answer.err


def test_a_quiet_run_says_nothing(tmp_path: Path) -> None:
    """`gptlit ladder` trains quietly."""
    seen: list[bool] = []

    class Look(pl.Callback):
        def on_train_start(self, trainer: Any, *_: Any) -> None:
            seen.append(any(isinstance(callback, SlowdownNotice) for callback in trainer.callbacks))

    flags = ["--config", str(write_config(tmp_path, trainer__max_steps=1))]
    for quiet in (True, False):
        run_fit(parse_fit([*flags, "--run_dir", str(tmp_path / str(quiet))]), [Look()], quiet=quiet)
    assert seen == [False, True]
