"""`model.teachers`: the loss, exact resume, refusals, and checkpoints without the teachers."""

import csv
import os
import re
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from command import At, digest, extra_callbacks, gptlit, load, write_config
from conftest import random_gpt
from torch.nn import functional as F

from gptlit import GPTConfig, LitGPT, OptimizerConfig, TextDataModule, UserError
from gptlit.cli.fit.plan import parse_fit
from gptlit.training.distillation import Teachers, distillation_loss


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a configuration, `teacher` and `other`, two runs of 6 and 5 steps, and `wide`, one with other tokens."""
    folder = tmp_path_factory.mktemp("teachers")
    config = write_config(folder, trainer__max_steps=6)
    for name, flags in (("teacher", ()), ("other", ("--trainer.max_steps", 5)), ("wide", ("--data.tokenizer", "bpe"))):
        answer = gptlit("fit", "--config", config, "--run_dir", folder / name, *flags)
        assert answer.code == 0, answer.err
    return folder


def losses(run: Path) -> list[float]:
    """`train/loss` of every step."""
    with (run / "metrics.csv").open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


@pytest.mark.parametrize("weight", [0.25, 0.5, 1.0])
def test_the_loss_mixes_the_text_and_the_prediction(weight: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    p = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64).softmax(-1)
    targets = torch.tensor([[0, 4, -1], [-100, 2, 3]])
    loss, plain = distillation_loss(logits, targets, p, weight)
    expected = torch.zeros(2, dtype=torch.float64)
    for b, t in ((0, 0), (0, 1), (1, 1), (1, 2)):
        log_q = logits[b, t].log_softmax(0)
        expected = expected + torch.stack([-log_q[targets[b, t]], -(p[b, t] * log_q).sum()]) / 4
    torch.testing.assert_close(loss, (1 - weight) * expected[0] + weight * expected[1])
    torch.testing.assert_close(plain, expected[0].detach())
    loss.backward()
    assert logits.grad is not None
    assert logits.grad[0, 2].eq(0).all(), "an ignored target has no gradient in either term"
    assert not plain.requires_grad


@pytest.mark.parametrize("weight", [0.1, 1.0])
def test_a_teacher_that_is_certain_of_the_text_changes_nothing(weight: float) -> None:
    logits, targets = torch.randn(2, 3, 5, dtype=torch.float64), torch.randint(5, (2, 3))
    certain = F.one_hot(targets, 5).double()
    loss, plain = distillation_loss(logits, targets, certain, weight)
    torch.testing.assert_close(loss, plain)


def test_no_counted_target_gives_a_loss_of_zero() -> None:
    logits = torch.randn(1, 2, 5, requires_grad=True)
    loss, plain = distillation_loss(logits, torch.full((1, 2), -1), torch.full((1, 2, 5), 0.2), 0.5)
    loss.backward()
    assert (loss.item(), plain.item()) == (0.0, 0.0)
    assert logits.grad is not None
    assert logits.grad.eq(0).all()


def test_teachers_predict_the_mean_of_their_probabilities() -> None:
    teachers = Teachers([])
    config = GPTConfig(vocab_size=7, block_size=8, n_layer=1, n_head=2, n_embd=16, dropout=0.5)
    teachers.networks = [random_gpt(config, seed) for seed in (1, 2)]
    ids = torch.randint(7, (2, 8))
    first, second = (network(ids).softmax(-1) for network in teachers.networks)
    torch.testing.assert_close(teachers.probabilities(ids), (first + second) / 2)
    assert not teachers.probabilities(ids).requires_grad


def test_the_curve_shows_the_loss_of_the_text(folder: Path, tmp_path: Path) -> None:
    """The first loss, of the initial weights, is that without teachers; later weights are others."""
    runs = {}
    for name, flags in (("plain", ()), ("taught", ("--model.teachers", folder / "teacher"))):
        runs[name] = tmp_path / name
        answer = gptlit("fit", "--config", folder / "small.yaml", "--run_dir", runs[name], *flags)
        assert answer.code == 0, answer.err
        assert ("teachers " in answer.err) == bool(flags)
    plain, taught = losses(runs["plain"]), losses(runs["taught"])
    assert taught[0] == pytest.approx(plain[0], abs=1e-6)
    assert digest(runs["taught"] / "last.ckpt") != digest(runs["plain"] / "last.ckpt")


def test_with_a_weight_of_one_only_the_prediction_is_learned(folder: Path, tmp_path: Path) -> None:
    """The teacher's weights are 0 and its prediction is uniform, as that of the initial weights: nothing changes."""
    untrained = tmp_path / "untrained"
    config = folder / "small.yaml"
    assert gptlit("fit", "--config", config, "--run_dir", untrained, "--trainer.max_steps", 1).code == 0
    checkpoint = load(untrained / "last.ckpt")
    for weight in checkpoint["state_dict"].values():
        weight.zero_()
    torch.save(checkpoint, tmp_path / "zero.ckpt")
    flags = ("--model.teachers", tmp_path / "zero.ckpt", "--model.teacher_weight", 1.0)
    assert gptlit("fit", "--config", config, "--run_dir", tmp_path / "run", *flags).code == 0
    found = losses(tmp_path / "run")
    assert found[-1] == pytest.approx(found[0], abs=1e-3)
    assert min(losses(folder / "teacher")) < found[0] - 0.02, "with the text it falls"


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_student_ends_bit_exactly_the_same(folder: Path, tmp_path: Path, accumulate: int) -> None:
    teachers = f"[{folder / 'teacher'}, {folder / 'other' / 'last.ckpt'}]"
    flags = ("--model.teachers", teachers, "--trainer.accumulate_grad_batches", accumulate, "--trainer.max_steps")
    config = ("--config", folder / "small.yaml", "--model.schedule.shape", "constant")
    assert gptlit("fit", *config, *flags, 6, "--run_dir", tmp_path / "whole").code == 0
    assert gptlit("fit", *config, *flags, 3, "--run_dir", tmp_path / "parts").code == 0
    answer = gptlit("fit", "--ckpt_path", tmp_path / "parts", "--trainer.max_steps", 6)
    assert answer.code == 0, answer.err
    assert digest(tmp_path / "parts" / "last.ckpt") == digest(tmp_path / "whole" / "last.ckpt")


def test_a_checkpoint_holds_no_teacher_and_needs_none(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "teacher", tmp_path / "teacher")
    run = tmp_path / "run"
    flags = ("--config", folder / "small.yaml", "--run_dir", run, "--model.teachers", tmp_path / "teacher")
    assert gptlit("fit", *flags).code == 0
    shutil.rmtree(tmp_path / "teacher")
    assert load(run / "last.ckpt")["state_dict"].keys() == load(folder / "teacher" / "last.ckpt")["state_dict"].keys()
    assert gptlit("predict", "--ckpt_path", run, "--max_new_tokens", 2).code == 0
    assert gptlit("validate", "--ckpt_path", run).code == 0
    assert LitGPT.load_from_checkpoint(run / "best.ckpt").teachers is None
    answer = gptlit("fit", "--ckpt_path", run, "--trainer.max_steps", 8)
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert answer.err.startswith(f"gptlit: --model.teachers {tmp_path / 'teacher'}: ")
    assert answer.err.endswith(
        "(the name is the checkpoint's, as seen from here; if it has moved, add --model.teachers NEW_PLACE)\n"
    )
    assert gptlit("fit", "--ckpt_path", run, "--trainer.max_steps", 8, "--model.teachers", folder / "other").code == 0


def test_of_several_teachers_the_one_that_moved_is_asked_for(folder: Path, tmp_path: Path) -> None:
    """The command with the new place must not drop the others."""
    shutil.copytree(folder / "teacher", tmp_path / "teacher")
    run, both = tmp_path / "run", f"[{folder / 'other'}, {tmp_path / 'teacher'}]"
    assert gptlit("fit", "--config", folder / "small.yaml", "--run_dir", run, "--model.teachers", both).code == 0
    shutil.move(tmp_path / "teacher", tmp_path / "moved")
    answer = gptlit("fit", "--ckpt_path", run, "--trainer.max_steps", 8)
    assert answer.err.endswith(f"if it has moved, add --model.teachers '[{folder / 'other'}, NEW_PLACE]')\n")
    (flag,) = re.findall(r"add --model.teachers (.*)\)$", answer.err)
    moved = shlex.split(flag.replace("NEW_PLACE", str(tmp_path / "moved")))
    answer = gptlit("fit", "--ckpt_path", run, "--trainer.max_steps", 8, "--model.teachers", *moved)
    assert answer.code == 0, answer.err


def test_null_is_no_name_of_a_teacher(folder: Path) -> None:
    answer = gptlit("fit", "--config", folder / "small.yaml", "--model.teachers", "null")
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert "--model.teachers names null" in answer.err
    assert "write '[]'" in answer.err


def test_a_teacher_that_changed_is_refused_on_resume(folder: Path, tmp_path: Path) -> None:
    """The run would be neither the old one nor a new one."""
    teacher, run = tmp_path / "teacher.ckpt", tmp_path / "run"
    shutil.copy(folder / "teacher" / "last.ckpt", teacher)
    flags = ("--config", folder / "small.yaml", "--run_dir", run, "--model.teachers", teacher)
    assert gptlit("fit", *flags).code == 0
    shutil.copy(folder / "other" / "last.ckpt", teacher)
    before = digest(run / "last.ckpt")
    answer = gptlit("fit", "--ckpt_path", run, "--trainer.max_steps", 8)
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert answer.err.startswith(f"gptlit: --model.teachers {teacher} has other weights than before the resume")
    assert digest(run / "last.ckpt") == before


def test_the_opening_lines_show_the_loss_of_each_teacher_and_which_one_was_stopped_early(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was stopped before its learning rate had declined is a bad teacher."""
    monkeypatch.chdir(tmp_path)
    stopped, finished = tmp_path / "stopped", folder / "teacher"
    stop = At("on_train_batch_end", 3, lambda: os.kill(os.getpid(), signal.SIGINT))
    with extra_callbacks(stop):
        answer = gptlit("fit", "--config", folder / "small.yaml", "--run_dir", stopped)
    assert answer.code == 130
    torch.save({key: value for key, value in load(finished / "best.ckpt").items() if key != "callbacks"}, "plain.ckpt")
    shutil.copy(stopped / "last.ckpt", "alone.ckpt")
    flags = ("--model.teachers", f"[{stopped}, {finished}, plain.ckpt, alone.ckpt]", "--trainer.max_steps", 2)
    answer = gptlit("fit", "--config", folder / "small.yaml", "--run_dir", tmp_path / "run", *flags)
    assert answer.code == 0
    lines = [line.strip() for line in answer.err.splitlines()]
    best = load(finished / "best.ckpt")
    loss = best["callbacks"]["RunCheckpoints"]["best_score"]
    first = lines.index(f"teachers    {stopped} (step 4)")
    assert lines[first + 1 : first + 5] == [
        f"{finished} (step {best['global_step']}, val loss {loss:.4f})",
        f"plain.ckpt (step {best['global_step']})",
        "alone.ckpt (step 4)",
        "weight 0.5: 50% of the training loss is the distillation loss",
    ]
    notes = [line for line in lines if "was stopped" in line]
    assert notes == [
        f"the teacher {name} was stopped after 4 of 6 steps: gptlit fit --ckpt_path {name} continues its training"
        for name in (stopped, "alone.ckpt")
    ]


def test_an_early_checkpoint_of_a_finished_run_is_not_called_stopped(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "teacher", tmp_path / "teacher")
    early = load(tmp_path / "teacher" / "last.ckpt")
    early["global_step"] = 3
    torch.save(early, tmp_path / "teacher" / "step-3.ckpt")
    flags = ("--config", folder / "small.yaml", "--run_dir", tmp_path / "run", "--model.teachers")
    answer = gptlit("fit", *flags, tmp_path / "teacher" / "step-3.ckpt")
    assert answer.code == 0
    assert "(step 3)" in answer.err
    assert "was stopped" not in answer.err


def test_a_teacher_needs_no_facts_about_its_training(folder: Path, tmp_path: Path) -> None:
    """Checkpoints of other Trainers and callbacks may lack them."""
    checkpoint = load(folder / "teacher" / "best.ckpt")
    kept = {key: checkpoint[key] for key in ("state_dict", "hyper_parameters")}
    torch.save({**kept, "gptlit": None, "callbacks": None}, tmp_path / "teacher.ckpt")
    flags = ("--config", folder / "small.yaml", "--run_dir", tmp_path / "run", "--model.teachers")
    answer = gptlit("fit", *flags, tmp_path / "teacher.ckpt")
    assert answer.code == 0, answer.err
    assert f"teachers    {tmp_path / 'teacher.ckpt'}\n" in answer.err


@pytest.mark.parametrize("name", ["", "best.ckpt"])
def test_a_run_cannot_be_its_own_teacher(folder: Path, tmp_path: Path, name: str) -> None:
    """Its checkpoints change while it trains."""
    shutil.copytree(folder / "teacher", tmp_path / "run")
    files = sorted((tmp_path / "run").iterdir())
    flags = ("--trainer.max_steps", 8, "--model.teachers", tmp_path / "run" / name)
    answer = gptlit("fit", "--ckpt_path", tmp_path / "run", *flags)
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert "is the run that resumes" in answer.err
    assert sorted((tmp_path / "run").iterdir()) == files


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--model.teachers", "nothing.ckpt"), "--model.teachers nothing.ckpt: no such file or folder"),
        (("--model.teachers", "checkpoints/none"), "--model.teachers checkpoints/none: no such run: train it"),
        (("--config", "laptop_student"), "--model.teachers checkpoints/laptop: no such run: train it"),
        (("--model.teachers", ""), "--model.teachers has an empty name"),
        (("--model.teachers", "[{}/teacher, {}/teacher]"), "--model.teachers names {}/teacher twice"),
        (("--model.teachers", "{}/wide"), "--model.teachers {}/wide/best.ckpt was trained with other tokens"),
        (
            ("--model.teachers", "{}/teacher", "--model.gpt.block_size", 32),
            "--model.teachers {}/teacher/best.ckpt reads 16 tokens, but model.gpt.block_size is 32",
        ),
        (("--model.teachers", "{}/teacher", "--model.teacher_weight", 0), "--model.teacher_weight is 0.0: it must be"),
        (("--model.teachers", "{}/teacher", "--model.teacher_weight", 1.1), "--model.teacher_weight is 1.1: it must"),
        (("--model.teacher_weight", 0.4), "--model.teacher_weight is 0.4, but there are no model.teachers"),
        (("--model.init_from", "nothing.ckpt"), "--model.init_from nothing.ckpt: no such file or folder"),
    ],
)
def test_teachers_that_cannot_teach_are_refused_in_one_line(
    folder: Path, tmp_path: Path, flags: tuple[Any, ...], said: str
) -> None:
    given = [str(flag).replace("{}", str(folder)) for flag in flags]
    answer = gptlit("fit", "--config", folder / "small.yaml", "--run_dir", tmp_path / "run", *given)
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert answer.err.startswith(f"gptlit: {said.replace('{}', str(folder))}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_other_verbs_refuse_teachers(folder: Path, verb: str) -> None:
    answer = gptlit(verb, "--ckpt_path", folder / "teacher", "--model.teachers", folder / "other")
    assert (answer.code, answer.out, answer.err.count("\n")) == (2, "", 1)
    assert answer.err.startswith("gptlit: --model.teachers is for training")


def test_non_finite_weights_of_a_teacher_are_refused(folder: Path, tmp_path: Path) -> None:
    checkpoint = load(folder / "teacher" / "last.ckpt")
    next(iter(checkpoint["state_dict"].values()))[0] = torch.nan
    torch.save(checkpoint, tmp_path / "nan.ckpt")
    flags = ("--run_dir", tmp_path / "run", "--model.teachers", tmp_path / "nan.ckpt")
    answer = gptlit("fit", "--config", folder / "small.yaml", *flags)
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert answer.err.startswith(f"gptlit: --model.teachers {tmp_path / 'nan.ckpt'} holds non-finite")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_teachers_work_from_python_in_every_precision(folder: Path, tmp_path: Path, precision: Any) -> None:
    data = TextDataModule(str(folder / "text.txt"), block_size=16, batch_size=4)
    gpt = GPTConfig(block_size=16, n_layer=1, n_head=2, n_embd=16)
    model = LitGPT(gpt, OptimizerConfig(name="adamw", lr=1e-2), teachers=[str(folder / "teacher")])
    trainer = pl.Trainer(
        accelerator="cpu", precision=precision, max_steps=3, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    assert trainer.global_step == 3
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
    assert not any("teacher" in name for name, _ in model.named_parameters())
    trainer.save_checkpoint(tmp_path / "student.ckpt")
    stored = load(tmp_path / "student.ckpt")["gptlit"]
    assert (list(stored["teachers"]), stored["teacher_weight"]) == ([str(folder / "teacher")], 0.5)
    with pytest.raises(UserError, match=r"model\.teacher_weight is 2: it must be above 0"):
        LitGPT(teachers=[str(folder / "teacher")], teacher_weight=2)


@pytest.fixture(scope="module")
def student(folder: Path) -> Path:
    """A run of 3 steps with a teacher of weight 0.9."""
    flags = ("--model.teachers", folder / "teacher", "--model.teacher_weight", 0.9, "--trainer.max_steps", 3)
    assert gptlit("fit", "--config", folder / "small.yaml", "--run_dir", folder / "student", *flags).code == 0
    return folder / "student"


@pytest.mark.parametrize("flags", [("--model.teachers", "[]"), ("--config", "none.yaml")])
def test_a_run_resumes_without_its_teachers_and_their_weight(
    student: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    shutil.copytree(student, tmp_path / "run")
    (tmp_path / "none.yaml").write_text("model:\n  teachers: null\n", encoding="utf-8")
    answer = gptlit("fit", "--ckpt_path", tmp_path / "run", "--trainer.max_steps", 5, *flags)
    assert answer.code == 0, answer.err
    assert "teacher_weight" not in answer.err
    stored = yaml.safe_load(load(tmp_path / "run" / "last.ckpt")["gptlit"]["config"])["model"]
    assert not stored["teachers"]
    assert stored["teacher_weight"] == 0.5


def test_the_weight_of_a_file_is_dropped_with_the_teachers_of_that_file(student: Path) -> None:
    arguments = ["--config", str(student / "config.yaml"), "--model.teachers=[]"]
    assert parse_fit(arguments).settings["model"]["teacher_weight"] == 0.5


def test_a_weight_that_the_user_gives_without_teachers_is_refused(student: Path, folder: Path, tmp_path: Path) -> None:
    """As a flag, when resuming too, or in a file without teachers."""
    (tmp_path / "weight.yaml").write_text("model:\n  teacher_weight: 0.9\n", encoding="utf-8")
    (tmp_path / "both.yaml").write_text("model: {teachers: null, teacher_weight: 0.9}\n", encoding="utf-8")
    for arguments in (
        ("--ckpt_path", student, "--model.teachers", "[]", "--model.teacher_weight", 0.9, "--trainer.max_steps", 5),
        ("--config", folder / "small.yaml", "--config", "weight.yaml", "--run_dir", tmp_path / "run"),
        ("--config", folder / "small.yaml", "--config", "both.yaml", "--run_dir", tmp_path / "run"),
    ):
        answer = gptlit("fit", *arguments)
        assert (answer.code, answer.err.count("\n")) == (2, 1)
        assert answer.err.startswith("gptlit: --model.teacher_weight is 0.9, but there are no model.teachers")
