"""Processes that Lightning starts from the first one: signals before training, and the folder of the run."""

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.profilers import SimpleProfiler

import gptlit.cli
from gptlit.callbacks.checkpoints import RunCheckpoints
from gptlit.cli import exit_on_signals

NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(params=[False, True], ids=["first", "started"])
def started(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether Lightning has started this process."""
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    if request.param:
        monkeypatch.setenv("LOCAL_RANK", "1")
    return bool(request.param)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("connected", [False, True])
def test_a_signal_before_training_gives_the_exit_code_of_the_first_process(
    number: signal.Signals, connected: bool, started: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process that failed earlier made Lightning kill the first one: exit code 137, and a folder was left."""
    monkeypatch.setattr(gptlit.cli, "processes_are_connected", lambda: connected)
    reached = False
    code: Any = None
    try:
        with exit_on_signals():
            signal.raise_signal(number)
            reached = True
    except SystemExit as leaving:
        code = leaving.code
    assert reached == (started and not connected), "it waits until the first process can read its signal"
    assert code == (None if reached else 0 if started else 128 + number)


def test_an_error_after_the_first_process_has_left_is_not_shown(started: bool) -> None:
    """It lost the connection."""

    @exit_on_signals()
    def lose_connection() -> None:
        signal.raise_signal(signal.SIGINT)
        raise ConnectionError("closed by the other side")

    with pytest.raises(SystemExit) as leaving:
        lose_connection()
    assert leaving.value.code == (0 if started else 130)


def test_an_error_without_a_signal_is_shown(started: bool) -> None:
    with pytest.raises(ConnectionError), exit_on_signals():
        raise ConnectionError("closed by the other side")


@pytest.mark.parametrize("own", [False, True])
def test_the_profile_of_another_process_belongs_to_the_folder_of_the_first(tmp_path: Path, own: bool) -> None:
    """Under torchrun each process makes up a name; the report was added to an earlier run."""
    guess, run = tmp_path / "run", tmp_path / "run-2"
    profiler = SimpleProfiler(dirpath=tmp_path / "profiles" if own else guess)
    strategy = SimpleNamespace(broadcast=lambda name: str(run))
    trainer: Any = SimpleNamespace(strategy=strategy, profiler=profiler, is_global_zero=False)
    checkpoints = RunCheckpoints(guess, every_n_steps=100)
    checkpoints.setup(trainer, None, "fit")  # type: ignore[arg-type]
    assert checkpoints.run_dir == run
    assert profiler.dirpath == (tmp_path / "profiles" if own else run)
