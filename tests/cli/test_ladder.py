"""`gptlit ladder`: what it writes, that it resumes where it was stopped, and what it refuses."""

import csv
import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import PLAY, Answer, gptlit, load

from gptlit.cli.ladder import command as ladder
from gptlit.cli.ladder.report import Result, curves_figure, gain, markdown_table, with_spread
from gptlit.cli.ladder.rungs import all_rungs
from gptlit.data.corpus.download import NetworkError

SHORT = (
    "--trainer.max_steps=6",
    "--trainer.val_check_interval=3",
    "--data.estimate_batches=2",
    "--sample_text.max_new_tokens=20",
    "--pictures.when=never",
    "--trainer.accelerator=cpu",
)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A short text, so that validation is fast."""
    path = tmp_path / "text.txt"
    path.write_text(PLAY.read_text(encoding="utf-8")[:4000], encoding="utf-8")
    return path


def climb(text: Path, *arguments: str, rungs: str = "1,2", run_dir: str = "ladder") -> Answer:
    """Run the ladder for a few steps on a text, in the folder of that text."""
    place = ("--run_dir", text.parent / run_dir, "--data.corpus", text)
    return gptlit("ladder", "--rungs", rungs, *place, *SHORT, *arguments)


def numbers(folder: Path) -> list[dict[str, str]]:
    """Return the rows of ladder.csv without the times."""
    with (folder / "ladder.csv").open(newline="", encoding="utf-8") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def names_on_page(path: Path) -> list[str]:
    """Return the names of the models on a page of `gptlit play`."""
    content = re.search(r'<script type="application/json" id="content">(.*?)</script>', path.read_text("utf-8"))
    assert content is not None
    return [model["name"] for model in json.loads(content[1])["models"]]


def test_two_rungs_with_two_seeds_give_a_table_numbers_and_a_picture(text: Path) -> None:
    """Every number is compared with the checkpoint of its run."""
    answer = climb(text, "--seeds", "2")
    root = text.parent / "ladder"
    assert answer.code == 0, answer.err
    assert answer.out.strip()
    assert answer.out.strip() in (root / "ladder.md").read_text(encoding="utf-8")
    assert (root / "ladder.png").read_bytes().startswith(b"\x89PNG")
    assert names_on_page(root / "ladder.html") == ["1_bigram", "2_head"], "the models of the first seed"

    rows = numbers(root)
    names = ["1_bigram", "2_head", "1_bigram-seed2", "2_head-seed2"]
    assert [row["rung"] + ("-seed2" if row["seed"] == "1338" else "") for row in rows] == names
    assert len({row["val_loss"] for row in rows}) == 4, "every configuration and every seed is its own run"
    for name, row in zip(names, rows, strict=True):
        exact = gptlit("validate", "--ckpt_path", root / name / "last.ckpt").out
        assert f"val/loss {float(row['val_loss']):.5f}"[:-1] in exact
        shapes = [tuple(t.shape) for key, t in load(root / name / "last.ckpt")["state_dict"].items() if "net." in key]
        assert int(row["parameters"]) == sum(a * (b[0] if b else 1) for a, *b in shapes)
        assert row["sample"] == (root / name / "samples" / "step-000006.txt").read_text(encoding="utf-8")


def test_a_ladder_that_was_stopped_resumes_and_ends_as_an_undisturbed_one(text: Path) -> None:
    """Ctrl-C in the second run: the first is not trained again, the second not from its start."""
    assert climb(text, run_dir="undisturbed").code == 0

    class StoppingBar(ladder.RungBar):
        def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
            if trainer.global_step == 3 and trainer.lightning_module.gpt.n_layer:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ladder, "RungBar", StoppingBar)
        answer = climb(text)
    root = text.parent / "ladder"
    assert answer.code == 130
    assert "resume the ladder with: gptlit ladder --rungs 1,2" in answer.err
    assert 3 <= load(root / "2_head" / "last.ckpt")["global_step"] < 6
    first_rung = (root / "1_bigram" / "last.ckpt").stat().st_mtime_ns

    assert climb(text).code == 0
    assert (root / "1_bigram" / "last.ckpt").stat().st_mtime_ns == first_rung
    assert numbers(root) == numbers(text.parent / "undisturbed")
    assert sorted(path.name for path in root.iterdir() if path.is_dir()) == ["1_bigram", "2_head"]


def test_a_signal_at_the_end_of_a_run_does_not_start_the_next_one(text: Path) -> None:
    """Guards against a Ctrl-C between the last step and the next run that is forgotten."""

    class StoppingBar(ladder.RungBar):
        def on_train_end(self, *arguments: Any) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ladder, "RungBar", StoppingBar)
        answer = climb(text)
    assert answer.code == 130
    assert "resume the ladder with" in answer.err
    assert [path.name for path in (text.parent / "ladder").iterdir()] == ["1_bigram"]


def test_a_finished_ladder_only_reads(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished runs are not trained again."""
    rate = ("--model.optimizer.lr", "1e-3")
    first = climb(text, *rate, rungs="1")
    monkeypatch.setattr(ladder, "train_rung", lambda *arguments: pytest.fail("nothing was left to train"))
    assert climb(text, *rate, rungs="1").out == first.out


def test_a_folder_without_a_checkpoint_after_a_crash_is_started_again(text: Path) -> None:
    """Guards against a run in `1_bigram-2`, which the table would not find."""
    folder = text.parent / "ladder" / "1_bigram"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("seed_everything: 1\n")
    assert climb(text, rungs="1").code == 0
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == ["1_bigram"]
    assert (folder / "last.ckpt").is_file()


@pytest.mark.parametrize("name", ["notes.txt", "samples/mine.txt", "deep/er/notes.txt"])
@pytest.mark.parametrize("begun", [True, False])
def test_files_of_the_user_are_kept(text: Path, name: str, begun: bool) -> None:
    """The folder of a run without a checkpoint was removed with everything in it."""
    folder = text.parent / "ladder" / "2_head"
    notes = folder / name
    notes.parent.mkdir(parents=True)
    notes.write_text("of the user")
    if begun:
        (folder / "config.yaml").write_text("seed_everything: 1\n")
    answer = climb(text)
    assert answer.code == 2
    assert answer.err == f"gptlit: {folder} holds {name}, which no run of the ladder wrote: choose another --run_dir\n"
    assert notes.read_text() == "of the user"
    assert not (folder.parent / "1_bigram").exists(), "refused before anything is trained"


@pytest.mark.parametrize("name", ["ladder.md", "ladder.csv", "ladder.html"])
def test_tables_of_the_user_are_kept(text: Path, name: str) -> None:
    """They were replaced; the page was refused only after all runs."""
    table = text.parent / "ladder" / name
    table.parent.mkdir()
    table.write_text("of the user")
    answer = climb(text)
    assert answer.code == 2
    complaint = "was not written by gptlit ladder: rename it, or choose another folder"
    assert answer.err == f"gptlit: --run_dir {table} {complaint}\n"
    assert table.read_text() == "of the user"
    assert [path.name for path in table.parent.iterdir()] == [name]


def test_a_run_that_was_killed_before_its_first_checkpoint_is_started_again(text: Path) -> None:
    """With everything that it has written by then."""

    class Killed(ladder.RungBar):
        def on_train_batch_start(self, trainer: Any, *arguments: Any) -> None:
            if trainer.global_step == 2:
                shutil.copytree(root / "1_bigram", root / "killed")

    root = text.parent / "ladder"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ladder, "RungBar", Killed)
        assert climb(text, rungs="1").code == 0
    expected = numbers(root)
    shutil.rmtree(root / "1_bigram")
    shutil.move(root / "killed", root / "1_bigram")
    for checkpoint in (root / "1_bigram").glob("*.ckpt"):  # of the validation before the first step
        checkpoint.unlink()
    assert (root / "1_bigram" / "config.yaml").is_file()
    assert climb(text, rungs="1").code == 0
    assert numbers(root) == expected


@pytest.mark.parametrize(
    ("stored", "wanted", "expected"),
    [
        (0.001, "1e-3", True),
        ("2024", 2024, True),
        ([0.9, 0.95], ["9e-1", 0.95], True),
        (None, None, True),
        (0.001, 0.002, False),
        ("a", "b", False),
        ([0.9], [0.9, 0.95], False),
        (True, False, False),
    ],
)
def test_a_setting_is_equal_however_it_is_written(stored: Any, wanted: Any, expected: bool) -> None:
    """Guards against a ladder that refuses its own runs: PyYAML reads 1e-3 as a string."""
    assert ladder.same(stored, wanted) is expected


def test_runs_with_other_settings_are_refused(text: Path) -> None:
    """Guards against a table that compares runs of 6 and of 5,000 steps."""
    assert climb(text, rungs="1").code == 0
    answer = climb(text, "--model.optimizer.lr=0.5", rungs="1")
    assert answer.code == 2
    assert "1_bigram holds a run with model.optimizer.lr 0.003, not 0.5: choose another --run_dir" in answer.err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--rungs", "3,99"), "there is no configuration 99: choose from 1, 1b, 2, 3"),
        (("--seeds", "0"), "--seeds is 0"),
        (("--seeds", "many"), "--seeds"),
        (("--trainer.devices", "2"), "trains on one device"),
        (("--ckpt_path", "somewhere"), "has no --ckpt_path"),
        (("--model.gpt.n_laier", "3"), "n_layer"),
    ],
)
def test_a_user_error_is_one_line_and_leaves_no_folder(
    arguments: tuple[str, ...], complaint: str, tmp_path: Path
) -> None:
    answer = gptlit("ladder", "--run_dir", tmp_path / "ladder", *arguments)
    assert answer.code == 2
    assert complaint in answer.err
    assert len(answer.err.strip().splitlines()) == 1
    assert not (tmp_path / "ladder").exists()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("devices", 2),
        ("fast_dev_run", True),
        ("limit_val_batches", 0.5),
        ("logger", False),
        ("enable_checkpointing", False),
    ],
)
def test_settings_of_a_file_are_refused_as_flags_are(setting: str, value: object, tmp_path: Path) -> None:
    """They were found after the first run, or by a second process that ended."""
    file = tmp_path / "more.yaml"
    file.write_text(yaml.safe_dump({"trainer": {setting: value}}))
    by_file, by_flag = (
        gptlit("ladder", "--run_dir", tmp_path / "ladder", *arguments)
        for arguments in (("--config", file), (f"--trainer.{setting}", str(value).lower()))
    )
    assert by_file.code == 2
    assert f"trainer.{setting}" in by_file.err
    assert by_file.err == by_flag.err
    assert len(by_file.err.splitlines()) == 1
    assert not (tmp_path / "ladder").exists()


@pytest.mark.parametrize(
    "text_flag",
    ["--sample_text.prompt=ROMEO: what: now", "--sample_text.prompt=%", "--sample_text.prompt=null"],
)
def test_texts_are_taken_as_typed(text: Path, text_flag: str) -> None:
    """They were read as YAML: a traceback, or another text."""
    text.write_text(text.read_text() + "%", encoding="utf-8")
    answer = climb(text, text_flag, rungs="1")
    assert answer.code == 0, answer.err
    config = load(text.parent / "ladder" / "1_bigram" / "last.ckpt")["gptlit"]["config"]
    assert yaml.safe_load(config)["sample_text"]["prompt"] == text_flag.partition("=")[2]


@pytest.mark.parametrize("name", ["x: y.txt", "@a.txt", "1e3"])
def test_a_second_start_knows_the_name_of_the_text(text: Path, name: str) -> None:
    """It was refused, since `x: y.txt` is a mapping in YAML."""
    text.rename(text.with_name(name))
    for _ in range(2):
        answer = climb(Path(name), rungs="1")
        assert answer.code == 0, answer.err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--config", "broken.yaml"), "--config broken.yaml, line 3: this is not YAML"),
        (("--config", "absent.yaml"), "--config absent.yaml: there is no such file"),
        (("--trainer.max_steps", "abc"), "--trainer.max_steps is abc: it must be a whole number"),
        (("--trainer.max_steps",), "--trainer.max_steps needs a value"),
        (("--seed_everything", "many"), "--seed_everything is many: it must be a whole number"),
    ],
)
def test_errors_are_those_of_fit(text: Path, arguments: tuple[str, ...], complaint: str) -> None:
    """They were tracebacks."""
    Path("broken.yaml").write_text("trainer:\n  max_steps: [1\n")
    answer = gptlit("ladder", "--run_dir", "ladder", *arguments)
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert answer.err.startswith(f"gptlit: {complaint}")
    assert not Path("ladder").exists()


def test_a_seed_in_a_file_is_obeyed(text: Path) -> None:
    Path("seed.yaml").write_text("seed_everything: 5\n")
    assert climb(text, "--config", "seed.yaml", rungs="1").code == 0
    assert numbers(text.parent / "ladder")[0]["seed"] == "5"


def test_runs_on_the_fallback_are_known_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second start was refused, since a run on its fallback names that as its text, and is shorter."""

    def unreachable(*arguments: Any, **settings: Any) -> None:
        raise NetworkError("tinyshakespeare", "no route to host")

    monkeypatch.setattr("gptlit.data.corpus.sources.fetch", unreachable)
    data = ("--data.corpus", "tinyshakespeare", "--data.fallback", "sample", "--fallback_epochs", 0.01)
    command = ("ladder", "--run_dir", "ladder", "--rungs", "1", *data, *SHORT[2:])
    assert gptlit(*command).code == 0
    assert load(Path("ladder/1_bigram/last.ckpt"))["global_step"] < 100
    monkeypatch.setattr(ladder, "train_rung", lambda *arguments: pytest.fail("nothing was left to train"))
    answer = gptlit(*command)
    assert answer.code == 0, answer.err


def test_runs_on_different_texts_are_not_compared(text: Path) -> None:
    """Guards against a table of runs some of which have used their fallback."""
    assert climb(text, rungs="1").code == 0
    text.write_text(text.read_text() + "The end.", encoding="utf-8")
    answer = climb(text)
    assert answer.code == 2
    assert "their losses cannot be compared; choose another --run_dir" in answer.err


def test_a_run_that_a_callback_ended_is_finished(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It trained on at every start, and the table changed."""
    stop = "{class_path: lightning.pytorch.callbacks.EarlyStopping, init_args: {monitor: val/loss, min_delta: 10.0}}"
    flags = (f"--trainer.callbacks=[{stop}]", "--trainer.val_check_interval=1")
    first = climb(text, *flags, rungs="1")
    assert first.code == 0, first.err
    assert load(text.parent / "ladder" / "1_bigram" / "last.ckpt")["global_step"] < 6
    monkeypatch.setattr(ladder, "train_rung", lambda *arguments: pytest.fail("nothing was left to train"))
    assert climb(text, *flags, rungs="1").out == first.out


def result(number: str, loss: float) -> Result:
    """A run of a configuration that ended with a loss."""
    (rung,) = (rung for rung in all_rungs() if rung.number == number)
    return Result(rung, 1, 10, 100, None, loss, loss / 0.69, 60.0, ((100, loss),), "")


def column(table: str, name: str) -> list[str]:
    """Return a column of a Markdown table, without its header."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row[header.index(name)] for row in rows]


def test_short_runs_on_another_text_have_no_figure_of_the_lecture(text: Path) -> None:
    """Losses of the lecture are of 5,000 steps on Tiny Shakespeare; columns without values are left out."""
    table = climb(text, "--data.estimate_batches=0").out
    assert "lecture" not in table
    assert "train estimate" not in table


def test_what_changed_does_not_name_settings_that_flags_make_equal(text: Path) -> None:
    """The first two configurations differ in max_steps and lr; here the flags fix max_steps for both."""
    changes = {rung.number: rung.change for rung in all_rungs()}
    assert "max_steps" in changes["2"]
    assert "lr" in changes["2"]
    change = column(climb(text).out, "what changed")[1]
    assert "max_steps" not in change
    assert "lr" in change


def test_short_runs_validate_often_enough_for_a_curve(text: Path) -> None:
    """With the interval of 5,000 steps, a run of 40 would validate once."""
    steps = ("--trainer.max_steps=40", "--sample_text.max_new_tokens=1", "--pictures.when=never")
    place = ("--run_dir", text.parent / "ladder", "--data.corpus", text, "--trainer.accelerator=cpu")
    assert gptlit("ladder", "--rungs", "1", *place, *steps).code == 0
    with (text.parent / "ladder" / "1_bigram" / "metrics.csv").open(newline="", encoding="utf-8") as file:
        validated = [int(row["step"]) for row in csv.DictReader(file) if row["val/loss"]]
    assert [step for step in validated if step] == list(range(4, 41, 4))


@pytest.mark.parametrize("steps", [10, 5_000])
def test_the_picture_shows_a_curve_for_every_configuration(steps: int) -> None:
    """A logarithmic axis for long runs, on which step 0 has no place; a linear one for short runs."""
    results = [
        replace(result(number, 2.0), steps=steps, curve=((0, 4.2), (steps // 2, 2.5), (steps, 2.0)))
        for number in ("1", "2")
    ]
    axes = curves_figure(results).axes[0]
    drawn = [line.get_xdata().tolist() for line in axes.lines]
    expected = [0, steps // 2, steps] if steps < 1_000 else [steps // 2, steps]
    assert drawn == [expected, expected]
    assert axes.get_xscale() == ("linear" if steps < 1_000 else "log")


def test_a_gain_within_the_spread_is_in_brackets() -> None:
    """Noise is not shown as progress."""
    assert gain({1: 2.50, 2: 2.52}, {1: 2.40, 2: 2.41}) == "0.105 ± 0.007"
    assert gain({1: 2.50, 2: 2.52}, {1: 2.49, 2: 2.53}) == "(0.000 ± 0.014)"
    assert gain({1: 2.50}, {1: 2.55}) == "(-0.050)"
    assert gain({}, {1: 2.5}) == ""
    assert with_spread([2.0, 2.2]) == "2.1000 ± 0.1414"
    assert with_spread([2.0]) == "2.0000"


def test_a_gain_is_taken_seed_by_seed() -> None:
    """Runs of one seed see the same batches; runs of different seeds are not compared."""
    assert gain({1: 2.30, 2: 2.27, 3: 2.20}, {2: 2.26, 1: 2.29}) == "0.010 ± 0.000"
    assert gain({1: 2.30}, {2: 2.29}) == ""


def test_the_gain_is_relative_to_the_configuration_that_is_continued() -> None:
    """Number 8 continues number 6: the one between them has another size."""
    table = markdown_table([result("6", 2.07), result("7", 1.5), result("8", 1.97)])
    assert column(table, "gain") == ["", "0.570", "0.100"]


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--model.init_from=run", "--model.init_from would give every configuration the same model"),
        ("--model.optimizer.muon_lr=0.1", "--model.optimizer.muon_lr is given, but model.optimizer.name is adamw"),
        ("--data.split_seed=3", "--data.split_seed is given, but data.split is tail"),
        ("--data.corpus+=more.txt", "gptlit ladder has no --data.corpus+="),
    ],
)
def test_settings_that_change_nothing_in_any_run_are_refused(text: Path, flag: str, said: str) -> None:
    answer = climb(text, flag)
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert answer.err.startswith(f"gptlit: {said}")
    assert not (text.parent / "ladder").exists()


def test_a_setting_that_changes_some_of_the_runs_is_taken(text: Path) -> None:
    answer = climb(text, "--model.optimizer.muon_lr=0.1", rungs="1,13")
    assert answer.code == 0, answer.err
    stored = load(text.parent / "ladder" / "13_muon" / "last.ckpt")["hyper_parameters"]
    assert stored["optimizer"]["muon_lr"] == 0.1
