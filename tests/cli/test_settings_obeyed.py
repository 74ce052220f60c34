"""Settings of Lightning that were ignored, or ended in a traceback: time limits, intervals, logs, resumed callbacks."""

import csv
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from command import At, extra_callbacks, gptlit, load, write_config
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger

from gptlit.cli.fit.trainer_settings import check_loggers
from gptlit.errors import UserError
from gptlit.training.evaluation import batches_evaluated

EARLY = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "val/loss"}}


class LoggerOfModels(CSVLogger):
    """Takes `log_model`, as the loggers of Weights & Biases, MLflow and DVCLive do."""

    def __init__(self, save_dir: str, log_model: bool | str = False) -> None:
        super().__init__(save_dir)


def steps_in(run: Path) -> int:
    return int(load(run / "last.ckpt")["global_step"])


def resume_command(err: str) -> list[str]:
    """The command that the last line prints, without the name of the program."""
    return err.strip().splitlines()[-1].partition("gptlit ")[2].split()


def test_an_interval_of_muon_that_ends_after_the_run_is_announced(tmp_path: Path) -> None:
    config = write_config(tmp_path, trainer__max_steps=2, model__optimizer__name="muon")
    command = ("fit", "--config", config, "--model.optimizer.muon_interval")
    line = "the matrices never change: model.optimizer.muon_interval is 3, more than trainer.max_steps (2)"
    assert line in gptlit(*command, 3, "--run_dir", tmp_path / "never").err.replace("\n", " ")
    assert "never change" not in gptlit(*command, 2, "--run_dir", tmp_path / "once").err


# ---------------------------------------------------------------- time


def test_a_run_that_a_time_limit_ended_continues_with_the_printed_command(tmp_path: Path) -> None:
    """The limit and the time that was counted belong to one start."""
    config, run = write_config(tmp_path, trainer__max_steps=100_000), tmp_path / "run"
    limit = ("--trainer.max_time", "00:00:00:01")
    answer = gptlit("fit", "--config", config, "--run_dir", run, *limit)
    assert answer.code == 0
    first = steps_in(run)
    assert 0 < first < 100_000
    command = resume_command(answer.err)
    assert command == ["fit", "--ckpt_path", str(run)]
    assert gptlit(*command, *limit).code == 0
    second = steps_in(run)
    assert second > first
    assert gptlit(*command, "--trainer.max_steps", second + 3).code == 0  # no limit is left over
    assert steps_in(run) == second + 3


@pytest.mark.parametrize("limit", ["00:00:00:00", "tomorrow", "{minutes: 0}", "1:2"])
def test_a_time_limit_that_leaves_no_step_is_refused(tmp_path: Path, limit: str) -> None:
    answer = gptlit(
        "fit", "--config", write_config(tmp_path), "--run_dir", tmp_path / "run", "--trainer.max_time", limit
    )
    assert answer.code == 2
    assert "trainer.max_time is " in answer.err
    assert not (tmp_path / "run").exists()


def test_a_start_without_a_step_is_an_error(tmp_path: Path) -> None:
    """Whatever ended it; exit code 0 would mean that the run went on."""

    def stop(trainer: object) -> None:
        trainer.should_stop = True  # type: ignore[attr-defined]

    callback = At("on_train_start", 0, lambda: None)
    callback.on_train_start = lambda trainer, *_: stop(trainer)  # type: ignore[method-assign]
    with extra_callbacks(callback):
        answer = gptlit("fit", "--config", write_config(tmp_path), "--run_dir", tmp_path / "run")
    assert answer.code == 2
    assert "no step was made" in answer.err


def test_validation_at_time_intervals_and_at_the_end(tmp_path: Path) -> None:
    """Lightning leaves its Trainer without an attribute then."""
    config, run = write_config(tmp_path, trainer__max_steps=7), tmp_path / "run"
    answer = gptlit("fit", "--config", config, "--run_dir", run, "--trainer.val_check_interval", "00:01:00:00")
    assert answer.code == 0, answer.err
    assert load(run / "last.ckpt")["callbacks"]["RunCheckpoints"]["validated_step"] == 7


# ---------------------------------------------------------------- resume


def test_only_the_callback_that_may_name_code_is_left_out_of_a_resumed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name; a folder of a ModelCheckpoint names no code. Changed settings are readable."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_callback.py").write_text("import lightning.pytorch as pl\nclass Own(pl.Callback): pass\n")
    saving = {"class_path": "ModelCheckpoint", "init_args": {"dirpath": str(tmp_path / "a.b"), "filename": "{step}"}}
    callbacks = [EARLY, saving, {"class_path": "own_callback.Own"}]
    config, run = write_config(tmp_path, trainer__max_steps=4, trainer__callbacks=callbacks), tmp_path / "run"
    assert gptlit("fit", "--config", config, "--run_dir", run).code == 0
    answer = gptlit("fit", "--ckpt_path", run, "--trainer.max_steps", 6)
    assert answer.code == 0, answer.err
    assert "trainer.callbacks Own() of the checkpoint is left out: it may name code" in answer.err
    assert answer.err.count("left out") == 1
    assert "changed: trainer.max_steps 4 -> 6" in answer.err
    now = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["trainer"]["callbacks"]
    assert [item["class_path"].rpartition(".")[2] for item in now] == ["EarlyStopping", "ModelCheckpoint"]


def test_a_callback_that_is_given_again_is_not_called_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "given_again.py").write_text("import lightning.pytorch as pl\nclass Own(pl.Callback): pass\n")
    config, run = write_config(tmp_path, trainer__max_steps=2), tmp_path / "run"
    flags = ("--trainer.callbacks", "given_again.Own")
    assert gptlit("fit", "--config", config, "--run_dir", run, *flags).code == 0
    answer = gptlit("fit", "--ckpt_path", run, "--trainer.max_steps", 4, *flags)
    assert answer.code == 0, answer.err
    assert "left out" not in answer.err


def test_a_file_of_weights_only_names_what_to_do(tmp_path: Path) -> None:
    config, run = write_config(tmp_path, trainer__max_steps=2), tmp_path / "run"
    assert gptlit("fit", "--config", config, "--run_dir", run).code == 0
    content = load(run / "last.ckpt")
    for part in ("optimizer_states", "lr_schedulers"):
        content.pop(part, None)
    torch.save(content, tmp_path / "weights.ckpt")
    answer = gptlit("fit", "--ckpt_path", tmp_path / "weights.ckpt")
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert f"--model.init_from {tmp_path / 'weights.ckpt'}" in answer.err


# ---------------------------------------------------------------- what Lightning says


def test_rows_that_a_logger_deletes_are_announced(tmp_path: Path) -> None:
    """CSVLogger with a fixed version empties its file when a run is resumed; its warning arrives."""
    logger = f"{{class_path: CSVLogger, init_args: {{save_dir: {tmp_path}, name: own, version: one}}}}"
    config, run = write_config(tmp_path, trainer__max_steps=2), tmp_path / "run"
    assert gptlit("fit", "--config", config, "--run_dir", run, f"--trainer.logger={logger}").code == 0
    with pytest.warns(UserWarning, match="exists and is not empty"):
        gptlit("fit", "--ckpt_path", run, "--trainer.max_steps", 4, f"--trainer.logger={logger}")


def test_a_store_that_mlflow_refuses_names_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recent versions of MLflow refuse the default store, a folder of files, when it is opened."""

    def refuse(self: MLFlowLogger) -> None:
        raise RuntimeError("the file store is in maintenance mode")

    monkeypatch.setattr(MLFlowLogger, "experiment", property(refuse))
    with pytest.raises(UserError, match=r"set its tracking_uri, such as sqlite:///mlflow\.db") as raised:
        check_loggers([MLFlowLogger.__new__(MLFlowLogger)])
    assert raised.value.setting == "trainer.logger"


def test_log_model_is_refused_where_no_checkpoint_reaches_a_logger(tmp_path: Path) -> None:
    config, run = write_config(tmp_path, trainer__max_steps=1), tmp_path / "run"
    for value, code in (("true", 2), ("all", 2), ("false", 0)):
        logger = f"{{class_path: {__name__}.LoggerOfModels, init_args: {{save_dir: {tmp_path}, log_model: {value}}}}}"
        answer = gptlit("fit", "--config", config, "--run_dir", run, f"--trainer.logger={logger}")
        assert (answer.code, run.exists()) == (code, code == 0), answer.err
        assert ("trainer.logger has log_model" in answer.err) == (code == 2)


def test_log_model_with_checkpoints_among_the_files_of_the_run_is_refused(tmp_path: Path) -> None:
    """DVCLive's logger then deletes config.yaml and last.ckpt (findings/dvclive-deletes-other-files.sh)."""
    run = tmp_path / "run"
    logger = {"class_path": f"{__name__}.LoggerOfModels", "init_args": {"save_dir": str(tmp_path), "log_model": True}}
    for folder, code in ((run, 2), (tmp_path, 2), (run / "kept", 0)):
        saving = {"class_path": "ModelCheckpoint", "init_args": {"dirpath": str(folder)}}
        config = write_config(tmp_path, trainer__max_steps=1, trainer__callbacks=[saving], trainer__logger=logger)
        answer = gptlit("fit", "--config", config, "--run_dir", run)
        assert (answer.code, run.exists()) == (code, code == 0), answer.err
        assert ("holds the files of the run" in answer.err) == (code == 2)


@pytest.mark.parametrize(
    ("kind", "arguments", "file"),
    [
        ("ModelCheckpoint", {"save_last": True}, "last.ckpt"),
        ("ModelCheckpoint", {"filename": "best"}, "best.ckpt"),
        ("OnExceptionCheckpoint", {"filename": "last"}, "last.ckpt"),
    ],
)
def test_a_callback_that_writes_over_a_checkpoint_of_the_run_is_refused(
    tmp_path: Path, kind: str, arguments: dict[str, Any], file: str
) -> None:
    run = tmp_path / "run"
    for folder, code in ((run, 2), (run / "kept", 0)):
        saving = {"class_path": kind, "init_args": {"dirpath": str(folder), **arguments}}
        config = write_config(tmp_path, trainer__max_steps=1, trainer__callbacks=[saving])
        answer = gptlit("fit", "--config", config, "--run_dir", run)
        assert (answer.code, run.exists()) == (code, code == 0), answer.err
        assert (f"trainer.callbacks.{kind} writes {file} in {run}" in answer.err) == (code == 2)


def test_other_checkpoints_may_lie_in_the_run_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    saving = {"class_path": "ModelCheckpoint", "init_args": {"dirpath": str(run), "every_n_train_steps": 1}}
    config = write_config(tmp_path, trainer__max_steps=2, trainer__callbacks=[saving])
    assert gptlit("fit", "--config", config, "--run_dir", run).code == 0
    assert len(list(run.glob("epoch=*.ckpt"))) == 1
    assert gptlit("fit", "--ckpt_path", run, "--trainer.max_steps", 3).code == 0
    assert steps_in(run) == 3


def test_the_best_checkpoint_is_chosen_again_when_another_part_is_validated(tmp_path: Path) -> None:
    """The loss of an easy part would keep better weights out of best.ckpt."""
    config, run, val = write_config(tmp_path, trainer__val_check_interval=2), tmp_path / "run", tmp_path / "val.txt"
    (tmp_path / "train.txt").write_text("a" * 2000 + "bcdefgh")
    val.write_text("a" * 100 + "bcdefgh" * 20)
    texts = ("--data.corpus", tmp_path / "train.txt", "--data.val_corpus", val, "--data.eval_batch_size", 1)
    steps = ("--trainer.max_steps", 4, "--trainer.limit_val_batches", 1)
    assert gptlit("fit", "--config", config, "--run_dir", run, *texts, *steps).code == 0
    easy = load(run / "best.ckpt")["callbacks"]["RunCheckpoints"]
    answer = gptlit("fit", "--ckpt_path", run, "--trainer.max_steps", 8, "--trainer.limit_val_batches", "null")
    assert answer.code == 0
    whole, state = load(run / "best.ckpt"), load(run / "last.ckpt")["callbacks"]["RunCheckpoints"]
    assert whole["global_step"] == state["best_step"] > 4
    assert state["best_score"] > easy["best_score"]
    done, all_batches = easy["best_batches"]
    line = f"val/loss is now that of all batches of the validation part, before of {done} of {all_batches} batches"
    assert answer.err.replace("\n", " ").count(line) == 1
    again = gptlit("fit", "--ckpt_path", run, "--trainer.max_steps", 10, "--data.eval_batch_size", 2)
    assert "chosen again" not in again.err  # all batches in both


def test_batches_of_the_loss_estimates_are_no_part_of_the_validation(tmp_path: Path) -> None:
    """They were counted with it: another number of them replaced best.ckpt, and all batches were called a part."""
    config, run = write_config(tmp_path, trainer__val_check_interval=2), tmp_path / "run"
    some = ("--data.eval_batch_size", 1, "--trainer.limit_val_batches", 3)
    answer = gptlit("fit", "--config", config, "--run_dir", run, *some, "--data.estimate_batches", 4)
    assert answer.code == 0, answer.err
    line = r"the metrics are those of 3 of (\d+) batches of the validation part; "
    line += r"the loss estimates are those of 3 of 4 batches of data.estimate_batches: trainer.limit_val_batches is set"
    found = re.search(line, " ".join(answer.err.split()))
    assert found
    assert load(run / "best.ckpt")["callbacks"]["RunCheckpoints"]["best_batches"] == [3, int(found[1])]
    answer = gptlit("fit", "--ckpt_path", run, "--trainer.max_steps", 22, "--data.estimate_batches", 0)
    assert answer.code == 0
    assert "chosen again" not in answer.err
    many = ("--trainer.limit_val_batches", int(found[1]), "--data.estimate_batches", 1000)
    answer = gptlit("fit", "--config", config, "--run_dir", tmp_path / "other", "--data.eval_batch_size", 1, *many)
    assert "the metrics are those of" not in " ".join(answer.err.split()), "all of them"


def test_batches_of_all_processes_are_counted() -> None:
    """Three batches on each of two processes are the windows of six on one."""
    one = SimpleNamespace(world_size=1, val_dataloaders=[range(8)], num_val_batches=[6])
    two = SimpleNamespace(world_size=2, val_dataloaders=[range(4)], num_val_batches=[3])
    assert batches_evaluated(one) == batches_evaluated(two) == (6, 8)


@pytest.mark.parametrize("count", [1, 2])
def test_loggers_that_are_left_out_of_a_resume_leave_the_curves_to_the_run_folder(tmp_path: Path, count: int) -> None:
    """However many there were."""
    logger = {"class_path": f"{__name__}.LoggerOfModels", "init_args": {"save_dir": str(tmp_path / "logs")}}
    config = write_config(tmp_path, trainer__max_steps=2, trainer__logger=[logger] * count if count > 1 else logger)
    run = tmp_path / "run"
    assert gptlit("fit", "--config", config, "--run_dir", run).code == 0
    assert not (run / "metrics.csv").exists()
    answer = gptlit("fit", "--ckpt_path", run, "--trainer.max_steps", 4)
    assert answer.err.count("of the checkpoint is left out: it may name code") == 1
    assert (run / "metrics.csv").is_file()


def test_reports_of_a_profiler_do_not_replace_each_other(tmp_path: Path) -> None:
    config, run = write_config(tmp_path, trainer__max_steps=2, trainer__profiler="simple"), tmp_path / "run"
    assert gptlit("fit", "--config", config, "--run_dir", run).code == 0
    (first,) = run.glob("*profile*")
    before = first.read_text()
    assert gptlit("fit", "--ckpt_path", run, "--trainer.max_steps", 4).code == 0
    assert first.read_text() == before
    assert len(list(run.glob("*profile*"))) == 2


def test_a_part_is_said_when_something_stops_the_run_early(tmp_path: Path) -> None:
    early = [{**EARLY, "init_args": {"monitor": "val/loss", "stopping_threshold": 99.0}}]
    config = write_config(tmp_path, trainer__val_check_interval=2, trainer__callbacks=early)
    limit = ("--trainer.limit_val_batches", 1, "--data.eval_batch_size", 1)
    said = " ".join(gptlit("fit", "--config", config, "--run_dir", tmp_path / "run", *limit).err.split())
    assert "stopped after step 2 of" in said
    assert "the metrics are those of 1 of" in said


def test_settings_of_lightning_that_do_not_fit_are_one_line_on_a_resume_too(tmp_path: Path) -> None:
    config, run = write_config(tmp_path, trainer__max_steps=2), tmp_path / "run"
    assert gptlit("fit", "--config", config, "--run_dir", run).code == 0
    flags = ("--trainer.logger", "false", "--trainer.callbacks", "LearningRateMonitor")
    answer = gptlit("fit", "--ckpt_path", run, "--trainer.max_steps", 4, *flags)
    assert answer.code == 2
    assert answer.err.splitlines()[-1].startswith("gptlit: the Trainer does not take these trainer settings: ")


def test_the_bits_of_the_closing_table_are_those_of_the_validated_batches(tmp_path: Path) -> None:
    """Tokens of a BPE have other lengths in a part than in the whole."""
    (tmp_path / "val.txt").write_text("the the the the the " * 10 + "x q z j v k " * 40)
    config, run = write_config(tmp_path, trainer__max_steps=2, trainer__val_check_interval=2), tmp_path / "run"
    bpe = ("--data.tokenizer", "bpe", "--data.vocab_size", 280, "--data.val_corpus", tmp_path / "val.txt")
    limit = ("--trainer.limit_val_batches", 1, "--data.eval_batch_size", 1)
    said = gptlit("fit", "--config", config, "--run_dir", run, *bpe, *limit).err
    *_, last = csv.DictReader((run / "metrics.csv").open())
    assert f"{float(last['val/bpc']):.4f} bits per character" in said


def test_why_a_callback_stopped_the_run_is_said(tmp_path: Path) -> None:
    """What was asked for with `verbose` is not silenced with Lightning's chatter."""
    early = [{**EARLY, "init_args": {"monitor": "val/loss", "patience": 1, "min_delta": 9.0, "verbose": True}}]
    config = write_config(tmp_path, trainer__max_steps=8, trainer__val_check_interval=1, trainer__callbacks=early)
    answer = gptlit("fit", "--config", config, "--run_dir", tmp_path / "run")
    assert answer.code == 0
    assert "Monitored metric val/loss did not improve" in answer.err
    assert "GPU available" not in answer.err
    assert "`Trainer.fit` stopped" not in answer.err


EVERY_STEP = {"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 1}}


@pytest.mark.parametrize("monitor", ["train/loss", "val/loss"])
@pytest.mark.parametrize("kind", ["EarlyStopping", "ModelCheckpoint"])
def test_a_callback_that_waits_for_validations_is_refused_without_them(tmp_path: Path, kind: str, monitor: str) -> None:
    waiting = [{"class_path": kind, "init_args": {"monitor": monitor}}]
    config = write_config(tmp_path, trainer__max_steps=2, trainer__limit_val_batches=0, trainer__callbacks=waiting)
    answer = gptlit("fit", "--config", config, "--run_dir", tmp_path / "run")
    assert answer.code == 2
    assert f"--trainer.callbacks.{kind} acts after validations, and this run has none" in answer.err


@pytest.mark.parametrize("callbacks", [[], [EVERY_STEP]], ids=["without", "of steps"])
def test_a_run_without_validation_has_no_best_checkpoint(tmp_path: Path, callbacks: list[Any]) -> None:
    config = write_config(tmp_path, trainer__max_steps=2, trainer__limit_val_batches=0, trainer__callbacks=callbacks)
    run = tmp_path / "run"
    answer = gptlit("fit", "--config", config, "--run_dir", run)
    assert answer.code == 0, answer.err
    assert {path.name for path in run.glob("*.ckpt")} == {"last.ckpt"}
    assert bool(list(run.rglob("epoch=*.ckpt"))) == bool(callbacks)
    assert gptlit("predict", "--ckpt_path", run, "--max_new_tokens", 2).code == 0
