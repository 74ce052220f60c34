"""Between the host and its devices, and among the processes of a run."""

import torch
from torch import Tensor


class HostCopy:
    """A number on its way from the device: sent at once, read later, without waiting for what the device does since."""

    def __init__(self, value: Tensor) -> None:
        self.value, self.sent = value, None
        if value.is_cuda:
            self.value = value.to("cpu", non_blocking=True)  # into pinned memory
            self.sent = torch.cuda.Event()
            self.sent.record()

    def item(self) -> float:
        """The number, as soon as it has arrived."""
        if self.sent is not None:
            self.sent.synchronize()
        return self.value.item()


def blank_batch(rows: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets (rows, length), int64 zeros, laid out as `RandomChunks` cuts them from length + 1 tokens: what
    is compiled for one layout would be compiled anew for another.
    """
    inputs, targets = (torch.zeros(rows, length + 1, dtype=torch.int64, device=device) for _ in range(2))
    return inputs[:, :-1], targets[:, 1:]


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean over all processes; every one of them has to call this."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(value)
        value = value / torch.distributed.get_world_size()
    return value


def leave_process_group() -> None:
    """Ends the process group of a run, if there is one; for when no process waits for another any more.

    The threads that exchange tensors may be behind: they drop the last one when Python is already ending, and whoever
    asks for Python then is aborted ("terminate called without an active exception"). This waits for them. Lightning
    does it by itself where the exchange is NCCL's.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
