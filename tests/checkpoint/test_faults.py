"""Whatever goes wrong while a run trains: the newest good checkpoint stays whole, and the way on is said."""

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


def goes_on(situation: str, answer: Answer, run: Path, undisturbed: Path | None = None) -> None:
    """The command that the last line names leads to the end of the run, and to the undisturbed one's where given."""
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
        outcome = "resumed, bit for bit the undisturbed run"
    report("Faults", HEADER, situation, answer.code, last_line.replace(str(run), "RUN"), outcome)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert gptlit("fit", "--config", write_config(folder), "--run_dir", folder / "run").code == 0
    return folder / "run"


# ---------------------------------------------------------------- no numbers


@contextmanager
def poisoned_logits(call: int, value: float) -> Iterator[None]:
    """The call-th forward pass in training mode gives `value` for one logit."""
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
    """Keeps the weights as they were before the last step that was begun."""

    before: dict[str, Tensor]
    after: dict[str, Tensor]

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.before = {name: weight.clone() for name, weight in pl_module.network.state_dict().items()}

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self.after = {name: weight.clone() for name, weight in pl_module.network.state_dict().items()}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_that_is_no_number_stops_before_the_weights_are_touched(
    tmp_path: Path, value: float, accumulate: int
) -> None:
    """In any micro-batch; the older checkpoint stays, and a smaller rate is proposed."""
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
    goes_on(f"a logit is {value:g} (accumulation {accumulate})", answer, run)


def test_weights_that_are_no_numbers_are_never_saved(tmp_path: Path) -> None:
    """A finite loss may still have gradients that are not; the next file would overwrite the last good one."""
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
    goes_on("an optimizer step makes a weight nan", answer, run)


def test_a_loss_that_is_no_number_at_once_leaves_no_folder(tmp_path: Path) -> None:
    """Nothing was learned, so nothing is kept."""
    with poisoned_logits(1, float("nan")):
        answer = gptlit("fit", "--config", write_config(tmp_path), "--run_dir", tmp_path / "run")
    assert answer.code == 1
    assert "nothing was saved yet" in answer.err
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- the disk


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes meanwhile: the kernel refuses the write, as on a full disk."""
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
    """At last.ckpt of step 10 or best.ckpt of step 12: the files from before stay, and no part of a file is left."""
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
    goes_on(f"the disk is full when {file} is written", answer, run, undisturbed)


def test_a_disk_that_is_full_when_a_signal_comes(tmp_path: Path, undisturbed: Path) -> None:
    """Both are said; the exit code is the signal's."""
    config, run = write_config(tmp_path, trainer__logger=False), tmp_path / "run"

    def fail() -> None:
        shrink_disk(10_000)
        os.kill(os.getpid(), signal.SIGTERM)

    with extra_callbacks(At("on_before_zero_grad", 8, fail)), largest_file(10_000):
        answer = gptlit("fit", "--config", config, "--run_dir", run)
    assert answer.code == 143
    assert "last.ckpt could not be written" in answer.err
    goes_on("SIGTERM, and the disk is full", answer, run, undisturbed)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB, where the tests may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a file system needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_is_really_full(tmp_path: Path, tiny_disk: Path, undisturbed: Path) -> None:
    """With loggers and samples, whichever of them meets the end of the disk first."""
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
    goes_on("a file system of 400 kB is full", answer, run, undisturbed)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nothing can be made or changed in the folder, not even by root."""
    attribute = os.geteuid() == 0
    if attribute and subprocess.run(["chattr", "+i", str(folder)], capture_output=True, check=False).returncode:
        pytest.skip("this file system knows no immutable folders")
    if not attribute:
        folder.chmod(0o500)
    try:
        yield
    finally:
        if attribute:
            subprocess.run(["chattr", "-i", str(folder)], check=True)
        else:
            folder.chmod(0o700)


def test_a_folder_that_can_no_longer_be_written_to(tmp_path: Path, undisturbed: Path) -> None:
    """Rights were taken away while the run trained."""
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
        assert "the run folder cannot be written to" in again.err
    finally:
        locks[0].__exit__(None, None, None)
    goes_on("the run folder loses its write permission", answer, run, undisturbed)


def test_a_machine_that_dies_in_the_middle_of_a_write(tmp_path: Path, undisturbed: Path) -> None:
    """The half-written file is ignored and cleared away; the file from before is whole."""
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
    report("Faults", HEADER, "the machine dies while last.ckpt is written", "-", "-", "resumed from the file before")


# ---------------------------------------------------------------- SIGKILL


def test_killed_at_random_moments_a_run_ends_bit_for_bit_the_same(tmp_path: Path) -> None:
    """A small part of `python tests/fault_injection.py`, in processes of its own."""
    trials = inject(tmp_path, kills=3, seed=int(os.environ.get("GPTLIT_SEED", "3")))
    assert sum(len(trial.killed) for trial in trials) == 3, "a run ended before it could be killed: make it longer"
    assert all(trial.equal for trial in trials), table(trials)


# ---------------------------------------------------------------- impatience


def test_a_second_signal_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Path) -> None:
    """In the middle of a step, whose beginning is forgotten."""
    monkeypatch.setattr(signals, "REPEAT_SECONDS", -1.0)
    config, run = write_config(tmp_path), tmp_path / "run"

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with extra_callbacks(At("on_before_zero_grad", 8, twice)):
        answer = gptlit("fit", "--config", config, "--run_dir", run)
    assert answer.code == 130
    assert load(run / "last.ckpt")["global_step"] == 8
    goes_on("Ctrl-C twice", answer, run, undisturbed)


def test_the_same_signal_passed_on_by_a_launcher_is_not_impatience(tmp_path: Path, undisturbed: Path) -> None:
    """As torchrun passes on the SIGINT that the terminal has already sent: the step is finished all the same."""
    config, run = write_config(tmp_path), tmp_path / "run"

    def both() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)

    with extra_callbacks(At("on_before_zero_grad", 8, both)):
        answer = gptlit("fit", "--config", config, "--run_dir", run)
    assert answer.code == 130
    assert load(run / "last.ckpt")["global_step"] == 9
    goes_on("SIGINT and SIGTERM at once", answer, run, undisturbed)


class Clock:
    """The clock of Lightning's Timer, which `trainer.max_time` adds; it stands still until it is moved."""

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
    goes_on("trainer.max_time is over", answer, run, undisturbed)


# ---------------------------------------------------------------- nobody listens


class Gone(io.StringIO):
    """A stderr whose reader goes away after its first line."""

    def write(self, text: str) -> int:
        if "\n" in self.getvalue():
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        return super().write(text)


def test_a_run_does_not_end_because_nobody_reads_what_it_says(tmp_path: Path, undisturbed: Path) -> None:
    """`gptlit fit 2>&1 | head`, a tee that was killed, a full disk under the log."""
    config, run = write_config(tmp_path), tmp_path / "run"
    arguments = ["gptlit", "fit", "--config", str(config), "--run_dir", str(run)]
    with mock.patch.object(sys, "argv", arguments), redirect_stderr(Gone()) as seen:
        assert __main__.main() == 0
    assert seen.getvalue().count("\n") == 1
    assert digest(run / "last.ckpt") == digest(undisturbed / "last.ckpt")
    report("Faults", HEADER, "the reader of stderr goes away (`2>&1 | head`)", 0, "-", "trains on to its end")


def test_a_process_that_was_started_without_a_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    """`2>&-`: Python then has None there."""
    monkeypatch.setattr(sys, "stderr", None)
    with lasting_stderr():
        print("nobody reads this", file=sys.stderr, flush=True)
        assert not sys.stderr.isatty()


def test_a_terminal_that_is_closed(tmp_path: Path) -> None:
    """SIGHUP, and every write to the terminal fails: the step is finished and saved."""
    config, run = write_config(tmp_path, trainer__max_steps=100_000, save_every_n_steps=50_000), tmp_path / "run"
    ours, theirs = pty.openpty()
    process = start("fit", "--config", config, "--run_dir", run, stderr=theirs, start_new_session=True)
    os.close(theirs)
    while not (run / "best.ckpt").is_file():
        assert process.poll() is None
        assert os.read(ours, 65536)  # what is not read would stop the writer
    os.close(ours)
    os.kill(process.pid, signal.SIGHUP)  # as the kernel does, when it is the terminal that the session belongs to
    assert process.wait(120) == 128 + signal.SIGHUP
    assert load(run / "last.ckpt")["global_step"] >= 6
    answer = gptlit("fit", "--ckpt_path", run, "--trainer.max_steps", 1 + load(run / "last.ckpt")["global_step"])
    assert answer.code == 0, answer.err
    report("Faults", HEADER, "the terminal is closed (SIGHUP)", 129, "-", "resumed to the end")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_training_leaves_no_folder(tmp_path: Path, number: signal.Signals) -> None:
    """While the data is loaded or the Trainer is made."""
    kill = At("setup", 0, lambda: os.kill(os.getpid(), number))
    with extra_callbacks(kill):
        answer = gptlit("fit", "--config", write_config(tmp_path), "--run_dir", tmp_path / "run")
    assert answer.code == 128 + number
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_validating_an_old_run(tmp_path: Path, undisturbed: Path, number: signal.Signals) -> None:
    """Lightning would ignore SIGTERM there, and exit with 1 after SIGINT."""
    kill = At("on_validation_batch_start", 0, lambda: os.kill(os.getpid(), number))
    with extra_callbacks(kill):
        assert gptlit("validate", "--ckpt_path", undisturbed).code == 128 + number
