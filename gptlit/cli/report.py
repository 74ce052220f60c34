"""The report of `gptlit validate --report full`: the measures that published losses use, next to the exact one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gptlit.data.chunks import EVAL_TOKENS, LossEstimate, RandomChunks, Tokens, take
from gptlit.data.datamodule import TextDataModule
from gptlit.errors import require
from gptlit.model.gpt import GPT
from gptlit.tokenizer import Tokenizer
from gptlit.training.module import LitGPT

RANDOM_BATCHES = 200  # eval_iters of nanoGPT's train_shakespeare_char.py
READ_AT_ONCE = 2**20  # tokens
HEADER = ("measure", "nats per token", "bits per character", "bits per byte")


@dataclass(frozen=True)
class Measure:
    """One row of the report."""

    name: str
    loss: float
    """Nats per token."""
    standard_error: float | None
    """Of `loss`, where it is an estimate."""
    bits_per_character: float
    """NaN where no character begins, as in a part of one token of a BPE."""
    bits_per_byte: float


@dataclass(frozen=True)
class Sums:
    """Totals over a range of predicted tokens."""

    nats: float
    tokens: int
    characters: int
    bytes: int

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(
            self.nats + other.nats,
            self.tokens + other.tokens,
            self.characters + other.characters,
            self.bytes + other.bytes,
        )

    def measure(self, name: str) -> Measure:
        """Return the means as a row."""
        bits = self.nats / math.log(2)
        per_character, per_byte = (bits / count if count else math.nan for count in (self.characters, self.bytes))
        return Measure(name, self.nats / self.tokens, None, per_character, per_byte)


def check_report(trainer: pl.Trainer, model: LitGPT, stride: int) -> None:
    """Check the options of a report before anything is computed.

    Raises:
        UserError: naming the option.
    """
    block = model.gpt.block_size
    require(0 <= stride <= block, "--report_stride", stride, f"at most block_size ({block}), or 0 for half of it")
    require(trainer.world_size == 1, "trainer.devices", trainer.world_size, "1 for --report full")


def report_on(trainer: pl.Trainer, model: LitGPT, data: TextDataModule, stride: int) -> str:
    """Return the report on a model that the Trainer has validated, as a Markdown table.

    Args:
        trainer: for device and precision.
        model: with the weights of the checkpoint.
        data: with the validation part.
        stride: of the sliding window; 0 for half of block_size.
    """
    block = model.gpt.block_size
    tokens, device = data.val_tokens, trainer.strategy.root_device
    assert tokens is not None
    assert data.tokenizer is not None
    tokens = tokens.to(device) if isinstance(tokens, Tensor) else tokens
    network = model.network.to(device).eval()
    model.setup("validate")  # the precision of matrix multiplications
    with trainer.precision_plugin.forward_context():
        measures = full_report(
            network,
            tokens,
            data.tokenizer,
            batch_size=data.batch_size,
            stride=stride or max(1, block // 2),
            seed=data.seed,
            rows=data.eval_batch_size or max(1, EVAL_TOKENS // block),
        )
    model.teardown("validate")
    return to_markdown(measures)


@torch.inference_mode()
def full_report(
    network: GPT, tokens: Tokens, tokenizer: Tokenizer, batch_size: int, stride: int, seed: int, rows: int
) -> list[Measure]:
    """Measure the loss of a text in every way that published figures do.

    Args:
        network: in evaluation mode, on the device of `tokens` if they are a tensor.
        tokens: (N,) ids of the validation part.
        tokenizer: for characters and bytes per token.
        batch_size: sequences of a random batch.
        stride: predictions that each sliding window counts, 1 to block_size.
        seed: of the random batches.
        rows: windows of one forward pass.

    Returns:
        The exact mean over the whole part in windows that do not overlap (`val/loss`), over each half of it that has
        tokens, over sliding windows, and the mean of random batches, as nanoGPT's `estimate_loss` takes it.
    """
    block = network.config.block_size
    first, second = sums_of_halves(network, tokens, tokenizer, block, rows)
    slid_first, slid_second = sums_of_halves(network, tokens, tokenizer, stride, rows)
    whole = (first + second).measure("whole validation part (val/loss)")
    estimate, error = random_estimate(network, tokens, batch_size, seed)
    ratio = estimate / whole.loss if whole.loss else 0.0  # of one token every loss is 0
    return [
        whole,
        *(half.measure(name) for name, half in (("first half", first), ("second half", second)) if half.tokens),
        (slid_first + slid_second).measure(f"sliding window of {block}, stride {stride}"),
        Measure(
            f"{RANDOM_BATCHES} random batches of {batch_size} × {block}, as nanoGPT",
            estimate,
            error,
            whole.bits_per_character * ratio,
            whole.bits_per_byte * ratio,
        ),
    ]


def sums_of_halves(network: GPT, tokens: Tokens, tokenizer: Tokenizer, stride: int, rows: int) -> tuple[Sums, Sums]:
    """Sum the loss over both halves of a text; every token except the first is predicted once.

    A window of block_size starts every `stride` tokens and counts its last `stride` predictions, the first window all
    of them. With `stride` = block_size the windows do not overlap.
    """
    block, predicted = network.config.block_size, len(tokens) - 1
    windows = 1 + max(0, -(-(predicted - block) // stride))
    nats = torch.zeros(2, dtype=torch.float64)
    for start in range(0, windows, rows):
        numbers = torch.arange(start, min(start + rows, windows))
        chunk = take(tokens, numbers.numpy() * stride, block + 1)  # (R, T + 1)
        positions = numbers[:, None] * stride + torch.arange(block)  # (R, T), of the prediction in the text
        counted = positions < predicted
        counted[numbers > 0, : block - stride] = False
        losses = token_losses(network, chunk[:, :-1], chunk[:, 1:])
        for half, inside in enumerate((positions < predicted // 2, positions >= predicted // 2)):
            nats[half] += losses[(counted & inside).to(losses.device)].sum(dtype=torch.float64).cpu()
    middle = predicted // 2 + 1
    ranges = ((1, middle), (middle, len(tokens)))
    first, second = (
        Sums(float(total), end - begin, *characters_and_bytes(tokens, tokenizer, begin, end))
        for total, (begin, end) in zip(nats, ranges, strict=True)
    )
    return first, second


def token_losses(network: GPT, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of every prediction in nats: (R, T) inputs and targets -> (R, T)."""
    device = next(network.parameters()).device
    logits = network(inputs.to(device)).float()  # (R, T, V)
    return F.cross_entropy(logits.transpose(1, 2), targets.to(device), reduction="none")


def random_estimate(network: GPT, tokens: Tokens, batch_size: int, seed: int) -> tuple[float, float]:
    """Return mean and standard error of the losses of random batches."""
    chunks = RandomChunks(tokens, network.config.block_size, batch_size, seed)
    losses = torch.stack(
        [
            token_losses(network, inputs, targets).mean(dtype=torch.float64).cpu()
            for inputs, targets in LossEstimate(chunks, RANDOM_BATCHES)
        ]
    )
    return losses.mean().item(), losses.std().item() / math.sqrt(RANDOM_BATCHES)


def characters_and_bytes(tokens: Tokens, tokenizer: Tokenizer, begin: int, end: int) -> tuple[int, int]:
    """Count the characters and the UTF-8 bytes of a range of tokens."""
    per_token = torch.tensor([tokenizer.chars_per_token(), tokenizer.bytes_per_token()])  # (2, V)
    totals = torch.zeros(2, dtype=torch.int64)
    for start in range(begin, end, READ_AT_ONCE):
        ids = take(tokens, np.array([start]), min(READ_AT_ONCE, end - start))[0].cpu()
        totals += per_token[:, ids].sum(1)
    return int(totals[0]), int(totals[1])


def to_markdown(measures: Sequence[Measure]) -> str:
    """Return the report as a Markdown table."""
    rows: list[tuple[str, ...]] = [HEADER, ("---", "---:", "---:", "---:")]
    for m in measures:
        loss = f"{m.loss:.4f}" + ("" if m.standard_error is None else f" ± {m.standard_error:.4f}")
        bits = ("" if math.isnan(value) else f"{value:.4f}" for value in (m.bits_per_character, m.bits_per_byte))
        rows.append((m.name, loss, *bits))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
