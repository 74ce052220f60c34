"""A run that was killed, stopped or crashed and then resumed ends bit-exactly like an undisturbed run."""

import csv
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
import yaml
from command import At, digest, extra_callbacks, gptlit, load, report, tensors, write_config
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateMonitor
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gptlit import GPTConfig, LitGPT, OptimizerConfig, TextDataModule
from gptlit.checkpoint.run_dir import RunDir
from gptlit.cli.fit.resume import is_plain
from gptlit.optim import MuonAdamW

FAULTS = ("what happens", "exit code", "last line", "then")
EXACT = "resumed, bit-exactly as the undisturbed run"
VARIANTS: dict[str, dict[str, Any]] = {
    "muon, dropout": {},
    "adamw, accumulation": {"model__optimizer__name": "adamw", "trainer__accumulate_grad_batches": 2},
}


def metrics(run: Path) -> list[dict[str, str]]:
    """Return the rows of metrics.csv, without columns that depend on time."""
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in csv.DictReader(file)]


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Return TensorBoard's scalars, read with its own reader, without those that depend on time."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if not tag.startswith("perf/")
    }


def assert_same(run: Path, undisturbed: Path) -> None:
    """Equal weights, optimizer states, best file, table and curves; no value twice, none missing."""
    assert digest(run / "last.ckpt") == digest(undisturbed / "last.ckpt")
    assert digest(run / "best.ckpt") == digest(undisturbed / "best.ckpt")
    assert metrics(run) == metrics(undisturbed)
    assert curves(run) == curves(undisturbed)


def undisturbed_run(folder: Path, **changes: Any) -> tuple[Path, Path]:
    """Return the configuration and folder of an undisturbed run."""
    config = write_config(folder, **changes)
    assert gptlit("fit", "--config", config, "--run_dir", folder / "run").code == 0
    return config, folder / "run"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The undisturbed run with Muon and dropout."""
    return undisturbed_run(tmp_path_factory.mktemp("reference"))


# ---------------------------------------------------------------- killed

# Where in the loop, and steps done: last.ckpt is written after 5, 10, 15 and 20, validations follow 6, 12, 18 and 20.
KILLED = ("run", "killed in (hook-step)", "after resuming, against the undisturbed run")
MOMENTS = [
    ("on_before_zero_grad", 5),
    ("on_before_optimizer_step", 5),
    ("on_train_batch_end", 6),
    ("on_validation_start", 6),
    ("on_validation_batch_end", 12),
    ("on_validation_end", 12),
    ("on_train_batch_start", 12),
    ("on_before_zero_grad", 17),
    ("on_validation_batch_start", 18),
    ("on_train_batch_end", 20),
    ("on_validation_batch_start", 20),
    ("on_train_end", 20),
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_killed_at_any_moment_and_resumed_ends_bit_exactly_the_same(variant: str, tmp_path: Path) -> None:
    """A copy of the folder at a moment is what SIGKILL would leave; each copy is resumed."""
    (tmp_path / "undisturbed").mkdir()
    config, undisturbed = undisturbed_run(tmp_path / "undisturbed", **VARIANTS[variant])
    run = tmp_path / "run"
    copies = [tmp_path / f"{hook}-{step}" for hook, step in MOMENTS]
    snapshots = [
        At(hook, step, lambda copy=copy: shutil.copytree(run, copy))
        for (hook, step), copy in zip(MOMENTS, copies, strict=True)
    ]
    with extra_callbacks(*snapshots):
        assert gptlit("fit", "--config", config, "--run_dir", run).code == 0
    assert_same(run, undisturbed)
    for copy in copies:
        answer = gptlit("fit", "--ckpt_path", copy)
        assert answer.code == 0, answer.err
        assert_same(copy, undisturbed)
        report("Killed and resumed", KILLED, variant, copy.name, "same weights, optimizer state, metrics and curves")


def test_a_resumed_run_may_be_killed_and_resumed_again(reference, tmp_path) -> None:
    """Guards against state that survives one resume and not two."""
    config, undisturbed = reference
    first, second, run = tmp_path / "first", tmp_path / "second", tmp_path / "run"
    with extra_callbacks(At("on_train_batch_end", 7, lambda: shutil.copytree(run, first))):
        gptlit("fit", "--config", config, "--run_dir", run)
    with extra_callbacks(At("on_train_batch_end", 13, lambda: shutil.copytree(first, second))):
        gptlit("fit", "--ckpt_path", first)
    assert gptlit("fit", "--ckpt_path", second).code == 0
    assert_same(second, undisturbed)


# ---------------------------------------------------------------- stopped


@pytest.mark.parametrize(
    ("hook", "step", "stops_after"),
    [
        ("on_train_batch_start", 3, 4),
        ("on_before_zero_grad", 9, 10),
        ("on_train_batch_end", 12, 12),
        ("on_validation_batch_start", 12, 12),
        ("on_validation_end", 12, 13),
        ("on_validation_batch_start", 20, 20),
    ],
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_gives_its_exit_code(
    reference, tmp_path, hook: str, step: int, stops_after: int, number: signal.Signals
) -> None:
    """In a step; before, in and after a validation; in the last step: exit code 128 + n, and resuming ends the same."""
    config, undisturbed = reference
    run = tmp_path / "run"
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with extra_callbacks(At(hook, step, lambda: os.kill(os.getpid(), number))):
        answer = gptlit("fit", "--config", config, "--run_dir", run)
    assert answer.code == 128 + number
    assert f"stopped by {number.name}" in answer.err
    assert f"gptlit fit --ckpt_path {run}" in answer.err
    assert load(run / "last.ckpt")["global_step"] == stops_after
    assert gptlit("fit", "--ckpt_path", run).code == 0
    assert_same(run, undisturbed)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    way_on = answer.err.strip().splitlines()[-1].replace(str(run), "RUN")
    report("Faults", FAULTS, f"{number.name} in `{hook}` after step {step}", answer.code, way_on, EXACT)


def test_a_signal_after_the_last_step_still_gives_its_exit_code(reference, tmp_path) -> None:
    """The run is complete and says so, but `gptlit fit … && …` stops, as the user wanted."""
    config, undisturbed = reference
    run = tmp_path / "run"
    with extra_callbacks(At("on_train_end", 20, lambda: os.kill(os.getpid(), signal.SIGINT))):
        answer = gptlit("fit", "--config", config, "--run_dir", run)
    assert answer.code == 130
    assert "done" in answer.err
    assert_same(run, undisturbed)


def test_a_signal_that_the_shell_ignores_stays_ignored(reference, tmp_path) -> None:
    """As for runs started with `nohup`, or with `&` in a script."""
    config, undisturbed = reference
    run = tmp_path / "run"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with extra_callbacks(At("on_train_batch_start", 3, lambda: os.kill(os.getpid(), signal.SIGINT))):
            assert gptlit("fit", "--config", config, "--run_dir", run).code == 0
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert_same(run, undisturbed)


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_batch_end", "on_before_optimizer_step"])
def test_an_exception_in_a_callback_keeps_its_traceback_and_loses_nothing(reference, tmp_path, hook: str) -> None:
    """The last complete step is saved, and the error is raised."""
    config, undisturbed = reference
    run = tmp_path / "run"

    def fail() -> None:
        raise RuntimeError("a callback failed")

    with extra_callbacks(At(hook, 8, fail)), pytest.raises(RuntimeError, match="a callback failed"):
        gptlit("fit", "--config", config, "--run_dir", run)
    assert load(run / "last.ckpt")["global_step"] == 8
    assert gptlit("fit", "--ckpt_path", run).code == 0
    assert_same(run, undisturbed)
    report("Faults", FAULTS, f"an exception in `{hook}` of a callback after step 8", 1, "traceback", EXACT)


def test_an_exception_at_the_end_of_a_validation_loses_nothing(reference, tmp_path) -> None:
    """Both files are written first; the validation counts as made, so that its metrics are not logged twice."""
    config, undisturbed = reference
    run = tmp_path / "run"

    def fail() -> None:
        raise RuntimeError("a callback failed")

    with extra_callbacks(At("on_validation_end", 12, fail)), pytest.raises(RuntimeError, match="a callback failed"):
        gptlit("fit", "--config", config, "--run_dir", run)
    assert load(run / "last.ckpt")["global_step"] == 12
    assert load(run / "best.ckpt")["global_step"] == 12
    assert gptlit("fit", "--ckpt_path", run).code == 0
    assert_same(run, undisturbed)


def test_an_interruption_inside_an_optimizer_step_keeps_the_older_file(tmp_path) -> None:
    """Partially updated weights must never be saved."""
    config, run = write_config(tmp_path), tmp_path / "run"
    full_step, steps = MuonAdamW._step_adamw, 0

    def cut_off(self: MuonAdamW, group: dict[str, Any]) -> None:
        nonlocal steps
        steps += 1
        if steps == 8:  # Muon's weights are new by now, AdamW's are old
            raise SystemExit(130)  # as a second Ctrl-C does
        full_step(self, group)

    with mock.patch.object(MuonAdamW, "_step_adamw", cut_off):
        assert gptlit("fit", "--config", config, "--run_dir", run).code == 130
    assert load(run / "last.ckpt")["global_step"] == 5


def test_lightnings_averaged_weights_are_restored_exactly(tmp_path) -> None:
    """Lightning's EMA keeps two sets of weights and swaps them during validation; both must survive a kill."""
    config = write_config(tmp_path)
    runs = {name: tmp_path / name for name in ("undisturbed", "killed", "stopped")}
    with extra_callbacks(
        EMAWeightAveraging(decay=0.9),
        At("on_train_batch_end", 13, lambda: shutil.copytree(runs["undisturbed"], runs["killed"])),
    ):
        assert gptlit("fit", "--config", config, "--run_dir", runs["undisturbed"]).code == 0
    stop = At("on_validation_batch_start", 12, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with extra_callbacks(EMAWeightAveraging(decay=0.9), stop):
        assert gptlit("fit", "--config", config, "--run_dir", runs["stopped"]).code == 143
    for name in ("killed", "stopped"):
        with extra_callbacks(EMAWeightAveraging(decay=0.9)):
            assert gptlit("fit", "--ckpt_path", runs[name]).code == 0
        assert_same(runs[name], runs["undisturbed"])


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_our_averaged_weights_are_restored_exactly(tmp_path, precision: str) -> None:
    """A longer run continues from the trained weights, not from their average."""
    changes = {"average__decay": 0.9, "model__gpt__token_noise": 0.1, "trainer__precision": precision}
    config, killed = write_config(tmp_path, **changes), tmp_path / "killed"
    constant = ("--model.schedule.shape", "constant")
    undisturbed, short = tmp_path / "undisturbed", tmp_path / "short"
    with extra_callbacks(At("on_train_batch_end", 13, lambda: shutil.copytree(undisturbed, killed))):
        assert gptlit("fit", "--config", config, "--run_dir", undisturbed, *constant).code == 0
    assert gptlit("fit", "--ckpt_path", killed).code == 0
    assert_same(killed, undisturbed)
    assert gptlit("fit", "--config", config, "--run_dir", short, *constant, "--trainer.max_steps", 12).code == 0
    assert gptlit("fit", "--ckpt_path", short, "--trainer.max_steps", 20).code == 0
    assert digest(short / "last.ckpt") == digest(undisturbed / "last.ckpt")


def test_resuming_without_the_average_continues_from_the_trained_weights(tmp_path) -> None:
    """Guards against weights and optimizer state that do not belong together."""
    config, run, plain = write_config(tmp_path, average__decay=0.9), tmp_path / "run", tmp_path / "plain"
    steps = ("--model.schedule.shape", "constant", "--trainer.max_steps")
    for folder, decay in ((run, 0.9), (plain, 0.0)):
        fit = ("fit", "--config", config, "--run_dir", folder, "--average.decay", decay)
        assert gptlit(*fit, *steps, 10).code == 0
        assert gptlit("fit", "--ckpt_path", folder, "--average.decay", 0.0, "--trainer.max_steps", 14).code == 0
    assert digest(run / "last.ckpt") == digest(plain / "last.ckpt")


def test_a_callback_whose_settings_name_no_code_is_restored() -> None:
    """Names of a metric, a folder or a file are safe; any other string may name a function."""
    early = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "val/loss"}}
    assert is_plain([early])
    assert is_plain({**early, "init_args": {"dirpath": "a/b.c", "filename": "{epoch}"}})
    assert not is_plain({**early, "init_args": {"batch_size_fn": "os.system"}})
    assert not is_plain({"class_path": "mine.Own"})


def test_for_a_missing_corpus_the_error_asks_for_its_new_path(tmp_path, monkeypatch) -> None:
    """A relative path in a checkpoint is not valid in another folder; the error must say where the path came from."""
    config = write_config(tmp_path, trainer__max_steps=2)
    monkeypatch.chdir(tmp_path)
    assert gptlit("fit", "--config", config, "--run_dir", "run", "--data.corpus", "text.txt").code == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    answer = gptlit("fit", "--ckpt_path", tmp_path / "run", "--trainer.max_steps", 4)
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert answer.err.endswith(
        "(the name is the checkpoint's, as seen from here; if it has moved, add --data.corpus NEW_PLACE)\n"
    )


def test_a_run_in_the_current_folder_gets_a_folder_name(tmp_path, monkeypatch) -> None:
    """`--run_dir .` has no name of its own to append a number to."""
    (tmp_path / "here").mkdir()
    config = write_config(tmp_path / "here", trainer__max_steps=2)
    monkeypatch.chdir(tmp_path / "here")
    assert gptlit("fit", "--config", config, "--run_dir", ".").code == 0
    assert (tmp_path / "here-2" / "last.ckpt").is_file()


def test_the_best_checkpoint_holds_the_average_that_was_validated(tmp_path) -> None:
    """Guards against a loss of other weights than those in the file."""
    config, run = write_config(tmp_path, average__decay=0.9), tmp_path / "run"
    assert gptlit("fit", "--config", config, "--run_dir", run).code == 0
    best = load(run / "best.ckpt")
    assert any((best["state_dict"][name] != w).any() for name, w in best["current_model_state"].items())
    logged = min(float(row["val/loss"]) for row in metrics(run) if row["val/loss"])
    answer = gptlit("validate", "--ckpt_path", run)
    assert float(answer.out.split()[1]) == pytest.approx(logged, abs=1e-6)


def test_the_closing_lines_of_a_resumed_run(tmp_path) -> None:
    """The speed is that of the batches of this start, and bits per character need no validation in it."""
    bpe = {"data__tokenizer": "bpe", "data__vocab_size": 280}
    config, run = write_config(tmp_path, trainer__max_steps=12, trainer__log_every_n_steps=1, **bpe), tmp_path / "run"
    first = gptlit("fit", "--config", config, "--run_dir", run)
    larger = ("--data.batch_size", 600, "--trainer.max_steps", 14, "--trainer.limit_val_batches", 0)
    resumed = gptlit("fit", "--ckpt_path", run, *larger)
    assert (first.code, resumed.code) == (0, 0), resumed.err
    bits = [re.findall(r"nats per token, (\S+) bits per character", answer.err) for answer in (first, resumed)]
    assert len(bits[0]) == 1
    assert bits[0] == bits[1]
    lowest = min(float(row["val/bpc"]) for row in metrics(run) if row["val/bpc"])
    assert float(bits[0][0]) == pytest.approx(lowest, abs=1e-4)
    speed = float(re.findall(r"\(([\d,]+) characters/s since it was resumed\)", resumed.err)[0].replace(",", ""))
    with (run / "metrics.csv").open(encoding="utf-8", newline="") as file:
        of_steps = [row["perf/characters_per_second"] for row in csv.DictReader(file) if int(row["step"]) > 12]
    assert speed <= 1.001 * max(map(float, filter(None, of_steps)))


def test_another_callback_logs_the_same_after_resuming(tmp_path) -> None:
    """LearningRateMonitor logs before the first step, which must not change the row of the last step."""
    config, run, cut = write_config(tmp_path), tmp_path / "run", tmp_path / "cut"
    killed = At("on_train_batch_end", 13, lambda: shutil.copytree(run, cut))
    with extra_callbacks(LearningRateMonitor("step"), killed):
        assert gptlit("fit", "--config", config, "--run_dir", run).code == 0
    with extra_callbacks(LearningRateMonitor("step")):
        assert gptlit("fit", "--ckpt_path", cut).code == 0
    assert "lr-MuonAdamW/pg1" in metrics(run)[0]
    assert metrics(cut) == metrics(run)


# ---------------------------------------------------------------- settings that may change, and settings that may not


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after 10 of 20 steps; tests work on copies."""
    folder = tmp_path_factory.mktemp("half")
    config = write_config(folder, model__gpt__dropout=0.0)
    with extra_callbacks(At("on_before_zero_grad", 9, lambda: os.kill(os.getpid(), signal.SIGTERM))):
        assert gptlit("fit", "--config", config, "--run_dir", folder / "run").code == 143
    return folder / "run"


@pytest.fixture
def copy(half: Path, tmp_path: Path) -> Path:
    """A copy of the stopped run, with its text next to it."""
    shutil.copytree(half, tmp_path / "run")
    return tmp_path / "run"


def test_a_larger_max_steps_is_obeyed_and_reported(copy: Path) -> None:
    """Guards against a flag that is silently overwritten by the checkpoint's settings."""
    answer = gptlit("fit", "--ckpt_path", copy, "--trainer.max_steps", 24)
    assert answer.code == 0
    assert "changed: trainer.max_steps 20 -> 24" in answer.err
    assert load(copy / "last.ckpt")["global_step"] == 24
    assert [int(row["step"]) for row in metrics(copy)] == list(range(25))


def test_another_accumulation_is_obeyed_and_reported(copy: Path, half: Path, tmp_path: Path) -> None:
    """The global batches are the same, so the losses are equal up to rounding."""
    shutil.copytree(half, tmp_path / "undisturbed")
    gptlit("fit", "--ckpt_path", tmp_path / "undisturbed")
    answer = gptlit("fit", "--ckpt_path", copy, "--trainer.accumulate_grad_batches", 4)
    assert answer.code == 0
    assert "changed: trainer.accumulate_grad_batches 1 -> 4" in answer.err
    for changed, undisturbed in zip(metrics(copy)[1:], metrics(tmp_path / "undisturbed")[1:], strict=True):
        assert float(changed["train/loss"]) == pytest.approx(float(undisturbed["train/loss"]), rel=1e-5)
        assert bool(changed["val/loss"]) == bool(undisturbed["val/loss"])


def test_a_given_learning_rate_overrides_the_saved_one(copy: Path) -> None:
    """By default torch restores the learning rates of the saved optimizer silently."""
    answer = gptlit("fit", "--ckpt_path", copy, "--model.optimizer.lr", 1e-3, "--model.schedule.shape", "constant")
    assert "changed: model.optimizer.lr 0.005 -> 0.001" in answer.err
    after = [row for row in metrics(copy) if int(row["step"]) > 10]
    assert {float(row["lr/adamw"]) for row in after} == {1e-3}
    assert {float(row["lr/muon"]) for row in after} == {0.02}


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--model.gpt.n_layer", "2"], "model.gpt.n_layer is 2"),
        (["--model.gpt.vocab_size", "50"], "model.gpt.vocab_size is 50"),
        (["--model.gpt.activation", "gelu"], "model.gpt.activation is 'gelu'"),
        (["--model.optimizer.name", "adamw"], "model.optimizer.name is 'adamw'"),
        (["--model.optimizer.head_lr", "0.001"], "model.optimizer.head_lr is 0.001, but the checkpoint was trained"),
        (["--data.tokenizer", "bpe"], "data.tokenizer is 'bpe'"),
        (["--data.val_fraction", "0.2"], "data.val_fraction"),
        (["--data.corpus", "sample"], "data.corpus"),
    ],
)
def test_a_setting_that_does_not_fit_the_weights_is_refused_by_name(half: Path, flags: list[str], name: str) -> None:
    """One line, exit code 2; the run is unchanged."""
    before = {path: path.stat().st_mtime_ns for path in half.rglob("*")}
    answer = gptlit("fit", "--ckpt_path", half, *flags)
    assert answer.code == 2
    assert name in answer.err
    assert answer.err.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in half.rglob("*")} == before


def test_the_rate_of_the_head_can_be_changed_but_not_dropped(tmp_path: Path) -> None:
    """Without it the head belongs to another group, so that its moments would be lost."""
    config, run = write_config(tmp_path, model__optimizer__head_lr=1e-3, trainer__max_steps=2), tmp_path / "run"
    assert gptlit("fit", "--config", config, "--run_dir", run).code == 0
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    again = ("fit", "--ckpt_path", run, "--trainer.max_steps", 4, "--model.optimizer.head_lr")
    answer = gptlit(*again, "null")
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert "model.optimizer.head_lr is null, but the checkpoint was trained with 0.001" in answer.err
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    answer = gptlit(*again, "0.002")
    assert answer.code == 0, answer.err
    assert "changed: model.optimizer.head_lr 0.001 -> 0.002" in answer.err


def test_a_run_from_python_resumes_with_the_settings_in_its_file(tmp_path: Path) -> None:
    """Seed, precision of matmuls, recomputation and teachers were replaced by the defaults without a line."""
    text = write_config(tmp_path).with_name("text.txt")
    places = {"first": tmp_path / "first.ckpt", "second": tmp_path / "second.ckpt"}
    learning = {"teachers": [str(places["first"])], "teacher_weight": 0.3}
    of_model: dict[str, Any] = {"matmul_precision": "medium", "checkpoint_activations": True}
    for name, more in (("first", {}), ("second", learning)):
        gpt = GPTConfig(block_size=16, n_layer=1, n_head=2, n_embd=16, dropout=0.3)
        model = LitGPT(gpt, OptimizerConfig("adamw", lr=5e-3), seed=7, **of_model, **more)
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        trainer = pl.Trainer(accelerator="cpu", max_steps=2, limit_val_batches=0, **quiet)
        trainer.fit(model, datamodule=TextDataModule(str(text), block_size=16, batch_size=8, seed=7))
        trainer.save_checkpoint(places[name])
    flags = ("--data.corpus", text, "--data.batch_size", 8, "--trainer.max_steps", 4, "--trainer.accelerator", "cpu")
    quiet_flags = ("--sample_text.max_new_tokens", 0, "--pictures.when", "never")
    run = tmp_path / "run"
    answer = gptlit("fit", "--ckpt_path", places["second"], "--run_dir", run, *flags, *quiet_flags)
    assert answer.code == 0, answer.err
    checkpoint = load(run / "last.ckpt")
    settings = yaml.safe_load(checkpoint["gptlit"]["config"])
    model_settings = settings["model"]
    assert settings["seed_everything"] == checkpoint["hyper_parameters"]["seed"] == 7
    assert {name: model_settings[name] for name in (of_model | learning)} == of_model | learning
    assert (model_settings["gpt"]["dropout"], model_settings["optimizer"]["lr"]) == (0.3, 5e-3)
    assert "changed: " not in answer.err


def test_a_moved_corpus_is_accepted(copy: Path, half: Path) -> None:
    """Another path with the same content is the same text."""
    text = copy.parent / "moved.txt"
    text.write_bytes((half.parent / "text.txt").read_bytes())
    assert gptlit("fit", "--ckpt_path", copy, "--data.corpus", text).code == 0


def test_an_edited_corpus_is_refused(copy: Path, half: Path) -> None:
    """With one character changed, the batches would differ from those of the run."""
    text = copy.parent / "edited.txt"
    content = (half.parent / "text.txt").read_text(encoding="utf-8")
    text.write_text(content.replace("e", "a", 1), encoding="utf-8")
    answer = gptlit("fit", "--ckpt_path", copy, "--data.corpus", text)
    assert answer.code == 2
    assert "is not the text that the checkpoint was trained on" in answer.err


def test_a_finished_run_is_reported_and_left_unchanged(reference) -> None:
    """Exit code 0; the message names the flag for more steps; no file changes."""
    _, run = reference
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    answer = gptlit("fit", "--ckpt_path", run)
    assert answer.code == 0
    assert "nothing is left to do" in answer.err
    assert "--trainer.max_steps" in answer.err
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_an_earlier_checkpoint_resumes_in_a_new_folder(copy: Path) -> None:
    """Resuming from best.ckpt must not overwrite the later last.ckpt."""
    last = digest(copy / "last.ckpt")
    answer = gptlit("fit", "--ckpt_path", copy / "best.ckpt")
    assert answer.code == 0
    assert digest(copy / "last.ckpt") == last
    assert load(copy.with_name("run-2") / "last.ckpt")["global_step"] == 20
    assert (copy.with_name("run-2") / "best.ckpt").is_file()


def test_a_run_resumes_from_best_when_it_is_newer_than_last(reference, tmp_path) -> None:
    """After a kill between best.ckpt of step 12 and the next last.ckpt, no step before 12 is repeated."""
    config, undisturbed = reference
    run, copy = tmp_path / "run", tmp_path / "copy"
    with extra_callbacks(At("on_train_batch_end", 13, lambda: shutil.copytree(run, copy))):
        gptlit("fit", "--config", config, "--run_dir", run)
    assert load(copy / "last.ckpt")["global_step"] == 10
    answer = gptlit("fit", "--ckpt_path", copy)
    assert f"resuming from step 12 of {copy / 'best.ckpt'}" in answer.err
    assert_same(copy, undisturbed)


def test_a_second_process_cannot_train_the_same_run(copy: Path) -> None:
    """They would overwrite each other's checkpoints."""
    folder = RunDir.reopen(copy)
    try:
        answer = gptlit("fit", "--ckpt_path", copy)
        assert answer.code == 2
        assert "another process is training this run" in answer.err
    finally:
        folder.close()
    assert gptlit("fit", "--ckpt_path", copy).code == 0


def test_a_checkpoint_cannot_choose_the_code_that_runs(copy: Path, tmp_path: Path) -> None:
    """A setting that names a class is dropped with a message; the user can give it again."""
    module, proof = tmp_path / "intruder.py", tmp_path / "proof"
    module.write_text(f"open({str(proof)!r}, 'w').close()\nclass Callback: pass\n")
    checkpoint = torch.load(copy / "last.ckpt", weights_only=True)
    config = checkpoint["gptlit"]["config"].replace("callbacks: null", "callbacks: [{class_path: intruder.Callback}]")
    assert "intruder" in config
    checkpoint["gptlit"]["config"] = config
    torch.save(checkpoint, copy / "last.ckpt")
    with mock.patch.object(sys, "path", [str(tmp_path), *sys.path]):
        answer = gptlit("fit", "--ckpt_path", copy)
    assert answer.code == 0
    assert "of the checkpoint is left out: it may name code" in answer.err
    assert not proof.exists()


# ---------------------------------------------------------------- settings without influence on the weights


class Keep(pl.Callback):
    """Keeps the final weights."""

    weights: tuple[torch.Tensor, ...] = ()

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.weights = tuple(tensor.clone() for _, tensor in tensors(pl_module.network.state_dict()))


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Keep]:
    """Configuration and final weights of the run with default settings."""
    kept = Keep()
    with extra_callbacks(kept):
        config, _ = undisturbed_run(tmp_path_factory.mktemp("watched"))
    return config, kept


@pytest.mark.parametrize(
    "flags",
    [
        ["--trainer.logger", "false"],
        ["--trainer.enable_progress_bar", "false"],
        ["--trainer.enable_checkpointing", "false"],
        ["--trainer.log_every_n_steps", "7"],
        ["--trainer.val_check_interval", "4"],
        ["--trainer.limit_val_batches", "0"],
        ["--sample_text.max_new_tokens", "20"],
        ["--data.estimate_batches", "3"],
        ["--save_every_n_steps", "3"],
    ],
    ids=lambda flags: f"{flags[0]} {flags[1]}",
)
def test_watching_a_run_does_not_change_it(flags: list[str], watched: tuple[Path, Keep], tmp_path: Path) -> None:
    """The final weights do not depend on loggers, progress bar, samples and validations."""
    config, undisturbed = watched
    kept = Keep()
    with extra_callbacks(kept):
        answer = gptlit("fit", "--config", config, "--run_dir", tmp_path / "run", *flags)
    assert answer.code == 0, answer.err
    assert kept.weights
    assert all(torch.equal(a, b) for a, b in zip(kept.weights, undisturbed.weights, strict=True))
