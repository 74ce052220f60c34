"""The configurations of the lecture: each builds, each differs from the previous one by one idea, the order holds."""

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
from gptlit.cli.packaged import packaged_configs
from gptlit.cli.settings import flat
from gptlit.data import TextDataModule
from gptlit.model.config import GPTConfig
from gptlit.optim import OptimizerConfig, ScheduleConfig

RUNGS = {rung.number: rung for rung in all_rungs()}
EACH_RUNG = pytest.mark.parametrize("rung", RUNGS.values(), ids=[rung.name for rung in RUNGS.values()])
AT_SCALE = packaged_configs() / "lecture" / "at_scale.yaml"
SIZES = {"7", "8"}  # the two steps that change the model size, and every number that depends on it


def settings(path: Path) -> dict[str, Any]:
    """Return the settings of a configuration file."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@EACH_RUNG
def test_every_file_builds_all_of_its_parts(rung: Rung) -> None:
    """Guards against a typo that only shows when that step is trained."""
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
def test_a_file_differs_from_the_previous_one_by_a_few_settings(rung: Rung) -> None:
    """Guards against keys in another order, which would hide the few lines that change."""
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
def test_a_file_starts_with_what_changes_and_why(rung: Rung) -> None:
    """Two lines of comment, before any setting."""
    first, second, third = rung.path.read_text(encoding="utf-8").splitlines()[:3]
    assert all(line.startswith("# ") and line.endswith(".") for line in (first, second))
    assert not third.startswith("#")


@pytest.mark.parametrize("number", [number for number in RUNGS if int(re.sub(r"\D", "", number)) >= 8])
def test_the_overlay_at_scale_fits_every_later_step(number: str) -> None:
    """With it, each later step has the lecture's last size."""
    merged = flat(settings(RUNGS[number].path)) | flat(settings(AT_SCALE))
    gpt = {key.removeprefix("model.gpt."): value for key, value in merged.items() if key.startswith("model.gpt.")}
    assert 10.6e6 < count_parameters({**gpt, "vocab_size": 65}) < 10.9e6
    assert merged["trainer.max_steps"] % merged["trainer.val_check_interval"] == 0


def ladder(folder: Path, corpus: Path, rungs: str, *flags: str) -> dict[str, float]:
    """Return the validation losses of some steps on a short budget, by number."""
    quick = ("--data.estimate_batches=0", "--sample_text.max_new_tokens=0", "--pictures.when=never")
    place = ("--run_dir", folder, "--data.corpus", corpus, "--trainer.accelerator", "cpu")
    answer = gptlit("ladder", "--rungs", rungs, *place, *quick, *flags)
    assert answer.code == 0, answer.err
    with (folder / "ladder.csv").open(newline="", encoding="utf-8") as file:
        return {row["rung"].partition("_")[0]: float(row["val_loss"]) for row in csv.DictReader(file)}


@pytest.mark.slow
def test_layernorm_lowers_the_loss_from_small_initial_weights(tinyshakespeare: Path, tmp_path: Path) -> None:
    """With PyTorch's default initialisation the gain appears only after a thousand steps. From small weights it appears
    at once, because a residual stream without norm takes thousands of steps to grow.
    """
    budget = ("--trainer.max_steps=400", "--trainer.val_check_interval=400", "--model.gpt.init=normal")
    loss = ladder(tmp_path, tinyshakespeare, "5,6", *budget)
    assert loss["6"] < loss["5"] - 0.1
