"""Transfers from the device, collectives between the ranks of a run, and what a run leaves in its process."""

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# What Lightning sets to start the processes of a run, and leaves.
LAUNCH_VARIABLES = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")


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


@contextmanager
def restored_environment(alone: Callable[[], bool]) -> Iterator[None]:
    """Context that restores, at its end, the variables that Lightning sets to start processes, if `alone()` then.

    With LOCAL_RANK in its environment a later run, or a program that this process starts, would wait for other
    processes. Where there are some, the variables stay: each of them runs the same script, and a later run of the
    script connects them again.
    """
    before = {name: os.environ.get(name) for name in LAUNCH_VARIABLES}
    try:
        yield
    finally:
        if alone():
            for name, value in before.items():
                if value is not None:
                    os.environ[name] = value
                else:
                    os.environ.pop(name, None)


def leave_process_group() -> None:
    """Destroy the process group, if there is one: a group of several ranks when Python exits.

    Call it only when no rank waits for another. Gloo's threads may still hold the last tensor when Python shuts down,
    which aborts the process ("terminate called without an active exception"). Destroying the group waits for them.
    Lightning does so itself for NCCL. Until then a later run of the script uses the group: if each rank left it at
    once, the first to connect again could reach the store of the old group, and wait for ever.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if torch.distributed.get_world_size() == 1:
            destroy_process_group()
        else:
            atexit.unregister(destroy_process_group)
            atexit.register(destroy_process_group)


def destroy_process_group() -> None:
    """Destroy the process group, if there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
