"""Attention maps and bigram tables for TensorBoard."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from gptlit.callbacks.metrics import clock_stopped
from gptlit.callbacks.tensorboard import shown_steps
from gptlit.model.gpt import GPT
from gptlit.training.metrics import validation_counts
from gptlit.training.strategies import holds_whole_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN_AS = {"\n": "↵", " ": "␣", "\t": "⇥"}
LARGEST_TABLE = 128  # tokens; more cannot be distinguished on a screen
TALLEST_MAP = 32  # tokens of a map in the overview; longer ones show the beginning of the text


class Pictures(pl.Callback):
    """Draws the model into TensorBoard's IMAGES tab.

    A model with attention: `pictures/attention` shows all layers and heads in one small picture, at up to ten
    validations, to show how attention forms. After the last step, `pictures/layer_…` shows each layer with the text
    on both axes. The bigram model: its table of probabilities next to the one counted in the training text, which it
    should come to equal, after the last step.

    Args:
        when: `validation` draws during training and at its end, `end` at its end only, `never` not at all.
        text: the text that attention is shown for; characters that are not in the vocabulary are left out, and no more
            than `block_size` tokens are read.
    """

    def __init__(
        self, when: Literal["never", "end", "validation"] = "validation", text: str = "First Citizen:\nBefore we"
    ) -> None:
        self.when = when
        self.text = text
        self._initial: Tensor | None = None  # attention weights before the first step, drawn after it

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._initial = None

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.when != "validation" or not validation_counts(trainer):
            return
        due = trainer.global_step == 0 or trainer.global_step in shown_steps(trainer)
        if not due or not (boards := boards_of(trainer)):
            return
        weights = weights_for(pl_module.network, pl_module.tokenizer, self.text)
        if trainer.global_step == 0:
            self._initial = weights
        elif weights is not None:
            add_overview(boards, weights, trainer.global_step)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Draw the picture of step 0. The first step does not wait for it."""
        if self._initial is not None:
            with clock_stopped(trainer):
                add_overview(boards_of(trainer), self._initial, step=0)
            self._initial = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.when == "never" or not (boards := boards_of(trainer)):
            return
        tokens = getattr(getattr(trainer, "datamodule", None), "train_tokens", None)
        counted = tokens if isinstance(tokens, Tensor) else None  # a token file is too long to count
        pictures = figures(pl_module.network, pl_module.tokenizer, self.text, counted)
        add_pictures(boards, pictures, trainer.global_step)


def boards_of(trainer: pl.Trainer) -> list[Any]:
    """Return TensorBoard's writers; none on ranks other than 0 or if the model is sharded."""
    if not trainer.is_global_zero or not holds_whole_model(trainer):
        return []
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def add_pictures(boards: Sequence[Any], pictures: Iterable[tuple[str, "Figure"]], step: int) -> None:
    """Write figures, given with their tags."""
    for tag, figure in pictures:
        pixels = rasterize(figure)
        for board in boards:
            board.add_image(tag, pixels, step, dataformats="HWC")


def weights_for(model: GPT, tokenizer: Any, text: str) -> Tensor | None:
    """Return attention weights (L, H, T, T) for a text; None for a model without attention, or where no text is left.

    Characters that are not in the vocabulary, and all beyond `block_size`, are left out.
    """
    ids = tokenizer.encode(text, unknown="skip")[: model.config.block_size]
    return attention_weights(model, torch.tensor(ids)) if ids and model.config.n_layer else None


def add_overview(boards: Sequence[Any], weights: Tensor, step: int) -> None:
    """Write the picture of all layers and heads."""
    add_pictures(boards, [("pictures/attention", overview_figure(weights, step))], step)


def figures(model: GPT, tokenizer: Any, text: str, tokens: Tensor | None = None) -> Iterator[tuple[str, "Figure"]]:
    """Yield the detailed pictures of a model, with their tags. A figure is valid until the next one is asked for.

    Args:
        model: the network.
        tokenizer: its tokenizer.
        text: the text that attention is shown for.
        tokens: (N,) ids of the training text, for the counted table of the bigram model.
    """
    V = model.config.vocab_size
    if model.config.n_layer == 0:
        if V > LARGEST_TABLE:
            return
        tables = {"learned": bigram_probabilities(model)}
        if tokens is not None:
            tables["counted in the training text"] = counted_bigrams(tokens, V)
        yield "pictures/bigram", bigram_figure(tables, [label(tokenizer.decode([i])) for i in range(V)])
        return
    ids = tokenizer.encode(text, unknown="skip")[: model.config.block_size]
    if not ids:
        return
    weights = attention_weights(model, torch.tensor(ids))  # (L, H, T, T)
    labels = [label(tokenizer.decode([i])) for i in ids]
    titles = [f"Attention, layer {layer + 1} of {len(weights)}" for layer in range(len(weights))]
    figure = attention_figure(weights[0], labels, titles[0])
    for layer, title in enumerate(titles):
        if layer:
            show_layer(figure, weights[layer], title)
        yield f"pictures/layer_{layer + 1}", figure


@torch.no_grad()
def attention_weights(model: GPT, ids: Tensor) -> Tensor:
    """Compute softmax(Q·Kᵀ / √D) under the causal mask for every layer and head.

    The fused kernel never forms these weights, so they are computed from the model's queries and keys, without dropout.

    Args:
        model: a network with attention.
        ids: (T,) token ids.

    Returns:
        (L, H, T, T) float32 on the CPU; row t is the position that looks, column s the one looked at.
    """
    maps: list[Tensor] = []

    def note(attention: Any, inputs: tuple[Any, ...]) -> None:
        x, rotation = inputs[0], inputs[1]
        q, k, _ = attention.project(x, rotation)  # (1, H, T, D)
        scores = q.float() @ k.float().transpose(-2, -1) / q.size(-1) ** 0.5  # (1, H, T, T)
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)  # (T, T)
        maps.append(scores.masked_fill(future, -torch.inf).softmax(-1)[0].cpu())

    hooks = [block.attn.register_forward_pre_hook(note) for block in model.blocks]
    was_training = model.training
    try:
        model.eval()
        # forward() and not the call: a compiled network would leave the hooks out.
        model.forward(ids[None].to(model.lm_head.weight.device))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return torch.stack(maps)


@torch.no_grad()
def bigram_probabilities(model: GPT) -> Tensor:
    """Return p(next | one token): (V, V) float32 on the CPU; rows are the given token and sum to 1."""
    was_training = model.training
    model.eval()
    ids = torch.arange(model.config.vocab_size, device=model.lm_head.weight.device)
    logits = model.forward(ids[:, None])[:, 0]  # (V, V)
    model.train(was_training)
    return logits.float().softmax(-1).cpu()


def counted_bigrams(tokens: Tensor, vocab_size: int) -> Tensor:
    """Count which token follows which in tokens (N,): fractions (V, V) float32, rows sum to 1.

    One is added to every count (Laplace smoothing), so that an unseen pair has a probability above zero.
    """
    ids = tokens.cpu().long()
    pairs = ids[:-1] * vocab_size + ids[1:]  # (N - 1,)
    counts = torch.bincount(pairs, minlength=vocab_size**2).view(vocab_size, vocab_size).double() + 1
    return (counts / counts.sum(1, keepdim=True)).float()


def overview_figure(weights: Tensor, step: int) -> "Figure":
    """Draw the weights (L, H, T, T) as one image: a row of maps for each layer, a column for each head.

    It is one image, not L · H axes, to be fast enough for training: creating axes takes most of the time.
    """
    from matplotlib.figure import Figure

    L, H, T = weights.size(0), weights.size(1), min(weights.size(2), TALLEST_MAP)
    mosaic = np.full((L * (T + 1) - 1, H * (T + 1) - 1), np.nan)
    for layer in range(L):
        for head in range(H):
            top, left = layer * (T + 1), head * (T + 1)
            mosaic[top : top + T, left : left + T] = weights[layer, head, :T, :T]
    width, height = max(5.0, 0.5 + 1.1 * H), 1.0 + 1.1 * L
    figure = Figure(figsize=(width, height), dpi=100)
    axes = figure.add_axes((0.1, 0.45 / height, 0.76, 1 - 1.0 / height))
    image = axes.imshow(mosaic, cmap="Blues", vmin=0.0, vmax=1.0, interpolation="nearest", aspect="auto")
    axes.set_facecolor("0.8")  # between the maps
    axes.set_xticks([head * (T + 1) + (T - 1) / 2 for head in range(H)], labels=[f"{head + 1}" for head in range(H)])
    axes.set_yticks([layer * (T + 1) + (T - 1) / 2 for layer in range(L)], labels=[f"{n + 1}" for n in range(L)])
    axes.tick_params(length=0, labelsize=8)
    axes.set_xlabel("head", fontsize=8)
    axes.set_ylabel("layer", fontsize=8)
    axes.set_title(f"Attention weights after step {step:,}", fontsize=9)
    bar = figure.colorbar(image, cax=figure.add_axes((0.89, 0.45 / height, 0.02, 1 - 1.0 / height)))
    bar.ax.tick_params(labelsize=7)
    return figure


def attention_figure(maps: Tensor, labels: Sequence[str], title: str) -> "Figure":
    """Draw the weights (H, T, T) of a layer, a map for each head; rows attend to columns.

    The axes are placed once, which takes most of the time; `show_layer` replaces the weights.
    """
    from matplotlib.figure import Figure

    H, T = maps.size(0), maps.size(1)
    columns = min(H, 4)
    rows = -(-H // columns)
    side = 0.6 + 0.13 * max(T, 12)  # inches
    figure = Figure(figsize=(side * columns + 0.7, (side + 0.3) * rows + 0.6), dpi=100, layout="constrained")
    figure.suptitle(attention_title(title), fontsize=8)
    image: Any = None
    shown = []
    for head, axes in enumerate(np.atleast_1d(figure.subplots(rows, columns, squeeze=False).flat)):
        if head >= H:
            axes.set_axis_off()
            continue
        image = draw_matrix(axes, maps[head], labels, vmax=1.0, fontsize=6)
        axes.set_title(f"head {head + 1}", fontsize=8)
        shown.append(axes)
    figure.colorbar(image, ax=shown, fraction=0.04, label="attention weight").ax.tick_params(labelsize=7)
    if (engine := figure.get_layout_engine()) is not None:
        engine.execute(figure)
    figure.set_layout_engine("none")
    return figure


def attention_title(title: str) -> str:
    """Return the title of a layer with what its axes mean."""
    return f"{title}\nrow: looks at; column: is looked at"


def show_layer(figure: "Figure", maps: Tensor, title: str) -> None:
    """Replace the weights (H, T, T) in a figure of `attention_figure`."""
    for axes, head in zip(figure.axes, maps, strict=False):  # the colour bar comes last
        axes.images[0].set_data(head.numpy())
    figure.texts[0].set_text(attention_title(title))


def bigram_figure(tables: Mapping[str, Tensor], labels: Sequence[str]) -> "Figure":
    """Draw tables of probabilities (V, V) side by side; the column's token follows the row's."""
    from matplotlib.figure import Figure

    side = 1.0 + 0.11 * len(labels)  # inches
    figure = Figure(figsize=(side * len(tables) + 0.7, side + 0.4), dpi=100, layout="constrained")
    image: Any = None
    plots = list(figure.subplots(1, len(tables), squeeze=False).flat)
    for axes, (title, table) in zip(plots, tables.items(), strict=True):
        image = draw_matrix(axes, table, labels, vmax=0.5, fontsize=5)
        axes.set_title(f"p(next | this), {title}", fontsize=8)
        axes.set_xlabel("next", fontsize=7)
        axes.set_ylabel("this", fontsize=7)
    figure.colorbar(image, ax=plots, fraction=0.04, label="probability", extend="max").ax.tick_params(labelsize=7)
    return figure


def draw_matrix(axes: Any, matrix: Tensor, labels: Sequence[str], vmax: float, fontsize: int) -> Any:
    """Draw a square matrix in blue, white for 0 and darkest for `vmax`, with labels; returns matplotlib's image."""
    image = axes.imshow(matrix.numpy(), cmap="Blues", vmin=0.0, vmax=vmax, interpolation="nearest")
    axes.set_xticks(range(len(labels)), labels=labels, fontsize=fontsize)
    axes.set_yticks(range(len(labels)), labels=labels, fontsize=fontsize)
    axes.tick_params(length=0, pad=1)
    return image


def label(token: str) -> str:
    """Return a token as an axis label: visible white space, and `$` escaped for matplotlib."""
    return "".join(SHOWN_AS.get(character, character) for character in token).replace("$", r"\$")


def rasterize(figure: "Figure") -> np.ndarray:
    """Render a figure without a display: (height, width, 3) uint8."""
    import warnings

    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing")  # the font lacks a script
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()
