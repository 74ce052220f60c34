"""Faults during training: the newest checkpoint stays intact, and the error says how to resume."""

import errno
import io
import os
import pty
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
from command import Answer, At, digest, extra_callbacks, gptlit, load, report, start, write_config
from fault_injection import inject, table
from lightning.pytorch.callbacks import timer
from torch import Tensor

from gptlit import __main__
from gptlit.callbacks import signals
from gptlit.cli.streams import lasting_stderr
from gptlit.model.gpt import GPT
from gptlit.optim import MuonAdamW

HEADER = ("what happens", "exit code", "last line", "then")


def assert_resumes(situation: str, answer: Answer, run: Path, undisturbed: Path | None = None) -> None:
    """The command in the last line finishes the run, with the weights of `undisturbed` if given."""
    assert load(run / "last.ckpt")["global_step"] > 0
    last_line = answer.err.strip().splitlines()[-1]
    command = last_line.partition("resume with: gptlit ")[2].split()
    assert command[:3] == ["fit", "--ckpt_path", str(run)]
    after = gptlit(*command)
    assert after.code == 0, after.err
    assert load(run / "last.ckpt")["global_step"] == 20
    outcome = "resumed to the end"
    if undisturbed is not None:
        assert digest(run / "last.ckpt") == digest(undisturbed / "last.ckpt")
        outcome = "resumed, bit-exactly as the undisturbed run"
    report("Faults", HEADER, situation, answer.code, last_line.replace(str(run), "RUN"), outcome)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without faults."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert gptlit("fit", "--config", write_config(folder), "--run_dir", folder / "run").code == 0
    return folder / "run"


# ---------------------------------------------------------------- non-finite values


@contextmanager
def poisoned_logits(call: int, value: float) -> Iterator[None]:
    """Set one logit to `value` in the `call`-th forward pass in training mode."""
    head, calls = GPT.head, 0

    def poisoned(self: GPT, x: Tensor) -> Tensor:
        nonlocal calls
        logits = head(self, x)
        if self.training:
            calls += 1
            if calls == call:
                mask = torch.zeros_like(logits)
                mask[0, 0, 0] = value
                logits = logits + mask
        return logits

    with mock.patch.object(GPT, "head", poisoned):
        yield


class Watch(pl.Callback):
    """Copies the weights before the last step that started, and after the exception."""

    before: dict[str, Tensor]
    after: dict[str, Tensor]

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.before = {name: weight.clone() for name, weight in pl_module.network.state_dict().items()}

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self.after = {name: weight.clone() for name, weight in pl_module.network.state_dict().items()}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_non_finite_loss_stops_training_before_the_weights_change(
    tmp_path: Path, value: float, accumulate: int
) -> None:
    """In any micro-batch. The earlier checkpoint stays, and the message proposes a lower learning rate."""
    config, run = write_config(tmp_path, trainer__accumulate_grad_batches=accumulate), tmp_path / "run"
    watch = Watch()
    with extra_callbacks(watch), poisoned_logits(7 * accumulate + 1, value):
        answer = gptlit("fit", "--config", config, "--run_dir", run)
    assert answer.code == 1
    assert "at step 8" in answer.err
    assert "Traceback" not in answer.err
    assert load(run / "last.ckpt")["global_step"] == 5
    assert all(torch.equal(watch.after[key], watch.before[key]) for key in watch.before)
    assert "--model.optimizer.lr 0.0025 --model.optimizer.muon_lr 0.01" in answer.err
    assert_resumes(f"a logit is {value:g} (accumulation {accumulate})", answer, run)


def test_all_learning_rates_of_the_resume_command_are_halved(tmp_path: Path) -> None:
    config = write_config(tmp_path, model__optimizer__head_lr=0.04)
    with poisoned_logits(8, float("nan")):
        answer = gptlit("fit", "--config", config, "--run_dir", tmp_path / "run")
    rates = "--model.optimizer.lr 0.0025 --model.optimizer.head_lr 0.02 --model.optimizer.muon_lr 0.01"
    assert answer.err.endswith(f"resume with: gptlit fit --ckpt_path {tmp_path / 'run'} {rates}\n")


def test_non_finite_weights_are_never_saved(tmp_path: Path) -> None:
    """A finite loss may have non-finite gradients; the next checkpoint would overwrite the last usable one."""
    config, run = write_config(tmp_path, trainer__gradient_clip_val=None), tmp_path / "run"
    step, steps = MuonAdamW.step, 0

    def poisoned(self: MuonAdamW, closure: Any = None) -> Any:
        nonlocal steps
        steps += 1
        result = step(self, closure)
        if steps == 10:
            self.param_groups[0]["params"][0].data[0, 0] = float("nan")
        return result

    with mock.patch.object(MuonAdamW, "step", poisoned):
        answer = gptlit("fit", "--config", config, "--run_dir", run)
    assert answer.code == 1
    assert "the weights are not finite after step 10" in answer.err
    assert load(run / "last.ckpt")["global_step"] == 5
    assert_resumes("an optimizer step makes a weight nan", answer, run)


def test_a_non_finite_loss_in_the_first_step_leaves_no_folder(tmp_path: Path) -> None:
    """There is nothing to keep before the first step."""
    with poisoned_logits(1, float("nan")):
        answer = gptlit("fit", "--config", write_config(tmp_path), "--run_dir", tmp_path / "run")
    assert answer.code == 1
    assert "nothing was saved yet" in answer.err
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- the disk


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Restore the limit of the file size at the end; above it the kernel refuses a write, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def shrink_disk(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize("hook", ["on_before_zero_grad", "on_validation_start"])
def test_a_disk_that_is_full_when_a_checkpoint_is_written(tmp_path: Path, undisturbed: Path, hook: str) -> None:
    """At last.ckpt of step 10 or best.ckpt of step 12: the earlier files stay, and no partial file is left."""
    config, run = write_config(tmp_path, trainer__logger=False), tmp_path / "run"
    full = At(hook, 8 if hook == "on_before_zero_grad" else 12, lambda: shrink_disk(10_000))
    with extra_callbacks(full), largest_file(10_000):
        answer = gptlit("fit", "--config", config, "--run_dir", run)
    assert answer.code == 1
    assert "File too large" in answer.err
    assert "Traceback" not in answer.err
    assert not list(run.glob(".*.partial"))
    assert load(run / "last.ckpt")["global_step"] == (5 if hook == "on_before_zero_grad" else 10)
    file = "last.ckpt" if hook == "on_before_zero_grad" else "best.ckpt"
    assert_resumes(f"the disk is full when {file} is written", answer, run, undisturbed)


def test_a_disk_that_is_full_when_a_signal_comes(tmp_path: Path, undisturbed: Path) -> None:
    """Both are reported; the exit code is that of the signal."""
    config, run = write_config(tmp_path, trainer__logger=False), tmp_path / "run"

    def fail() -> None:
        shrink_disk(10_000)
        os.kill(os.getpid(), signal.SIGTERM)

    with extra_callbacks(At("on_before_zero_grad", 8, fail)), largest_file(10_000):
        answer = gptlit("fit", "--config", config, "--run_dir", run)
    assert answer.code == 143
    assert "last.ckpt could not be written" in answer.err
    assert_resumes("SIGTERM, and the disk is full", answer, run, undisturbed)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB; skips without the right to mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a file system needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_file_system(tmp_path: Path, tiny_disk: Path, undisturbed: Path) -> None:
    """With loggers and samples, whichever of them fails first."""
    config, run = write_config(tmp_path), tiny_disk / "run"

    def fill() -> None:
        with suppress(OSError), (tiny_disk / "filler").open("wb", buffering=0) as file:
            while file.write(b"0" * 1024):
                pass

    with extra_callbacks(At("on_before_zero_grad", 8, fill)):
        answer = gptlit("fit", "--config", config, "--run_dir", run)
    assert answer.code == 1
    assert "No space left on device" in answer.err
    assert "Traceback" not in answer.err
    (tiny_disk / "filler").unlink()
    assert_resumes("a file system of 400 kB is full", answer, run, undisturbed)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Make a folder read-only, also for root."""
    attribute = os.geteuid() == 0
    if attribute and subprocess.run(["chattr", "+i", str(folder)], capture_output=True, check=False).returncode:
        pytest.skip("this file system has no immutable folders")
    if not attribute:
        folder.chmod(0o500)
    try:
        yield
    finally:
        if attribute:
            subprocess.run(["chattr", "-i", str(folder)], check=True)
        else:
            folder.chmod(0o700)


def test_a_run_folder_that_becomes_read_only(tmp_path: Path, undisturbed: Path) -> None:
    """The permission is removed during training."""
    config, run = write_config(tmp_path, trainer__logger=False), tmp_path / "run"
    locks: list[Any] = []

    def lock() -> None:
        locks.append(read_only(run))
        locks[0].__enter__()

    try:
        with extra_callbacks(At("on_before_zero_grad", 8, lock)):
            answer = gptlit("fit", "--config", config, "--run_dir", run)
        assert answer.code == 1
        assert "Traceback" not in answer.err
        assert "not permitted" in answer.err or "denied" in answer.err
        again = gptlit("fit", "--ckpt_path", run)
        assert again.code == 2
        assert f"{run}: cannot be written to" in again.err
    finally:
        locks[0].__exit__(None, None, None)
    assert_resumes("the run folder loses its write permission", answer, run, undisturbed)


def test_a_machine_that_crashes_during_a_write(tmp_path: Path, undisturbed: Path) -> None:
    """The partial file is ignored and removed; the earlier file is intact."""
    config, run, dead = write_config(tmp_path), tmp_path / "run", tmp_path / "dead"
    fsync = os.fsync

    def die(descriptor: int) -> None:
        if (run / "last.ckpt").exists() and not dead.exists() and list(run.glob(".last.ckpt.*.partial")):
            shutil.copytree(run, dead)
            (half,) = dead.glob(".last.ckpt.*.partial")
            half.write_bytes(half.read_bytes()[:1000])
        fsync(descriptor)

    with mock.patch.object(os, "fsync", die):
        gptlit("fit", "--config", config, "--run_dir", run)
    assert list(dead.glob(".*.partial"))
    answer = gptlit("fit", "--ckpt_path", dead)
    assert answer.code == 0, answer.err
    assert not list(dead.glob(".*.partial"))
    assert digest(dead / "last.ckpt") == digest(undisturbed / "last.ckpt")
    report(
        "Faults", HEADER, "the machine crashes while last.ckpt is written", "-", "-", "resumed from the earlier file"
    )


# ---------------------------------------------------------------- SIGKILL


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_bit_exactly_the_same(tmp_path: Path) -> None:
    """A small part of `python tests/fault_injection.py`, in processes of its own."""
    trials = inject(tmp_path, kills=3, seed=int(os.environ.get("GPTLIT_SEED", "3")))
    assert sum(len(trial.killed) for trial in trials) == 3, "a run ended before it could be killed: make it longer"
    assert all(trial.equal for trial in trials), table(trials)


# ---------------------------------------------------------------- repeated signals


def test_a_second_signal_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Path) -> None:
    """During a step, which is discarded."""
    monkeypatch.setattr(signals, "REPEAT_SECONDS", -1.0)
    config, run = write_config(tmp_path), tmp_path / "run"

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with extra_callbacks(At("on_before_zero_grad", 8, twice)):
        answer = gptlit("fit", "--config", config, "--run_dir", run)
    assert answer.code == 130
    assert load(run / "last.ckpt")["global_step"] == 8
    assert_resumes("Ctrl-C twice", answer, run, undisturbed)


def test_a_signal_forwarded_by_a_launcher_does_not_stop_at_once(tmp_path: Path, undisturbed: Path) -> None:
    """As torchrun forwards the SIGINT that the terminal has already sent; the step is still finished."""
    config, run = write_config(tmp_path), tmp_path / "run"

    def both() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)

    with extra_callbacks(At("on_before_zero_grad", 8, both)):
        answer = gptlit("fit", "--config", config, "--run_dir", run)
    assert answer.code == 130
    assert load(run / "last.ckpt")["global_step"] == 9
    assert_resumes("SIGINT and SIGTERM at once", answer, run, undisturbed)


class Clock:
    """The clock of Lightning's Timer, which `trainer.max_time` adds; only `move` advances it."""

    seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds

    def move(self) -> None:
        self.seconds += 3600.0


def test_a_run_that_max_time_ended_resumes_with_the_printed_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Path
) -> None:
    """Exit code 0, but not "done"; neither the limit nor the elapsed time is carried into the resumed run."""
    config, run, clock = write_config(tmp_path), tmp_path / "run", Clock()
    monkeypatch.setattr(timer, "time", clock)
    with extra_callbacks(At("on_before_zero_grad", 7, clock.move)):
        answer = gptlit("fit", "--config", config, "--run_dir", run, "--trainer.max_time", "00:00:01:00")
    assert answer.code == 0
    assert "stopped after step 8 of 20" in answer.err
    assert load(run / "last.ckpt")["global_step"] == 8
    assert_resumes("trainer.max_time is reached", answer, run, undisturbed)


# ---------------------------------------------------------------- closed streams


class ClosedAfterOneLine(io.StringIO):
    """A stderr that is closed by its reader after the first line."""

    def write(self, text: str) -> int:
        if "\n" in self.getvalue():
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        return super().write(text)


def test_training_continues_when_the_reader_of_stderr_closes_it(tmp_path: Path, undisturbed: Path) -> None:
    """As with `gptlit fit 2>&1 | head`, a killed `tee`, or a full disk for the log."""
    config, run = write_config(tmp_path), tmp_path / "run"
    arguments = ["gptlit", "fit", "--config", str(config), "--run_dir", str(run)]
    with mock.patch.object(sys, "argv", arguments), redirect_stderr(ClosedAfterOneLine()) as seen:
        assert __main__.main() == 0
    assert seen.getvalue().count("\n") == 1
    assert digest(run / "last.ckpt") == digest(undisturbed / "last.ckpt")
    report("Faults", HEADER, "the reader of stderr closes it (`2>&1 | head`)", 0, "-", "trains to the end")


def test_a_process_without_a_stderr_can_print(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `2>&-`, sys.stderr is None."""
    monkeypatch.setattr(sys, "stderr", None)
    with lasting_stderr():
        print("not read", file=sys.stderr, flush=True)
        assert not sys.stderr.isatty()


def test_a_terminal_that_is_closed(tmp_path: Path) -> None:
    """SIGHUP, and every write to the terminal fails: the step is finished and saved."""
    config, run = write_config(tmp_path, trainer__max_steps=100_000, save_every_n_steps=50_000), tmp_path / "run"
    controller, terminal = pty.openpty()
    process = start("fit", "--config", config, "--run_dir", run, stderr=terminal, start_new_session=True)
    os.close(terminal)
    while not (run / "best.ckpt").is_file():
        assert process.poll() is None
        assert os.read(controller, 65536)  # a full buffer would block the writer
    os.close(controller)
    os.kill(process.pid, signal.SIGHUP)  # as the kernel does for the session's terminal
    assert process.wait(120) == 128 + signal.SIGHUP
    assert load(run / "last.ckpt")["global_step"] >= 6
    answer = gptlit("fit", "--ckpt_path", run, "--trainer.max_steps", 1 + load(run / "last.ckpt")["global_step"])
    assert answer.code == 0, answer.err
    report("Faults", HEADER, "the terminal is closed (SIGHUP)", 129, "-", "resumed to the end")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_training_leaves_no_folder(tmp_path: Path, number: signal.Signals) -> None:
    """While data is loaded or the Trainer is created."""
    kill = At("setup", 0, lambda: os.kill(os.getpid(), number))
    with extra_callbacks(kill):
        answer = gptlit("fit", "--config", write_config(tmp_path), "--run_dir", tmp_path / "run")
    assert answer.code == 128 + number
    assert answer.err.endswith("stopped before the first step: nothing was saved\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_validate_gives_its_exit_code(
    tmp_path: Path, undisturbed: Path, number: signal.Signals
) -> None:
    """Lightning would ignore SIGTERM there, and exit with 1 after SIGINT."""
    kill = At("on_validation_batch_start", 0, lambda: os.kill(os.getpid(), number))
    with extra_callbacks(kill):
        assert gptlit("validate", "--ckpt_path", undisturbed).code == 128 + number
