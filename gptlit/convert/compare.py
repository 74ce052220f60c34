"""Restoring the network of a checkpoint, and comparing an exported model with it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptlit.errors import UserError
from gptlit.model.config import GPTConfig
from gptlit.model.gpt import GPT

CHECKED_POSITIONS = 1000
TOLERANCE = 1e-4  # largest difference of logits up to 1 in size; grows with them


@dataclass(frozen=True)
class Check:
    """How closely an exported model, loaded again, computes the logits of the original."""

    positions: int
    largest_difference: float


def network_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the GPT in the state of a `LitGPT`, under the GPT's own names."""
    return {name.removeprefix("net."): tensor for name, tensor in state_dict.items() if name.startswith("net.")}


def restore(gpt: GPTConfig, state_dict: Mapping[str, Tensor]) -> GPT:
    """Return the network of a checkpoint in float32, in evaluation mode.

    Raises:
        UserError: if a weight is not finite.
    """
    model = GPT(gpt)
    weights = network_weights(state_dict)
    model.load_state_dict(weights)
    broken = next((name for name, tensor in weights.items() if not bool(tensor.isfinite().all())), None)
    if broken:
        raise UserError(f"the weights of this checkpoint are not finite ({broken}): export an earlier one")
    return model.float().eval()


@torch.no_grad()
def compare(
    original: GPT, exported: Callable[[Tensor], Any], lengths: tuple[int, ...] = (), tolerance: float = TOLERANCE
) -> Check:
    """Compare logits over random ids: at least 1,000 positions in full windows, and one row of each other length.

    Args:
        original: the network.
        exported: ids (B, T) int64 -> logits (B, T, V), of the model loaded from the exported files.
        lengths: further lengths T to compare.
        tolerance: largest difference allowed, for logits up to 1 in size.

    Raises:
        RuntimeError: if a difference is more than rounding.
    """
    gpt, generator = original.config, torch.Generator().manual_seed(0)
    rows = math.ceil(CHECKED_POSITIONS / gpt.block_size)
    shapes = [(rows, gpt.block_size), *((1, length) for length in lengths if length <= gpt.block_size)]
    largest = 0.0
    for shape in shapes:
        ids = torch.randint(gpt.vocab_size, shape, generator=generator)
        expected = original(ids)  # (B, T, V)
        difference = float((torch.as_tensor(exported(ids)) - expected).abs().max())
        if not difference <= tolerance * max(1.0, float(expected.abs().max())):
            raise RuntimeError(f"the exported model computes something else: logits differ by {difference}")
        largest = max(largest, difference)
    return Check(sum(rows * length for rows, length in shapes), largest)
