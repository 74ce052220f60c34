"""Random changes of a training step: token noise and dropout."""

import torch
from torch import Tensor
from torch.nn import functional as F


def with_noise(ids: Tensor, probability: float, vocab_size: int) -> Tensor:
    """Replace each id with `probability` by a random one of the vocabulary; same shape.

    Also where the default dtype has half precision, as in `bf16-true`: random numbers of that type would be 0 too often
    (`findings/torch-rand-bfloat16-zeros.sh`).
    """
    others = torch.randint(vocab_size, ids.shape, device=ids.device)
    dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
    return torch.where(torch.rand(ids.shape, dtype=dtype, device=ids.device) < probability, others, ids)


def drop(x: Tensor, probability: float, random_bytes: Tensor | None) -> Tensor:
    """Dropout (Srivastava et al. 2014) by random bytes of the shape of x; torch's own dropout if there are none."""
    if random_bytes is None:
        return F.dropout(x, probability)
    threshold = dropout_threshold(probability)
    return x * (random_bytes >= threshold).to(x.dtype) * (256 / (256 - threshold))


def dropout_threshold(probability: float) -> int:
    """Return the smallest random byte that keeps a number; at least one of 256 is kept."""
    return min(255, round(256 * probability))
