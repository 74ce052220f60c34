"""Attention maps and bigram tables: what they show, their labels, and that the model is left unchanged."""

from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import DIALECTS, random_gpt
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import SingleDeviceStrategy

from gptlit.callbacks.pictures import (
    Pictures,
    attention_figure,
    attention_weights,
    bigram_figure,
    bigram_probabilities,
    counted_bigrams,
    figures,
    overview_figure,
    rasterize,
)
from gptlit.model.config import GPTConfig
from gptlit.tokenizer import CharTokenizer


@pytest.mark.parametrize("name", [name for name, gpt in DIALECTS.items() if gpt.get("n_layer", 1)])
def test_the_weights_shown_are_those_that_the_model_uses(name: str) -> None:
    """The fused kernel does not return weights. Weights · values, projected, must be the layer's output."""
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
    assert torch.equal(maps.triu(1), torch.zeros_like(maps)), "no position attends to later ones"
    torch.testing.assert_close(maps.sum(-1), torch.ones(config.n_layer, H, T))
    x, rotation, output = seen[0]
    _, _, v = attention.project(x, rotation)  # (1, H, T, D)
    gathered = (maps[-1].double() @ v[0]).transpose(0, 1).reshape(1, T, config.n_embd)
    torch.testing.assert_close(attention.c_proj(gathered), output, rtol=1e-4, atol=1e-5)


def uniform_attention(heads: int, positions: int) -> torch.Tensor:
    """Attention weights (H, T, T) that are equal for all earlier positions."""
    maps = torch.ones(heads, positions, positions).tril()
    return maps / maps.sum(-1, keepdim=True)


def test_a_layer_has_the_text_on_both_axes_of_every_head() -> None:
    """Guards against unreadable or upside-down maps."""
    maps = uniform_attention(3, 4)
    figure = attention_figure(maps, ["T", "o", "␣", "b"], "Attention, layer 1 of 2")
    heads = [axes for axes in figure.axes if axes.axison and axes.get_title().startswith("head")]
    assert [axes.get_title() for axes in heads] == ["head 1", "head 2", "head 3"]
    for axes in heads:
        for axis in (axes.xaxis, axes.yaxis):
            assert [tick.get_text() for tick in axis.get_ticklabels()] == ["T", "o", "␣", "b"]
        np.testing.assert_array_equal(axes.images[0].get_array(), maps[0])
        assert axes.yaxis_inverted(), "the text runs from the top down"
        assert axes.images[0].get_clim() == (0, 1), "the same shade means the same weight in every head"


@pytest.mark.parametrize("heads", [1, 2, 5])
def test_a_picture_shows_its_own_layer(heads: int) -> None:
    """Layers share one figure, whose axes are placed once: the pixels are those of a figure for each layer."""
    tokenizer = CharTokenizer("\n $ab")
    model = random_gpt(GPTConfig(vocab_size=5, block_size=6, n_layer=3, n_head=heads, n_embd=8 * heads))
    weights = attention_weights(model, torch.tensor(tokenizer.encode("ab a")))
    drawn = [(tag, rasterize(figure)) for tag, figure in figures(model, tokenizer, "ab a")]
    assert [tag for tag, _ in drawn] == ["pictures/layer_1", "pictures/layer_2", "pictures/layer_3"]
    for layer, (_, pixels) in enumerate(drawn):
        alone = attention_figure(weights[layer], ["a", "b", "␣", "a"], f"Attention, layer {layer + 1} of 3")
        np.testing.assert_array_equal(pixels, rasterize(alone))
    assert not np.array_equal(drawn[0][1], drawn[1][1])


@pytest.mark.parametrize("heads", [1, 2, 5, 12])
def test_the_title_fits_and_a_colour_bar_explains_the_shades(heads: int) -> None:
    """Guards against titles that are cut where there is one head, and shades without a scale."""
    figure = attention_figure(uniform_attention(heads, 8), list("abcdefgh"), "Attention, layer 11 of 12")
    rasterize(figure)
    title = figure._suptitle.get_window_extent()
    assert title.x0 >= 0
    assert title.x1 <= figure.bbox.width
    assert any(axes.get_ylabel() == "attention weight" for axes in figure.axes)


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (3, 2), (2, 12)])
def test_the_overview_holds_the_maps_of_all_layers_and_heads(layers: int, heads: int) -> None:
    weights = torch.rand(layers, heads, 5, 5)
    figure = overview_figure(weights, step=250)
    mosaic = figure.axes[0].images[0].get_array()
    for layer in range(layers):
        for head in range(heads):
            shown = mosaic[6 * layer : 6 * layer + 5, 6 * head : 6 * head + 5]
            np.testing.assert_allclose(shown, weights[layer, head], atol=1e-7)
    rasterize(figure)
    title = figure.axes[0].title.get_window_extent()
    assert title.x0 >= 0
    assert title.x1 <= figure.bbox.width
    assert figure.axes[0].get_title() == "Attention weights after step 250"


def test_attention_is_shown_while_it_forms_at_ten_validations_or_fewer() -> None:
    """100 validations give ten pictures, step 0 and the last step; `end` gives none during training."""
    model = random_gpt(GPTConfig(vocab_size=5, block_size=6, n_layer=1, n_head=2, n_embd=8))
    module = SimpleNamespace(network=model, tokenizer=CharTokenizer("\n $ab"))
    steps = {}
    for when in ("validation", "end", "never"):
        logger = mock.Mock(spec=TensorBoardLogger)
        for step in range(0, 1001, 10):
            trainer = SimpleNamespace(
                state=SimpleNamespace(fn="fit"),
                sanity_checking=False,
                callback_metrics={"val/loss": torch.tensor(1.0)},
                is_global_zero=True,
                strategy=SingleDeviceStrategy(),
                loggers=[logger],
                enable_validation=True,
                val_check_batch=10,
                accumulate_grad_batches=1,
                max_steps=1000,
                global_step=step,
                callbacks=[],
            )
            pictures = Pictures(when, text="ab a")
            pictures.on_validation_end(trainer, module)
            if step == 0:
                assert not logger.experiment.add_image.called, "the first step does not wait for a picture"
            trainer.global_step += 1
            pictures.on_train_batch_end(trainer, module, None, None, step)
            pictures.on_train_batch_end(trainer, module, None, None, step + 1)
        steps[when] = [call.args[2] for call in logger.experiment.add_image.call_args_list]
    assert steps == {"validation": [0, *range(100, 1001, 100)], "end": [], "never": []}


def test_labels_show_white_space_and_unknown_characters_are_left_out() -> None:
    tokenizer = CharTokenizer("\n $ab")
    model = random_gpt(GPTConfig(vocab_size=5, block_size=6, n_layer=2, n_head=2, n_embd=8))
    drawn = dict(figures(model, tokenizer, "ab\n $?ba and on"))
    assert list(drawn) == ["pictures/layer_1", "pictures/layer_2"]
    labels = [tick.get_text() for tick in drawn["pictures/layer_1"].axes[0].xaxis.get_ticklabels()]
    assert labels == ["a", "b", "↵", "␣", r"\$", "b"]
    pixels = rasterize(drawn["pictures/layer_1"])
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    assert pixels.dtype == np.uint8
    assert len(np.unique(pixels)) > 10, "not a blank sheet"
    assert list(figures(model, tokenizer, "????")) == [], "no text is left"


def test_the_bigram_table_is_shown_next_to_the_counts_that_it_should_learn() -> None:
    """Rows are the given token, columns the next one; a transposed table would look plausible too."""
    tokenizer = CharTokenizer("abc")
    tokens = torch.tensor(tokenizer.encode("abababac"))
    counted = counted_bigrams(tokens, 3)
    torch.testing.assert_close(counted[0], torch.tensor([1 / 7, 4 / 7, 2 / 7]))  # a: 3 b, 1 c, and one more of each
    torch.testing.assert_close(counted.sum(1), torch.ones(3))

    model = random_gpt(GPTConfig(vocab_size=3, n_layer=0, n_head=1, n_embd=8, position="none", norm="none", bias=True))
    learned = bigram_probabilities(model)
    torch.testing.assert_close(learned, model(torch.arange(3)[:, None])[:, 0].softmax(-1).float())

    ((_, figure),) = figures(model, tokenizer, "", tokens)
    plots = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in plots] == [
        "p(next | this), learned",
        "p(next | this), counted in the training text",
    ]
    for axes, table in zip(plots, (learned, counted), strict=True):
        assert [tick.get_text() for tick in axes.yaxis.get_ticklabels()] == ["a", "b", "c"]
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("next", "this")
        np.testing.assert_array_equal(axes.images[0].get_array(), table)
    alone = bigram_figure({"learned": learned}, ["a", "b", "c"])
    assert len([axes for axes in alone.axes if axes.get_title()]) == 1


def test_drawing_leaves_the_model_unchanged() -> None:
    """Guards against a picture during training that turns dropout off or leaves hooks in place."""
    model = random_gpt(GPTConfig(vocab_size=5, block_size=6, n_layer=1, n_head=2, n_embd=8, dropout=0.5)).train()
    first = attention_weights(model, torch.arange(5))
    assert model.training
    assert torch.equal(first, attention_weights(model, torch.arange(5))), "no dropout while drawing"
    assert not any(module._forward_pre_hooks for module in model.modules())
