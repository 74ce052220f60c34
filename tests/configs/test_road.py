"""The whole road, from the lecture's rungs to what came after: its files, its order, and its pictures."""

import csv
import difflib
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from command import gptlit
from conftest import DIALECTS, random_gpt

from gptlit.callbacks.pictures import (
    attention_figure,
    attention_weights,
    bigram_figure,
    bigram_probabilities,
    counted_bigrams,
    figures,
    rasterize,
)
from gptlit.cli.ladder.report import count_parameters
from gptlit.cli.ladder.rungs import Rung, all_rungs
from gptlit.cli.settings import flat, packaged_configs
from gptlit.data import TextDataModule
from gptlit.model.config import GPTConfig
from gptlit.optim import OptimizerConfig, ScheduleConfig
from gptlit.tokenizer import CharTokenizer

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


# ---------------------------------------------------------------- the pictures


@pytest.mark.parametrize("name", [name for name, gpt in DIALECTS.items() if gpt.get("n_layer", 1)])
def test_the_drawn_weights_are_those_that_the_model_uses(name: str) -> None:
    """The fused kernel hides its weights. Weights · values, projected, must be what the attention layer gives."""
    config = GPTConfig(**DIALECTS[name])
    model = random_gpt(config)
    ids = torch.randint(config.vocab_size, (config.block_size,), generator=torch.Generator().manual_seed(1))
    seen: list[tuple[Any, ...]] = []
    attention = model.transformer["h"][-1].attn
    hook = attention.register_forward_hook(lambda module, inputs, output: seen.append((*inputs[:2], output)))
    maps = attention_weights(model, ids)
    hook.remove()

    H, T = config.n_head, len(ids)
    assert maps.shape == (config.n_layer, H, T, T)
    assert torch.equal(maps.triu(1), torch.zeros_like(maps)), "nobody looks into the future"
    torch.testing.assert_close(maps.sum(-1), torch.ones(config.n_layer, H, T))
    x, rotation, output = seen[0]
    _, _, v = attention.project(x, rotation)  # (1, H, T, D)
    gathered = (maps[-1].double() @ v[0]).transpose(0, 1).reshape(1, T, config.n_embd)
    torch.testing.assert_close(attention.c_proj(gathered), output, rtol=1e-4, atol=1e-5)


def test_a_picture_of_attention_has_the_characters_on_both_axes() -> None:
    """Guards against maps that nobody can read, or that are upside down."""
    maps = torch.ones(3, 4, 4).tril()
    maps /= maps.sum(-1, keepdim=True)
    figure = attention_figure(maps, ["T", "o", "␣", "b"], "layer 1 of 2")
    heads = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title() for axes in heads] == ["head 1", "head 2", "head 3"]
    for axes in heads:
        for axis in (axes.xaxis, axes.yaxis):
            assert [tick.get_text() for tick in axis.get_ticklabels()] == ["T", "o", "␣", "b"]
        np.testing.assert_array_equal(axes.images[0].get_array(), maps[0])
        assert axes.yaxis_inverted(), "the text runs from the top down"
        assert axes.images[0].get_clim() == (0, 1), "the same shade means the same weight in every head"


def test_the_pictures_of_a_model_are_drawn_over_the_text_that_was_asked_for() -> None:
    """White space is made visible, strangers to the vocabulary are left out, and what is too long is cut."""
    tokenizer = CharTokenizer("\n $ab")
    model = random_gpt(GPTConfig(vocab_size=5, block_size=6, n_layer=2, n_head=2, n_embd=8))
    drawn = figures(model, tokenizer, "ab\n $?ba and on")
    assert list(drawn) == ["attention/layer_1", "attention/layer_2"]
    labels = [tick.get_text() for tick in drawn["attention/layer_1"].axes[0].xaxis.get_ticklabels()]
    assert labels == ["a", "b", "↵", "␣", r"\$", "b"]
    pixels = rasterize(drawn["attention/layer_1"])
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    assert pixels.dtype == np.uint8
    assert len(np.unique(pixels)) > 10, "not a blank sheet"
    assert figures(model, tokenizer, "????") == {}, "nothing to draw over"


def test_the_bigram_is_drawn_beside_the_counts_that_it_should_come_to_equal() -> None:
    """Rows are what is there, columns what comes next; the picture of a transposed table looks just as good."""
    tokenizer = CharTokenizer("abc")
    tokens = torch.tensor(tokenizer.encode("abababac"))
    counted = counted_bigrams(tokens, 3)
    torch.testing.assert_close(counted[0], torch.tensor([1 / 7, 4 / 7, 2 / 7]))  # a: 3 b, 1 c, and one more of each
    torch.testing.assert_close(counted.sum(1), torch.ones(3))

    model = random_gpt(GPTConfig(vocab_size=3, n_layer=0, n_head=1, n_embd=8, position="none", norm="none", bias=True))
    learned = bigram_probabilities(model)
    torch.testing.assert_close(learned, model(torch.arange(3)[:, None])[:, 0].softmax(-1).float())

    (figure,) = figures(model, tokenizer, "", tokens).values()
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["p(next | this), learned", "p(next | this), counted in the training text"]
    for axes, table in zip(figure.axes, (learned, counted), strict=True):
        assert [tick.get_text() for tick in axes.yaxis.get_ticklabels()] == ["a", "b", "c"]
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("next", "this")
        np.testing.assert_array_equal(axes.images[0].get_array(), table)
    assert len(bigram_figure({"learned": learned}, ["a", "b", "c"]).axes) == 1


def test_drawing_leaves_the_model_as_it_was() -> None:
    """Guards against a picture in the middle of training that turns dropout off or leaves hooks behind."""
    model = random_gpt(GPTConfig(vocab_size=5, block_size=6, n_layer=1, n_head=2, n_embd=8, dropout=0.5)).train()
    first = attention_weights(model, torch.arange(5))
    assert model.training
    assert torch.equal(first, attention_weights(model, torch.arange(5))), "nothing is dropped while drawing"
    assert not any(module._forward_pre_hooks for module in model.modules())
