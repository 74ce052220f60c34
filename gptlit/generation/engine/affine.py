"""x W + b for reading alone: the weights are laid out for the rows that they will meet, on a CPU for oneDNN's product.

`torch.mm` of float32 is MKL's product there: for few rows it reads large weights at some 20 GB/s on two cores, for many
it multiplies at a third of the speed. oneDNN's product of a packed weight does neither, but takes 9 µs to begin.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

PACKED_PAYS_FROM = 3 * 2**18  # products of two numbers, in one of matrices: fewer are done before oneDNN has begun
LARGE = 2**17  # numbers in a weight that must be fetched from afar: reading them takes longer, whatever the rows
COPY_PAYS_FROM = 5  # rows: numpy multiplies fewer, one after the other, and reads the weight as `nn.Linear` keeps it
PACKED_FOR = 64  # rows: packed for one, it would be laid out otherwise, and slow for all other numbers of rows


@dataclass(frozen=True, slots=True)
class Affine:
    """x W + b of x (N, in). The weight W (in, out) is the transpose of what `nn.Linear` keeps; `packed` is W too."""

    weight: Tensor
    bias: Tensor | None
    packed: Tensor | None

    @classmethod
    def of(cls, linear: nn.Linear, rows: int) -> "Affine":
        """Lays out the weight anew where that helps products of `rows` rows; 0 leaves it where it is."""
        kept = linear.weight.detach()  # (out, in)
        bias = None if linear.bias is None else linear.bias.detach()
        if rows and packing_pays(rows, kept) and can_be_packed(kept):
            return cls(kept.t(), bias, torch.ops.mkldnn._reorder_linear_weight(kept.contiguous(), PACKED_FOR))  # noqa: SLF001
        copies = rows >= COPY_PAYS_FROM and kept.device.type == "cpu"
        return cls(kept.t().contiguous() if copies else kept.t(), bias, None)

    def packed_for(self, rows: int) -> Tensor | None:
        """The packed weight, where it makes a product of `rows` rows faster."""
        return self.packed if packing_pays(rows, self.weight) else None

    def __call__(self, x: Tensor) -> Tensor:
        if (packed := self.packed_for(x.size(0))) is not None:
            return packed_product(x, packed, self.bias)
        return torch.mm(x, self.weight) if self.bias is None else torch.addmm(self.bias, x, self.weight)

    def add_to(self, x: Tensor, h: Tensor, factor: float) -> None:
        """Adds factor · h W + b to x (N, out), in place: a new tensor would be a copy of x first."""
        if (packed := self.packed_for(h.size(0))) is not None:
            x.add_(packed_product(h, packed, None), alpha=factor)
        else:
            x.addmm_(h, self.weight, alpha=factor)
        if self.bias is not None:
            x.add_(self.bias)


def packing_pays(rows: int, weight: Tensor) -> bool:
    """Whether oneDNN's product of so many rows is faster than torch's own."""
    size = weight.numel()
    return size >= LARGE or rows * size >= PACKED_PAYS_FROM


def can_be_packed(weight: Tensor) -> bool:
    """Whether torch was built with a oneDNN that multiplies such weights."""
    on_cpu = type(weight) is Tensor and weight.device.type == "cpu" and weight.dtype == torch.float32
    return on_cpu and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def packed_product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """The product x W + b (N, out) of x (N, in)."""
    # The overload by its name: finding it takes 8 µs.
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")  # noqa: SLF001
    return product
