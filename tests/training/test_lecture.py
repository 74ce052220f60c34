"""The rungs of the lecture: published numbers of parameters, small steps, and the order of their losses."""

import difflib
import itertools
from pathlib import Path

import pytest
import torch
import yaml
from test_module import quiet_trainer

from gptlit import GPT, GPTConfig, LitGPT, OptimizerConfig, ScheduleConfig, TextDataModule
from gptlit.cli.packaged import packaged_configs

FOLDER = packaged_configs() / "lecture"
PUBLISHED = {
    "1_bigram": 4_225,
    "1b_positions": 4_481,
    "5_residual": 41_921,
    "6_layernorm": 42_369,
    "7_scaled": 10_788_929,
}
OURS = {"2_head": 8_609, "3_heads": 8_609, "4_feedforward": 10_721}  # with an output projection in attention
ROAD = ["1_bigram", "1b_positions", "2_head", "3_heads", "4_feedforward", "5_residual", "6_layernorm"]


def architecture(name: str) -> GPTConfig:
    """Return the GPT of a rung, with the 65 characters of Tiny Shakespeare."""
    settings = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    return GPTConfig(vocab_size=65, **settings["model"]["gpt"])


@pytest.mark.parametrize(("name", "count"), (PUBLISHED | OURS).items())
def test_a_rung_has_its_number_of_parameters(name: str, count: int) -> None:
    """The lecture's own counts, where one GPT with switches can have them."""
    assert sum(parameter.numel() for parameter in GPT(architecture(name)).parameters()) == count


@pytest.mark.parametrize(("before", "after"), list(itertools.pairwise(ROAD)))
def test_each_rung_is_a_small_step(before: str, after: str) -> None:
    """What is new must be visible: a few lines of YAML, apart from the two sentences on top."""
    texts = [(FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[2:] for name in (before, after)]
    added = [line for line in difflib.ndiff(*texts) if line.startswith("+ ")]
    assert 1 <= len(added) <= 6


@pytest.mark.parametrize("name", [*ROAD, "7_scaled"])
def test_a_rung_opens_with_what_is_new_and_why(name: str) -> None:
    """Two sentences, before any setting."""
    first, second, third = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[:3]
    assert all(line.startswith("# ") and line.endswith(".") for line in (first, second))
    assert not third.startswith("#")


def loss_after(name: str, corpus: Path, folder: Path, steps: int) -> float:
    """Validation loss of a rung after few steps at a high rate."""
    module = LitGPT(
        GPTConfig(**{**architecture(name).__dict__, "vocab_size": 0}), OptimizerConfig(name="adamw", lr=1e-2)
    )
    data = TextDataModule(str(corpus), block_size=8, batch_size=64)
    trainer = quiet_trainer(folder, max_steps=steps, limit_val_batches=20, val_check_interval=steps)
    trainer.fit(module, datamodule=data)
    return float(trainer.validate(module, datamodule=data, verbose=False)[0]["val/loss"])


@pytest.mark.slow
def test_the_order_of_the_road_holds_on_a_short_budget(tinyshakespeare: Path, tmp_path: Path) -> None:
    """Bigram, one head, residual stream: each lower than the one before, by half of what was measured. LayerNorm, which
    shows later, has a test of its own in test_road.py.
    """
    bigram, head, residual = (
        loss_after(name, tinyshakespeare, tmp_path, 400) for name in ("1_bigram", "2_head", "5_residual")
    )
    assert bigram > head + 0.03 > head > residual + 0.15


def test_the_bigram_reaches_the_counted_table(tinyshakespeare: Path, tmp_path: Path) -> None:
    """The floor of this rung is the table of counted pairs: its own settings must come within 0.02 of that loss. Far
    below it lies only a model that sees more than one character.
    """
    text = tinyshakespeare.read_text(encoding="utf-8")
    numbers = {character: number for number, character in enumerate(sorted(set(text)))}
    ids = torch.tensor([numbers[character] for character in text])
    cut = int(0.9 * len(ids))
    train, val = ids[:cut], ids[cut:]
    counts = torch.full((65, 65), 0.1, dtype=torch.float64)  # a tenth of a pair, against pairs that never came
    counts.index_put_((train[:-1], train[1:]), torch.ones(cut - 1, dtype=torch.float64), accumulate=True)
    table = (counts / counts.sum(1, keepdim=True)).log()
    floor = -table[val[:-1], val[1:]].mean().item()
    settings = yaml.safe_load((FOLDER / "1_bigram.yaml").read_text(encoding="utf-8"))
    optimizer = OptimizerConfig(**settings["model"]["optimizer"])
    schedule = ScheduleConfig(**settings["model"]["schedule"])
    module = LitGPT(GPTConfig(**settings["model"]["gpt"]), optimizer, schedule)
    data = TextDataModule(str(tinyshakespeare), block_size=8, batch_size=settings["data"]["batch_size"])
    trainer = quiet_trainer(tmp_path, max_steps=settings["trainer"]["max_steps"], limit_val_batches=0)
    trainer.fit(module, datamodule=data)
    loss = float(quiet_trainer(tmp_path).validate(module, datamodule=data, verbose=False)[0]["val/loss"])
    assert floor - 0.01 < loss < floor + 0.02
