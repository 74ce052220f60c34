"""What the lecture shows by hand, as pictures: who looks at whom, and which character follows which."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from gptlit.model.gpt import GPT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN_AS = {"\n": "↵", " ": "␣", "\t": "⇥"}
LARGEST_TABLE = 128  # symbols; more cannot be told apart on a screen


class Pictures(pl.Callback):
    """Draws the trained model into TensorBoard's image tab.

    A model with attention: a picture for each layer, with every head's weights over a fixed text. The bigram: its table
    of probabilities beside the one counted in the training text, which it should come to equal.

    Args:
        when: at the `end` of training, after each `validation`, or `never`.
        text: what attention is shown over; characters that the vocabulary lacks are left out, and no more than
            `block_size` tokens are read.
    """

    def __init__(
        self, when: Literal["never", "end", "validation"] = "end", text: str = "First Citizen:\nBefore we"
    ) -> None:
        self.when = when
        self.text = text

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draws, when asked for after each validation; the last validation belongs to the last step."""
        if self.when == "validation" and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.draw(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draws, when asked for at the end."""
        if self.when == "end":
            self.draw(trainer, pl_module)

    def draw(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Hands the pictures to TensorBoard; on the first process only, and only where it holds the whole model."""
        boards = [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        whole = isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy)
        if not boards or not whole or not trainer.is_global_zero:
            return
        tokens = getattr(getattr(trainer, "datamodule", None), "train_tokens", None)
        counted = tokens if isinstance(tokens, Tensor) else None  # a token file is too long to be counted here
        for tag, figure in figures(pl_module.network, pl_module.tokenizer, self.text, counted).items():
            pixels = rasterize(figure)
            for board in boards:
                board.add_image(tag, pixels, trainer.global_step, dataformats="HWC")


def figures(model: GPT, tokenizer: Any, text: str, tokens: Tensor | None = None) -> dict[str, "Figure"]:
    """The pictures of a model, by tag; `tokens` (N,), the text that it learned from, for the counted table."""
    V = model.config.vocab_size
    if model.config.n_layer == 0:
        if V > LARGEST_TABLE:
            return {}
        tables = {"learned": bigram_probabilities(model)}
        if tokens is not None:
            tables["counted in the training text"] = counted_bigrams(tokens, V)
        return {"bigram": bigram_figure(tables, [label(tokenizer.decode([i])) for i in range(V)])}
    ids = tokenizer.encode(text, unknown="skip")[: model.config.block_size]
    if not ids:
        return {}
    weights = attention_weights(model, torch.tensor(ids))  # (L, H, T, T)
    labels = [label(tokenizer.decode([i])) for i in ids]
    return {
        f"attention/layer_{layer + 1}": attention_figure(maps, labels, f"layer {layer + 1} of {len(weights)}")
        for layer, maps in enumerate(weights)
    }


@torch.no_grad()
def attention_weights(model: GPT, ids: Tensor) -> Tensor:
    """softmax(Q·Kᵀ / √D) under the causal mask, of every layer and head: (L, H, T, T) float32 on the CPU, for ids (T,).

    Row t is the position that looks, column s the one looked at. Written out from the model's own queries and keys,
    since the fused kernel never forms these weights. Training or not, nothing is dropped.
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
    """p(next | one character alone): (V, V) float32 on the CPU, rows the character that is there, summing to 1."""
    was_training = model.training
    model.eval()
    ids = torch.arange(model.config.vocab_size, device=model.lm_head.weight.device)
    logits = model.forward(ids[:, None])[:, 0]  # (V, V)
    model.train(was_training)
    return logits.float().softmax(-1).cpu()


def counted_bigrams(tokens: Tensor, vocab_size: int) -> Tensor:
    """How often each symbol follows each in tokens (N,), as fractions: (V, V) float32, rows summing to 1.

    One is added to every count, so that a pair never seen keeps a probability.
    """
    ids = tokens.cpu().long()
    pairs = ids[:-1] * vocab_size + ids[1:]  # (N - 1,)
    counts = torch.bincount(pairs, minlength=vocab_size**2).view(vocab_size, vocab_size).double() + 1
    return (counts / counts.sum(1, keepdim=True)).float()


def attention_figure(maps: Tensor, labels: Sequence[str], title: str) -> "Figure":
    """The heads' weights (H, T, T) side by side, the text on both axes: a row looks at its columns."""
    from matplotlib.figure import Figure

    H, T = maps.size(0), maps.size(1)
    columns = min(H, 4)
    rows = -(-H // columns)
    side = 0.6 + 0.13 * max(T, 12)  # inches
    figure = Figure(figsize=(side * columns, (side + 0.3) * rows + 0.3), dpi=100, layout="constrained")
    figure.suptitle(f"{title}: each row's character gathers from the columns", fontsize=9)
    for head, axes in enumerate(np.atleast_1d(figure.subplots(rows, columns, squeeze=False).flat)):
        if head >= H:
            axes.set_axis_off()
            continue
        draw_matrix(axes, maps[head], labels, vmax=1.0, fontsize=6)
        axes.set_title(f"head {head + 1}", fontsize=8)
    return figure


def bigram_figure(tables: Mapping[str, Tensor], labels: Sequence[str]) -> "Figure":
    """Tables of probabilities (V, V) side by side: the row's character is there, the column's comes next."""
    from matplotlib.figure import Figure

    side = 1.0 + 0.11 * len(labels)  # inches
    figure = Figure(figsize=(side * len(tables), side + 0.4), dpi=100, layout="constrained")
    for axes, (title, table) in zip(figure.subplots(1, len(tables), squeeze=False).flat, tables.items(), strict=True):
        draw_matrix(axes, table, labels, vmax=0.5, fontsize=5)
        axes.set_title(f"p(next | this), {title}", fontsize=8)
        axes.set_xlabel("next", fontsize=7)
        axes.set_ylabel("this", fontsize=7)
    return figure


def draw_matrix(axes: Any, matrix: Tensor, labels: Sequence[str], vmax: float, fontsize: int) -> None:
    """A square matrix in blue, from white for 0 to the darkest for `vmax`, with a label for each row and column."""
    axes.imshow(matrix.numpy(), cmap="Blues", vmin=0.0, vmax=vmax, interpolation="nearest")
    axes.set_xticks(range(len(labels)), labels=labels, fontsize=fontsize)
    axes.set_yticks(range(len(labels)), labels=labels, fontsize=fontsize)
    axes.tick_params(length=0, pad=1)


def label(symbol: str) -> str:
    """A token as an axis can show it: white space made visible, and `$` kept from meaning mathematics."""
    return "".join(SHOWN_AS.get(character, character) for character in symbol).replace("$", r"\$")


def rasterize(figure: "Figure") -> np.ndarray:
    """The picture as (height, width, 3) uint8, drawn without a screen."""
    import warnings

    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing")  # the font lacks a script: boxes are drawn
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()
