"""The first run: without a network, on one's own text, stopped, resumed for longer, and overfitted."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from command import At, extra_callbacks, gptlit, load, write_config

from gptlit.checkpoint.run_dir import lock_folder
from gptlit.cli.fit.messages import overfitting_rows, rate_note
from gptlit.data.corpus.download import NetworkError
from gptlit.optim import ScheduleConfig


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No host can be reached."""

    def fail(*arguments: Any, **settings: Any) -> None:
        raise NetworkError("tinyshakespeare", "no route to host")

    monkeypatch.setattr("gptlit.data.corpus.sources.fetch", fail)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A run on Tiny Shakespeare that falls back to the bundled play: 5 steps are 0.01 passes over it."""
    return write_config(tmp_path, data__corpus="tinyshakespeare", data__fallback="sample", trainer__limit_val_batches=2)


@pytest.mark.usefixtures("offline")
def test_without_a_network_a_run_is_shortened_and_says_so(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    answer = gptlit("fit", "--config", config, "--run_dir", run, "--fallback_epochs", "0.01")
    assert answer.code == 0, answer.err
    assert "fallback_epochs): trainer.max_steps 20 -> 5, trainer.val_check_interval 6 -> 1" in answer.err
    assert load(run / "last.ckpt")["global_step"] == 5
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert settings["trainer"]["max_steps"] == 5
    assert settings["trainer"]["val_check_interval"] == 1
    assert (settings["data"]["corpus"], settings["data"]["fallback"]) == ("sample", None)


@pytest.mark.usefixtures("offline")
def test_a_shortened_run_resumes_with_the_text_that_it_used(config: Path, tmp_path: Path) -> None:
    """With or without a network: its configuration names the play."""
    run = tmp_path / "run"
    assert gptlit("fit", "--config", config, "--run_dir", run, "--fallback_epochs", "0.01").code == 0
    answer = gptlit("fit", "--ckpt_path", run, "--trainer.max_steps", 7)
    assert answer.code == 0, answer.err
    assert load(run / "last.ckpt")["global_step"] == 7


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("flags", "unused"),
    [
        (("--data.documents", "lines"), "data.documents is left out"),
        (("--data.separator", "|"), "data.separator is left out"),
        (("--data.documents", "lines", "--data.split", "documents"), "data.documents and data.split are left out"),
        (("--data.documents", "lines", "--data.documents", "null"), None),
    ],
    ids=["documents", "separator", "split", "undone"],
)
def test_settings_of_documents_are_not_for_the_fallback(
    config: Path, tmp_path: Path, flags: tuple[str, ...], unused: str | None
) -> None:
    """They are announced, and the run resumes and validates with the text that it used."""
    run = tmp_path / "run"
    answer = gptlit("fit", "--config", config, "--run_dir", run, "--fallback_epochs", "0.01", *flags)
    assert answer.code == 0, answer.err
    assert ("left out" in answer.err) == (unused is not None)
    assert unused is None or unused in " ".join(answer.err.split())
    for command in (("fit", "--trainer.max_steps", 7), ("validate",)):
        answer = gptlit(*command, "--ckpt_path", run)
        assert answer.code == 0, answer.err
        assert "another version" not in answer.err


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        (("--trainer.max_steps", "12", "--fallback_epochs", "0.01"), 12),
        (("--fallback_epochs", "0"), 20),
        (("--trainer.min_steps", "8", "--fallback_epochs", "0.01"), 8),
    ],
)
def test_a_length_that_is_given_is_obeyed(config: Path, tmp_path: Path, flags: tuple[str, ...], steps: int) -> None:
    run = tmp_path / "run"
    assert gptlit("fit", "--config", config, "--run_dir", run, *flags).code == 0
    assert load(run / "last.ckpt")["global_step"] == steps


@pytest.mark.usefixtures("offline")
def test_an_interval_that_is_given_is_obeyed(config: Path, tmp_path: Path) -> None:
    run, interval = tmp_path / "run", ("--trainer.val_check_interval", 4)
    answer = gptlit("fit", "--config", config, "--run_dir", run, "--fallback_epochs", "0.01", *interval)
    assert answer.code == 0, answer.err
    assert "trainer.max_steps 20 -> 5" in answer.err
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["val_check_interval"] == 4


def test_with_the_text_at_hand_nothing_is_shortened(tmp_path: Path) -> None:
    config = write_config(tmp_path, data__fallback="sample")
    run = tmp_path / "run"
    assert gptlit("fit", "--config", config, "--run_dir", run, "--fallback_epochs", "0.01").code == 0
    assert load(run / "last.ckpt")["global_step"] == 20


def test_a_negative_number_of_passes_is_refused(config: Path) -> None:
    answer = gptlit("fit", "--config", config, "--fallback_epochs", "-1")
    assert answer.code == 2
    assert "fallback_epochs is -1.0: it must be 0 (do not shorten) or more" in answer.err


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hugging Face Hub cannot be reached either."""

    def fail(name: str, *arguments: Any) -> None:
        raise NetworkError(f"{name} on the Hugging Face Hub", OSError("no route to host"))

    monkeypatch.setattr("gptlit.data.corpus.sources.open_hub", fail)


@pytest.mark.usefixtures("offline", "no_hub")
@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (
            ("--data.corpus", "someone/dataset"),
            "'someone/dataset' is no file or folder here, and someone/dataset on",
        ),
        (("--data.corpus", "hf://someone/dataset"), "someone/dataset on the Hugging Face Hub cannot be reached"),
        (("--data.corpus=https://example.org/my.txt",), "cannot be reached"),
        (("--data.corpus+=https://example.org/my.txt",), "cannot be reached"),
        (("--data", '{"corpus": "https://example.org/my.txt"}'), "cannot be reached"),
        (("--data.val_corpus", "https://example.org/my.txt"), "cannot be reached"),
        (("--config", "mine.yaml"), "cannot be reached"),
    ],
)
def test_a_corpus_that_the_user_names_is_not_replaced_by_the_fallback_of_a_configuration(
    config: Path, tmp_path: Path, flags: tuple[str, ...], what: str
) -> None:
    Path("mine.yaml").write_text("data:\n  corpus: https://example.org/my.txt\n", encoding="utf-8")
    run = tmp_path / "run"
    answer = gptlit("fit", "--config", config, *flags, "--run_dir", run)
    assert (answer.code, answer.err.count("\n")) == (2, 1), answer.err
    assert what in answer.err
    assert not run.exists()


@pytest.mark.usefixtures("offline", "no_hub")
@pytest.mark.parametrize(
    "flags",
    [
        ("--data.corpus", "someone/dataset", "--data.fallback", "sample"),
        ("--data.fallback", "sample", "--config", "mine.yaml"),
        ("--config", "mine.yaml", "--config", "fallback.yaml"),
    ],
)
def test_a_fallback_that_is_given_with_the_corpus_or_later_is_obeyed(
    config: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    Path("mine.yaml").write_text("data:\n  corpus: https://example.org/my.txt\n", encoding="utf-8")
    Path("fallback.yaml").write_text("data:\n  fallback: sample\n", encoding="utf-8")
    run = tmp_path / "run"
    answer = gptlit("fit", "--config", config, *flags, "--run_dir", run, "--fallback_epochs", "0.01")
    assert answer.code == 0, answer.err
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["corpus"] == "sample"


@pytest.mark.parametrize(
    ("flags", "fallback"),
    [
        ((), "sample"),
        (("--data.batch_size", "4"), "sample"),
        (("--data.corpus", "my.txt"), None),
        (("--data.corpus", "my.txt", "--data.fallback", "sample"), "sample"),
    ],
)
def test_print_config_shows_the_fallback_that_is_used(
    config: Path, flags: tuple[str, ...], fallback: str | None
) -> None:
    answer = gptlit("fit", "--config", config, *flags, "--print_config")
    assert answer.code == 0, answer.err
    assert yaml.safe_load(answer.out)["data"]["fallback"] == fallback


# ---------------------------------------------------------------- names of runs


@pytest.mark.parametrize(
    ("file", "name"),
    [("my.txt", "small-my"), ("my novel (2).txt", "small-my-novel-2"), ("Gedichte.TXT", "small-Gedichte")],
)
def test_a_run_on_a_text_of_ones_own_is_named_after_it(tmp_path: Path, file: str, name: str) -> None:
    config = write_config(tmp_path)
    (tmp_path / "text.txt").rename(tmp_path / file)
    flags = ("--data.corpus", tmp_path / file, "--trainer.max_steps", 1)
    assert gptlit("fit", "--config", config, *flags).code == 0
    assert [path.name for path in Path("checkpoints").iterdir()] == [name]


@pytest.mark.parametrize("flags", [(), ("--run_dir", "checkpoints/mine")])
def test_a_run_with_the_settings_of_another_one_is_named_after_it(
    tmp_path: Path, flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a folder `checkpoints/config`; a configuration of that name that is no run keeps it."""
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path, trainer__max_steps=2)
    assert gptlit("fit", "--config", config, *flags).code == 0
    (first,) = (tmp_path / "checkpoints").iterdir()
    assert gptlit("fit", "--config", first.relative_to(tmp_path) / "config.yaml").code == 0
    assert gptlit("fit", "--config", config.rename(tmp_path / "config.yaml")).code == 0
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {first.name, f"{first.name}-2", "config"}


def test_a_run_that_ended_before_its_first_checkpoint_can_be_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder holds the settings and the beginning of the curves."""
    monkeypatch.chdir(tmp_path)
    config, run = write_config(tmp_path, trainer__max_steps=2), Path("checkpoints/my run")
    assert gptlit("fit", "--config", config, "--run_dir", run).code == 0
    for name in ("best.ckpt", "last.ckpt", "metrics.csv"):
        (run / name).unlink()
    for verb in ("fit", "predict"):
        answer = gptlit(verb, "--ckpt_path", run)
        assert (answer.code, answer.err.count("\n")) == (2, 1)
        assert answer.err.endswith(": the run ended before its first checkpoint: start it again\n")
    lock = lock_folder(run)
    assert lock is not None
    assert gptlit("predict", "--ckpt_path", run).err.endswith(" has not saved its first checkpoint yet\n")
    os.close(lock)
    assert gptlit("fit", "--config", run / "config.yaml").code == 0
    assert sorted(path.name for path in Path("checkpoints").iterdir()) == ["my run", "my run-2"]


@pytest.mark.parametrize(
    ("here", "file", "flags", "name"),
    [
        ("small", "config.yaml", (), "small"),
        ("small/samples", "../config.yaml", (), "small"),
        ("small", "../latest/config.yaml", (), "small"),  # a symbolic link to the folder
        ("small", "config.yaml", ("--data.corpus", "other.txt"), "small-other"),
        ("small", "config.yaml", ("--data.corpus", "small.txt"), "small-small"),
        ("small-my", "config.yaml", ("--data.corpus", "my.txt"), "small-my"),
    ],
)
def test_a_configuration_of_a_run_is_found_from_everywhere(
    tmp_path: Path, here: str, file: str, flags: tuple[str, ...], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a folder named `..`, and against the name of a text that is appended twice."""
    run = tmp_path / here.partition("/")[0]
    (tmp_path / here).mkdir(parents=True)
    config = write_config(tmp_path, trainer__max_steps=1)
    config.rename(run / "config.yaml")
    (run / "last.ckpt").touch()
    (tmp_path / "latest").symlink_to(run)
    for text in ("other.txt", "small.txt", "my.txt"):
        (tmp_path / here / text).write_text((tmp_path / "text.txt").read_text())
    monkeypatch.chdir(tmp_path / here)
    assert gptlit("fit", "--config", file, *flags).code == 0
    assert [path.name for path in Path("checkpoints").iterdir()] == [name]


# ---------------------------------------------------------------- stopped, resumed, overfitted


def test_ctrl_c_names_both_checkpoints_with_their_losses_and_the_command_that_resumes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    stop = At("on_train_batch_end", 9, lambda: os.kill(os.getpid(), signal.SIGINT))
    with extra_callbacks(stop):
        answer = gptlit("fit", "--config", write_config(tmp_path), "--run_dir", run)
    assert answer.code == 130
    best = load(run / "best.ckpt")
    state = load(run / "last.ckpt")["callbacks"]["RunCheckpoints"]
    lines = answer.err.strip().splitlines()[-4:]
    assert lines[0] == "gptlit: stopped by SIGINT after step 10"
    assert lines[1] == f"best.ckpt (step {best['global_step']}): val loss {state['best_score']:.4f}"
    assert lines[2].startswith("last.ckpt (step 10) is intact, train loss ")
    assert lines[3] == f"resume with: gptlit fit --ckpt_path {run}"


@pytest.mark.parametrize(
    ("shape", "before", "after", "note"),
    [
        ("linear", 1000, 2000, "the linear schedule of 2,000 steps is at 50% of its peak at step 1,000"),
        ("cosine", 1000, 4000, "the cosine schedule of 4,000 steps is at 85% of its peak at step 1,000"),
        ("constant", 1000, 2000, None),
        ("linear", 1000, 1000, None),
    ],
)
def test_a_longer_run_says_what_happens_to_the_learning_rate(
    shape: Any, before: int, after: int, note: str | None
) -> None:
    module: Any = SimpleNamespace(schedule=ScheduleConfig(shape=shape))
    said = rate_note(module, 1000, {"trainer.max_steps": (before, after)})
    if note is None:
        assert said is None
    else:
        assert said is not None
        assert note in said
        assert said.endswith("(that of 1,000 steps: at 0%)")
    assert rate_note(module, 1000, {}) is None


def test_the_note_on_the_learning_rate_knows_the_earlier_schedule() -> None:
    module: Any = SimpleNamespace(schedule=ScheduleConfig(shape="linear"))
    changes = {"trainer.max_steps": (1000, 2000), "model.schedule.shape": ("constant", "linear")}
    said = rate_note(module, 500, changes)
    assert said is not None
    assert said.endswith("is at 75% of its peak at step 500 (the constant one of 1,000 steps: at 100%)")


def test_resuming_a_finished_run_for_longer_prints_the_rate(tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = write_config(tmp_path, model__schedule={"shape": "linear"})
    assert gptlit("fit", "--config", config, "--run_dir", run).code == 0
    answer = gptlit("fit", "--ckpt_path", run, "--trainer.max_steps", 40)
    assert "the linear schedule of 40 steps is at 50% of its peak at step 20 (that of 20 steps: at 0%)" in answer.err


def test_a_loss_far_above_its_best_is_called_overfitting() -> None:
    assert overfitting_rows(1.5, 400, 1.57) == []
    rows = overfitting_rows(1.6103, 500, 3.2984)
    assert rows[0] == ("overfitting", "val loss is 3.2984, but was 1.6103 at step 500 (best.ckpt)")
    text = " ".join(value for _, value in rows)
    for advice in ("--trainer.max_steps 500", "--model.gpt.dropout", "--model.gpt.token_noise", "longer text"):
        assert advice in text
    assert all(len(value) <= 80 - len("training time  ") for _, value in rows)


@pytest.mark.parametrize(("best", "last"), [(0.0, 0.0), (0.00001, 0.00004)])
def test_losses_that_print_alike_are_not_called_overfitting(best: float, last: float) -> None:
    assert overfitting_rows(best, 400, last) == []
    assert overfitting_rows(best, 400, last + 0.0001) != []


def test_a_text_of_one_character_trains_and_is_described_in_the_singular(tmp_path: Path) -> None:
    config = write_config(tmp_path, data__batch_size=1, trainer__max_steps=1)
    (tmp_path / "text.txt").write_text("a" * 5000)
    answer = gptlit("fit", "--config", config, "--run_dir", tmp_path / "run")
    assert answer.code == 0, answer.err
    assert "5,000 characters, 1 token\n" in answer.err
    assert "1 sequence × 16 tokens = 16 tokens per step" in answer.err
    assert "1 step\n" in answer.err
    assert "overfitting" not in answer.err


def test_a_finished_run_names_the_settings_that_it_does_not_use(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert gptlit("fit", "--config", write_config(tmp_path), "--run_dir", run).code == 0
    answer = gptlit("fit", "--ckpt_path", run)
    assert answer.err.splitlines()[0].endswith("nothing is left to do")
    flags = ("--model.optimizer.muon_lr", "0.5", "--trainer.max_steps", "10", "--run_dir", "other")
    answer = gptlit("fit", "--ckpt_path", run, *flags)
    assert answer.code == 0
    said = "made 20 steps and trainer.max_steps is 10: nothing is left to do; not used: model.optimizer.muon_lr 0.5, "
    assert f"{said}run_dir other\n" in answer.err


def test_a_run_folder_that_was_asked_for_and_is_taken_is_named_with_the_one_used_instead(tmp_path: Path) -> None:
    config, run = write_config(tmp_path, trainer__max_steps=1), tmp_path / "run"
    assert "exists" not in gptlit("fit", "--config", config, "--run_dir", run).err
    assert f"{run} exists: this run goes to {run}-2\n" in gptlit("fit", "--config", config, "--run_dir", run).err
    resumed = gptlit("fit", "--ckpt_path", run, "--run_dir", run, "--trainer.max_steps", 2)
    assert "exists" not in resumed.err, "the run continues in its own folder"


def test_the_opening_lines_fit_a_terminal_of_80_columns(tmp_path: Path) -> None:
    """Apart from paths, which may be longer."""
    config = write_config(tmp_path)
    said = gptlit("fit", "--config", config, "--run_dir", tmp_path / "run").err.splitlines()
    opening = said[: next(number for number, line in enumerate(said) if line.startswith("step") and " of 20" in line)]
    names = [line[:10].strip() for line in opening]
    assert names[:6] == ["gptlit 0.1", "config", "text", "model", "step", "length"]
    assert all(len(line) <= 80 for line in opening if str(tmp_path) not in line)
    assert f"config      {config}" in opening
