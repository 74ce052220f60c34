"""The loss, with one rule for targets that do not count: negative ones are ignored."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100  # stands for every negative target; torch's default


def cross_entropy(logits: Tensor, targets: Tensor, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
    """Return the cross-entropy in nats, without the positions of negative targets.

    Args:
        logits: (…, V).
        targets: ids (…) int64; any negative number is ignored.
        reduction: mean over the positions that count, or sum.

    Returns:
        A scalar; 0, with gradients of 0, if no position counts.
    """
    counted = targets >= 0
    ids = torch.where(counted, targets, IGNORED).flatten()
    loss = F.cross_entropy(logits.flatten(0, -2), ids, ignore_index=IGNORED, reduction=reduction)
    return torch.where(counted.any(), loss, torch.zeros_like(loss))
