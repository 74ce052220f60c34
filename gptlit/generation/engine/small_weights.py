"""Weight matrices in bfloat16 or int8, for sampling on a CPU.

A token of one sample multiplies every weight once, so that reading the weights takes most of its time, and half or a
quarter of the bytes take less. The matrices of attention and MLP are rounded, if they are large. Norms, residual
stream, RoPE, attention, cache and sampling stay float32, and so does the head: torch returns such a product in
bfloat16, which doubles the error of the log-probabilities where the output is the logits.

The input of a product is rounded to bfloat16, sums are float32, and the output is rounded to bfloat16. The model keeps
its float32 weights, so that the rounded ones are additional memory.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from gptlit.device.cpu import cpu_multiplies_bfloat16
from gptlit.errors import UserError
from gptlit.generation.engine.limits import PACKED_FOR, SMALL_FROM_WEIGHT, UNPACK_FROM_ROWS
from gptlit.model.gpt import GPT

WeightsDtype = Literal["bfloat16", "int8"]
SETTING = "weights_dtype"
INT8_COLUMNS = 16


@dataclass(frozen=True, slots=True)
class Bfloat16Weight:
    """x W for x (N, in), with W (in, out) in bfloat16 and in oneDNN's layout."""

    packed: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> "Bfloat16Weight":
        """Round the weight (out, in) of a linear layer."""
        return cls(torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16().contiguous(), PACKED_FOR))  # noqa: SLF001

    def __call__(self, x: Tensor) -> Tensor:
        """Return x W (N, out) in bfloat16."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise.default(in_bfloat16(x), self.packed, None, "none", [], "")  # noqa: SLF001
        return product


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """x W for x (N, in), with W (in, out) = integers · scale of the output channel.

    Args:
        integers: -127 … 127, int8 (out, in).
        scales: float32 (out,).
        ones: bfloat16 (out,), the scales inside torch's product.
    """

    integers: Tensor
    scales: Tensor
    ones: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> "Int8Weight":
        """Round the weight (out, in) of a linear layer; the largest number of a row becomes 127 or -127."""
        scales = weight.abs().amax(1) / 127
        integers = (weight / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round_()
        return cls(integers.to(torch.int8), scales, torch.ones_like(scales, dtype=torch.bfloat16))

    def __call__(self, x: Tensor) -> Tensor:
        """Return x W (N, out) in float32."""
        # Both matmuls round before the scales: a text hardly depends on the number of rows.
        if x.size(0) < UNPACK_FROM_ROWS and x.size(1) % INT8_COLUMNS == 0:
            product = torch.ops.aten._weight_int8pack_mm.default(in_bfloat16(x), self.integers, self.ones)  # noqa: SLF001
        else:
            product = F.linear(in_bfloat16(x), self.integers.bfloat16())  # exact in bfloat16
        return product * self.scales


SmallWeight = Bfloat16Weight | Int8Weight


def in_bfloat16(x: Tensor) -> Tensor:
    """Return a contiguous copy of x in bfloat16."""
    return x.to(torch.bfloat16, memory_format=torch.contiguous_format)


def small_weight(weight: Tensor, dtype: WeightsDtype) -> SmallWeight | None:
    """Return the weight (out, in) of a linear layer in a small type, or None if it is small enough as it is."""
    if weight.numel() < SMALL_FROM_WEIGHT:
        return None
    return Bfloat16Weight.of(weight) if dtype == "bfloat16" else Int8Weight.of(weight)


def check_weights_dtype(model: GPT, dtype: WeightsDtype | None, device: torch.device | None = None) -> None:
    """Check that the matrices of a model can be in this type.

    Args:
        model: the model.
        dtype: the type; None is always accepted.
        device: where the model will run; by default where it is.

    Raises:
        UserError: for another name, outside of a CPU with instructions for bfloat16, for a model in another precision
            than float32, and for one whose matrices are all too small.
    """
    if dtype is None:
        return
    if dtype not in get_args(WeightsDtype):
        raise UserError(f"is {dtype}: choose bfloat16 or int8, or leave it out", SETTING)
    head = model.lm_head.weight.detach()
    check_device(device or head.device, dtype)
    if type(head) is not Tensor or head.dtype != torch.float32:
        raise UserError(
            f"is {dtype}, but the model's weights are {str(head.dtype).removeprefix('torch.')}, not float32 in one "
            "piece: leave it out, or set trainer.precision 32-true",
            SETTING,
        )
    largest = max((part.numel() for part in model.transformer["h"].parameters() if part.dim() == 2), default=0)
    if largest < SMALL_FROM_WEIGHT:
        raise UserError(
            f"is {dtype}, but no matrix of this model's blocks has {SMALL_FROM_WEIGHT:,} numbers, below which float32 "
            "is faster: leave it out",
            SETTING,
        )


def check_device(device: torch.device, dtype: WeightsDtype) -> None:
    """Check that a device computes with weights in this type.

    Raises:
        UserError: unless it is a CPU with instructions for bfloat16.
    """
    if device.type != "cpu":
        raise UserError(
            f"is {dtype}, but the model runs on {device.type}: it is for CPUs; leave it out, or set trainer.precision",
            SETTING,
        )
    if not (cpu_multiplies_bfloat16() and torch.backends.mkldnn.is_available()):
        raise UserError(
            f"is {dtype}, but this CPU has no instructions for bfloat16 (AVX512_BF16 or AMX): leave it out", SETTING
        )
