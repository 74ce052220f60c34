"""Comparing runs: the table, the picture, and `curves.png` of a single run."""

import csv
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command import gptlit, load, write_config

from gptlit.callbacks.pictures import rasterize
from gptlit.cli.compare import Run, compare_figure, markdown, table_of
from gptlit.cli.curves import curves_figure, draw_training, lowest, new_figure


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two finished runs of the same text."""
    folder = tmp_path_factory.mktemp("compare")
    config = write_config(folder)
    for name, steps in (("short", 12), ("wide", 20)):
        flags = ("--trainer.max_steps", steps, *(("--model.gpt.n_embd", 32) if name == "wide" else ()))
        assert gptlit("fit", "--config", config, "--run_dir", folder / name, *flags).code == 0
    return folder / "short", folder / "wide"


def column(run: Path, name: str) -> dict[int, float]:
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row[name]}


def test_every_number_of_the_table_is_that_of_the_run(runs: tuple[Path, Path]) -> None:
    answer = gptlit("compare", *runs)
    assert answer.code == 0, answer.err
    for run, shown in zip(runs, shown_rows(answer.out), strict=True):
        losses, bits = column(run, "val/loss"), column(run, "val/bpc")
        best = min(losses, key=lambda step: losses[step])
        checkpoint = load(run / "last.ckpt")
        weights = [value for name, value in checkpoint["state_dict"].items() if name.startswith("net.")]
        assert shown["run"] == str(run)
        assert shown["steps"] == str(checkpoint["global_step"])
        assert shown["best val loss"] == f"{losses[best]:.4f}"
        assert shown["at step"] == str(best)
        assert shown["last val loss"] == f"{losses[max(losses)]:.4f}"
        assert shown["bits/char"] == f"{bits[best]:.4f}"
        assert shown["parameters"] == f"{sum(weight.numel() for weight in weights):,}"
    assert (runs[0].parent / "compare.png").read_bytes().startswith(b"\x89PNG")


def shown_rows(out: str) -> list[dict[str, str]]:
    """Return the rows of the table by title."""
    header, _, *rows = [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in out.splitlines()]
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_a_validation_without_a_logger_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table and curves.png agree with the closing lines of the run, whose metrics.csv ends earlier."""
    drawn: list[dict[int, float]] = []

    def watched(train: dict[int, float], val: dict[int, float], title: str, saved_step: int | None) -> Any:
        drawn.append(val)
        return curves_figure(train, val, title, saved_step)

    monkeypatch.setattr("gptlit.cli.curves.curves_figure", watched)
    run = tmp_path / "run"
    config = write_config(tmp_path, trainer__max_steps=8)
    assert gptlit("fit", "--config", config, "--run_dir", run).code == 0
    answer = gptlit("fit", "--ckpt_path", run, "--trainer.max_steps", 16, "--trainer.logger", "false")
    assert answer.code == 0, answer.err
    state = load(run / "last.ckpt")["callbacks"]["RunCheckpoints"]
    assert state["best_step"] > max(column(run, "val/loss"))
    answer = gptlit("compare", run)
    assert answer.code == 0, answer.err
    (row,) = shown_rows(answer.out)
    assert row["best val loss"] == row["last val loss"] == f"{state['best_score']:.4f}"
    assert row["at step"] == "16"
    assert row["bits/char"] == f"{state['best_score'] / math.log(2):.4f}"
    assert drawn[-1] == {**column(run, "val/loss"), 16: state["best_score"]}


def test_a_last_loss_that_no_file_holds_is_left_out() -> None:
    run = Run(Path("run"), 20, 10, 1.0, (), {}, {0: 4.0, 8: 3.0}, {}, last_step=20)
    (row,) = shown_rows(table_of([run]))
    assert (row["best val loss"], row["at step"], row["last val loss"]) == ("3.0000", "8", "")


def test_a_loss_that_no_checkpoint_has_is_not_the_best(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """A run with the weights of another model gets worse first: no checkpoint is written before its first step."""
    run = tmp_path / "worse"
    config = write_config(tmp_path, trainer__max_steps=12, model__optimizer__lr=1.0, model__optimizer__muon_lr=1.0)
    fit = ("fit", "--config", config, "--model.init_from", runs[1], "--model.gpt.n_embd", 32, "--run_dir", run)
    assert gptlit(*fit).code == 0
    losses, state = column(run, "val/loss"), load(run / "best.ckpt")["callbacks"]["RunCheckpoints"]
    assert losses[0] < state["best_score"]
    answer = gptlit("compare", run)
    (row,) = shown_rows(answer.out)
    assert (row["best val loss"], row["at step"]) == (f"{state['best_score']:.4f}", str(state["best_step"]))
    assert lowest({0: 1.0, 6: 3.0, 12: 2.0}) == 12
    assert lowest({0: 1.0}) == 0


def test_a_validation_after_the_last_checkpoint_is_not_the_best() -> None:
    """The process was killed before the checkpoint was written."""
    run = Run(Path("run"), 20, 10, 1.0, (), {}, {0: 4.0, 8: 3.0, 16: 2.0}, {8: 4.5, 16: 3.0}, saved_step=8)
    (row,) = shown_rows(table_of([run]))
    assert (row["best val loss"], row["at step"], row["bits/char"]) == ("3.0000", "8", "4.5000")
    labels = [line.get_label() for line in curves_figure({}, run.val, "run", run.saved_step).axes[0].lines]
    assert "best 3.0000, step 8" in labels


def test_a_line_that_was_cut_short_is_left_out(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """The last number of a line without its end may lack digits, and a full disk leaves zeros."""
    shutil.copytree(runs[0], tmp_path / "run")
    expected = gptlit("compare", tmp_path / "run").out
    file = tmp_path / "run" / "metrics.csv"
    text = file.read_text(encoding="utf-8")
    columns = text.partition("\n")[0].split(",")
    for cut in ("14," + ",".join(["0.5"] * (len(columns) - 1)), "14,0.", "14,0.5\n", "14,\0\0\0", "14,\xff"):
        file.write_bytes(text.encode() + cut.encode("latin-1"))
        answer = gptlit("compare", tmp_path / "run")
        assert (answer.code, answer.out) == (0, expected), cut


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"step,val/loss\n0,4.0\n8,\xff\n", "not UTF-8 at byte 22"),
        (b"step,val/loss\n0,4.0\n8,low\n", "val/loss is not a number at every step"),
        (b"val/loss\n4.0\n", "val/loss is not a number at every step"),
        (b"", "has no val/loss"),
    ],
)
def test_a_table_of_metrics_that_is_none_is_one_line(
    runs: tuple[Path, Path], tmp_path: Path, content: bytes, complaint: str
) -> None:
    shutil.copytree(runs[0], tmp_path / "run")
    (tmp_path / "run" / "metrics.csv").write_bytes(content)
    answer = gptlit("compare", tmp_path / "run")
    assert (answer.code, answer.out, answer.err.count("\n")) == (2, "", 1)
    assert answer.err.startswith(f"gptlit: {tmp_path}/run/metrics.csv")
    assert complaint in answer.err


def test_a_run_that_was_validated_on_a_part_is_marked(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """With the numbers that the run itself prints; also when the run resumes, and if an older version wrote it."""
    config, part = runs[0].parent / "small.yaml", tmp_path / "part"
    fit = ("fit", "--config", config, "--trainer.max_steps", 6, "--run_dir")
    said = gptlit(*fit, part, "--trainer.limit_val_batches", 1).err
    assert gptlit(*fit, tmp_path / "all", "--trainer.limit_val_batches", 1000).code == 0
    counted = re.search(r"the metrics are those of (1 of \d+ batches) of the validation part", said)
    assert counted, said
    answer = gptlit("compare", runs[0], part, tmp_path / "all")
    assert [row["run"] for row in shown_rows(answer.out)] == [str(runs[0]), f"{part} *", str(tmp_path / "all")]
    (note,) = (line for line in answer.err.splitlines() if line.startswith("*"))
    assert note == f"* the metrics are those of a part of the validation part: {part}: {counted[1]}"
    older = tmp_path / "older"
    shutil.copytree(part, older)
    for name in ("best.ckpt", "last.ckpt"):
        checkpoint = load(older / name)
        for key in ("best_batches", "validated_batches"):
            del checkpoint["callbacks"]["RunCheckpoints"][key]
        torch.save(checkpoint, older / name)
    assert f"{older}: at most 1 batch" in gptlit("compare", older).err
    flags = ("--trainer.max_steps", 7, "--trainer.limit_val_batches", 0)
    assert gptlit("fit", "--ckpt_path", part, *flags).code == 0
    assert f"{part}: {counted[1]}" in gptlit("compare", part).err


@pytest.mark.parametrize("kind", ["text", "picture", "folder"])
def test_no_file_of_the_user_is_overwritten(kind: str, runs: tuple[Path, Path], tmp_path: Path) -> None:
    """Whatever its name; nothing is printed either."""
    path = tmp_path / "mine.png"
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        shutil.copy(runs[0].parent / "small.yaml", path)
    else:
        shutil.copy(runs[0] / "curves.png", path)
    before = path.read_bytes() if path.is_file() else None
    answer = gptlit("compare", *runs, "--output", path)
    assert (answer.code, answer.out) == (2, "")
    refusal = "the file exists and is not a picture of gptlit compare: choose another name"
    assert answer.err == f"gptlit: --output {path}: {refusal}\n"
    assert (path.read_bytes() if path.is_file() else None) == before


def test_an_earlier_picture_of_the_command_is_replaced(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """As an earlier page of `gptlit play` is."""
    path = tmp_path / "both.png"
    assert gptlit("compare", *runs, "--output", path).code == 0
    before = path.read_bytes()
    assert gptlit("compare", runs[0], "--output", path).code == 0
    assert path.read_bytes() != before


def test_losses_on_different_texts_are_not_compared_silently(runs: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("to be or not to be, that is the question\n" * 100)
    fit = ("fit", "--config", runs[0].parent / "small.yaml", "--data.corpus", other, "--trainer.max_steps", 2)
    assert gptlit(*fit, "--run_dir", tmp_path / "run").code == 0
    warning = "different texts: their losses cannot be compared"
    assert warning in gptlit("compare", runs[0], tmp_path / "run").err
    assert warning not in gptlit("compare", *runs).err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("nowhere",), "gptlit: nowhere is not a run folder: name folders of runs"),
        (("x" * 300,), "is not a run folder: name folders of runs"),
        ((), "RUN"),
        (("RUN", "--output", "notes.txt"), "--output notes.txt: the picture is a PNG file"),
        (("RUN", "--output", "/dev/null/x.png"), "--output /dev/null/x.png: "),
    ],
)
def test_a_user_error_is_one_line(runs: tuple[Path, Path], arguments: tuple[str, ...], complaint: str) -> None:
    answer = gptlit("compare", *(str(runs[0]) if argument == "RUN" else argument for argument in arguments))
    assert answer.code == 2
    assert complaint in answer.err
    assert len(answer.err.strip().splitlines()) == 1


def test_a_folder_of_runs_names_them_and_an_empty_one_says_so(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """`--ckpt_path` and files of checkpoints are for other verbs."""
    folder = runs[0].parent
    refusal = "is not a run folder, it holds neither best.ckpt nor last.ckpt"
    answer = gptlit("compare", folder)
    assert (answer.code, answer.err) == (2, f"gptlit: {folder} {refusal}: name {runs[0]}, {runs[1]}\n")
    answer = gptlit("compare", tmp_path)
    assert (answer.code, answer.err) == (2, f"gptlit: {tmp_path} {refusal}: nothing was saved there\n")
    shutil.copytree(runs[0], tmp_path / "cut")
    (tmp_path / "cut" / "last.ckpt").write_bytes(b"cut")
    answer = gptlit("compare", tmp_path / "cut")
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert answer.err.startswith(f"gptlit: {tmp_path}/cut/last.ckpt: ")


def test_a_run_without_metrics_is_named(tmp_path: Path) -> None:
    config = write_config(tmp_path, trainer__logger=False)
    assert gptlit("fit", "--config", config, "--run_dir", tmp_path / "run").code == 0
    answer = gptlit("compare", tmp_path / "run")
    assert answer.code == 2
    assert "run/metrics.csv has no val/loss" in answer.err


# ---------------------------------------------------------------- the pictures


def test_fit_leaves_a_picture_of_its_curves(runs: tuple[Path, Path]) -> None:
    assert (runs[0] / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_curves_show_train_and_val_and_mark_the_best() -> None:
    train = {1: 4.0, 10: 3.0, 20: 2.0}
    val = {0: 4.2, 10: 3.1, 20: 3.4}
    axes = curves_figure(train, val, "base").axes[0]
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines["train"] == [[1, 4.0], [10, 3.0], [20, 2.0]]
    assert lines["val"] == [[0, 4.2], [10, 3.1], [20, 3.4]]
    assert lines["best 3.1000, step 10"] == [[10, 3.1]]
    colours = {line.get_label(): line.get_color() for line in axes.lines}
    assert colours["train"] != colours["val"]


def test_a_mean_of_a_training_curve_neither_lags_nor_hides_a_rise() -> None:
    """The mean of a straight line is that line; few points are drawn as they are."""
    _, axes = new_figure()
    draw_training(axes, {step: 5 - step / 100 for step in range(200)}, "tab:blue", "train")
    mean = axes.lines[1].get_ydata()
    assert mean == pytest.approx([5 - step / 100 for step in range(200)])
    _, axes = new_figure()
    draw_training(axes, {step: 5 - step / 100 for step in range(99)}, "tab:blue", "train")
    assert len(axes.lines) == 1


def test_several_runs_have_one_curve_each_in_bits_per_character() -> None:
    def run(name: str, bpc: dict[int, float]) -> Run:
        return Run(Path(name), 20, 10, 1.0, (), {}, {step: 2 * bits for step, bits in bpc.items()}, bpc)

    axes = compare_figure([run("a", {0: 6.0, 20: 3.0}), run("b", {0: 6.1, 10: 2.5, 20: 2.9})]).axes[0]
    labels = [line.get_label() for line in axes.lines]
    assert [label for label in labels if not label.startswith("_")] == ["a  3.0000 at 20", "b  2.5000 at 10"]


@pytest.mark.parametrize("name", ["lr$1_$2", "_under", "a|b", "a\nb"])
def test_any_name_of_a_run_is_shown_as_it_is(name: str) -> None:
    """Dollar signs are no mathematics for matplotlib, and `_under` is in the legend."""
    run = Run(Path("runs") / name, 20, 10, 1.0, (), {}, {0: 4.0, 20: 3.0}, {})
    one, several = curves_figure({20: 3.0}, run.val, name), compare_figure([run, run])
    for figure in (one, several):
        assert rasterize(figure).any()
    assert one.axes[0].get_title() == name
    shown = [text.get_text() for text in several.axes[0].get_legend().get_texts()]
    assert shown == [f"{name}  3.0000 at 20"] * 2
    table = table_of([run])
    assert len(table.splitlines()) == 3
    assert len({re.sub(r"\\\|", "", line).count("|") for line in table.splitlines()}) == 1


def test_columns_of_numbers_are_aligned_to_the_right() -> None:
    assert markdown([("run", "steps"), ("a", "5"), ("long name", "1,000")], texts=1) == (
        "| run       | steps |\n| --------- | ----: |\n| a         |     5 |\n| long name | 1,000 |\n"
    )
