"""Transfers from the device, and collectives between the ranks of a run."""

import torch
from torch import Tensor


class HostCopy:
    """Asynchronous device-to-host copy of a scalar: started here, waited for in `item`."""

    def __init__(self, value: Tensor) -> None:
        self.value, self.sent = value, None
        if value.is_cuda:
            self.value = value.to("cpu", non_blocking=True)  # into pinned memory
            self.sent = torch.cuda.Event()
            self.sent.record()

    def item(self) -> float:
        """Wait for the copy and return the number."""
        if self.sent is not None:
            self.sent.synchronize()
        return self.value.item()


def blank_batch(rows: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return inputs and targets (rows, length) of int64 zeros, with the strides of a batch of `RandomChunks`.

    torch.compile specialises on strides, so another layout would be compiled again.
    """
    inputs, targets = (torch.zeros(rows, length + 1, dtype=torch.int64, device=device) for _ in range(2))
    return inputs[:, :-1], targets[:, 1:]


def mean_over_processes(value: Tensor) -> Tensor:
    """Return the mean over all ranks. Collective: every rank must call this."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(value)
        value = value / torch.distributed.get_world_size()
    return value


def leave_process_group() -> None:
    """Destroy the process group, if there is one. Call it only when no rank waits for another.

    Gloo's threads may still hold the last tensor when Python shuts down, which aborts the process ("terminate called
    without an active exception"). Destroying the group waits for them. Lightning does so itself for NCCL.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
