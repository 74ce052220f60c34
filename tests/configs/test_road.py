"""The whole road, from the lecture's rungs to what came after: its files, its order, and its pictures."""

import csv
import difflib
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import yaml
from command import gptlit

from gptlit.cli.ladder.report import count_parameters
from gptlit.cli.ladder.rungs import Rung, all_rungs
from gptlit.cli.settings import flat, packaged_configs
from gptlit.data import TextDataModule
from gptlit.model.config import GPTConfig
from gptlit.optim import OptimizerConfig, ScheduleConfig

RUNGS = {rung.number: rung for rung in all_rungs()}
EACH_RUNG = pytest.mark.parametrize("rung", RUNGS.values(), ids=[rung.name for rung in RUNGS.values()])
AT_SCALE = packaged_configs() / "lecture" / "at_scale.yaml"
SIZES = {"7", "8"}  # the two rungs that change the size, and with it every number that belongs to one


def settings(path: Path) -> dict[str, Any]:
    """A configuration."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


# ---------------------------------------------------------------- the files


@EACH_RUNG
def test_every_file_builds_all_of_its_parts(rung: Rung) -> None:
    """Guards against a typo that only shows when somebody reaches that rung."""
    given = settings(rung.path)
    assert set(given) == {"seed_everything", "model", "data", "trainer", "save_every_n_steps"}
    assert set(given["model"]) <= {"gpt", "optimizer", "schedule", "matmul_precision"}
    GPTConfig(**given["model"]["gpt"])
    OptimizerConfig(**given["model"]["optimizer"])
    ScheduleConfig(**given["model"]["schedule"])
    TextDataModule(**given["data"])
    pl.Trainer(**given["trainer"], accelerator="cpu", logger=False, check_val_every_n_epoch=None)
    assert given["trainer"]["max_steps"] % given["trainer"]["val_check_interval"] == 0


@EACH_RUNG
def test_a_file_differs_from_the_one_before_it_by_its_idea_alone(rung: Rung) -> None:
    """A diff of four lines is the lesson; keys in another order would bury it."""
    if not rung.before:
        return
    before, after = (
        [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
        for path in (RUNGS[rung.before].path, rung.path)
    )
    added = [line for line in difflib.ndiff(before, after) if line.startswith("+ ")]
    removed = [line for line in difflib.ndiff(before, after) if line.startswith("- ")]
    assert 0 < max(len(added), len(removed)) <= (9 if rung.number in SIZES else 5)


@EACH_RUNG
def test_a_file_opens_with_what_is_new_and_why_it_helps(rung: Rung) -> None:
    """Two sentences, before any setting."""
    first, second, third = rung.path.read_text(encoding="utf-8").splitlines()[:3]
    assert all(line.startswith("# ") and line.endswith(".") for line in (first, second))
    assert not third.startswith("#")


@pytest.mark.parametrize("number", [number for number in RUNGS if int(re.sub(r"\D", "", number)) >= 8])
def test_every_later_rung_has_a_scaled_up_version(number: str) -> None:
    """The overlay must fit what it lies on: the lecture's last size, with any of the later ideas."""
    merged = flat(settings(RUNGS[number].path)) | flat(settings(AT_SCALE))
    gpt = {key.removeprefix("model.gpt."): value for key, value in merged.items() if key.startswith("model.gpt.")}
    assert 10.6e6 < count_parameters({**gpt, "vocab_size": 65}) < 10.9e6
    assert merged["trainer.max_steps"] % merged["trainer.val_check_interval"] == 0


# ---------------------------------------------------------------- the order


def ladder(folder: Path, corpus: Path, rungs: str, *flags: str) -> dict[str, float]:
    """Validation losses of some rungs on a short budget, by number."""
    quick = ("--data.estimate_batches=0", "--sample_text.max_new_tokens=0", "--pictures.when=never")
    place = ("--run_dir", folder, "--data.corpus", corpus, "--trainer.accelerator", "cpu")
    answer = gptlit("ladder", "--rungs", rungs, *place, *quick, *flags)
    assert answer.code == 0, answer.err
    with (folder / "ladder.csv").open(newline="", encoding="utf-8") as file:
        return {row["rung"].partition("_")[0]: float(row["val_loss"]) for row in csv.DictReader(file)}


def test_layernorm_makes_up_for_bad_first_weights(tinyshakespeare: Path, tmp_path: Path) -> None:
    """Residual > layernorm. With PyTorch's first weights the gain shows after a thousand steps only; with small ones,
    which a residual stream without norm takes thousands of steps to grow out of, at once.
    """
    budget = ("--trainer.max_steps=400", "--trainer.val_check_interval=400", "--model.gpt.init=normal")
    loss = ladder(tmp_path, tinyshakespeare, "5,6", *budget)
    assert loss["6"] < loss["5"] - 0.1
