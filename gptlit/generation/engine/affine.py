"""x W + b without gradients, with the weight laid out in memory for the number of rows to come.

On AMD CPUs `torch.mm` in float32 runs MKL's generic kernels, which oneDNN's matmul of a packed weight beats by 2 to 3
times; on Intel CPUs it does not (`gptlit.generation.engine.limits`).
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

from gptlit.device.cpu import is_amd
from gptlit.generation.engine.limits import COPY_FROM_ROWS, PACK_FROM_PRODUCT, PACK_FROM_WEIGHT, PACKED_FOR
from gptlit.generation.engine.small_weights import SmallWeight, WeightsDtype, small_weight


@dataclass(frozen=True, slots=True)
class Affine:
    """x W + b for x (N, in).

    Args:
        weight: W (in, out), the transpose of the weight of `nn.Linear`.
        bias: b (out,), or None.
        packed: W in oneDNN's layout, or None.
        small: W in bfloat16 or int8, used instead of the others, or None.
    """

    weight: Tensor
    bias: Tensor | None
    packed: Tensor | None
    small: SmallWeight | None = None

    @classmethod
    def of(cls, linear: nn.Linear, rows: int, dtype: WeightsDtype | None = None) -> "Affine":
        """Lay out the weight of a linear layer for inputs of `rows` rows; 0 shares the memory of the layer.

        With a `dtype`, a large weight is rounded to it.
        """
        weight = linear.weight.detach()  # (out, in)
        bias = None if linear.bias is None else linear.bias.detach()
        small = None if dtype is None else small_weight(weight, dtype)
        if small is not None:
            return cls(weight.t(), bias, None, small)
        if rows and packing_pays(rows, weight):
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKED_FOR)  # noqa: SLF001
            return cls(weight.t(), bias, packed)
        copy = rows >= COPY_FROM_ROWS and weight.device.type == "cpu"
        return cls(weight.t().contiguous() if copy else weight.t(), bias, None)

    def __call__(self, x: Tensor) -> Tensor:
        if self.small is not None:
            product = self.small(x).float()
            return product if self.bias is None else product.add_(self.bias)
        if self.packed is not None and packing_pays(x.size(0), self.weight):
            return packed_matmul(x, self.packed, self.bias)
        return torch.mm(x, self.weight) if self.bias is None else torch.addmm(self.bias, x, self.weight)

    def add_to(self, x: Tensor, h: Tensor, factor: float) -> None:
        """Add factor · h W + b to x (N, out), in place."""
        if self.small is not None:
            x.add_(self.small(h), alpha=factor)
        elif self.packed is not None and packing_pays(h.size(0), self.weight):
            x.add_(packed_matmul(h, self.packed, None), alpha=factor)
        else:
            x.addmm_(h, self.weight, alpha=factor)
        if self.bias is not None:
            x.add_(self.bias)


def packing_pays(rows: int, weight: Tensor) -> bool:
    """Whether oneDNN's packed matmul of `rows` rows is faster than `torch.mm`, and available for this weight."""
    large = weight.numel() >= PACK_FROM_WEIGHT or rows * weight.numel() >= PACK_FROM_PRODUCT
    return large and is_amd() and can_be_packed(weight)


def can_be_packed(weight: Tensor) -> bool:
    """Whether this build of torch has oneDNN's matmul of packed weights, for this weight."""
    on_cpu = type(weight) is Tensor and weight.device.type == "cpu" and weight.dtype == torch.float32
    return on_cpu and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def packed_matmul(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W + b (N, out) for x (N, in) and a packed W."""
    # Named overload: resolving it takes 8 µs a call.
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")  # noqa: SLF001
    return product
