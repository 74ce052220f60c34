"""A training step on a GPU as three launches: forward pass, backward pass and update, each recorded as a CUDA graph.

A step of a small model is hundreds of kernels, and starting them one by one from Python takes longer than they do.
Whole-network capture is torch's own (https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture). The
two passes are recorded apart, so that the loss is known, and can be looked at, while the backward pass still runs.
"""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gptlit.device.cuda_graphs import Recorder, close_attempt
from gptlit.errors import reason_of

WARM_UPS = 3  # as in torch's recipe


class RecordedStep:
    """`recorded(inputs, targets)`, `recorded.backward()` and `optimizer.step()` are a training step, at a launch each.

    Making one leaves weights, optimizer and random numbers as they were. A recording fixes addresses and every number
    that the host knew. So the batch is copied to where it is read, and the rates of the optimizer's groups too, which
    stay plain numbers for everyone else; gradients are written over and need no zeroing. What is drawn at random
    follows from the seed of the device's generator, as it does without. Where weights or state have been moved, it is
    all recorded again.

    Args:
        loss_fn: the mean loss () of inputs and targets, as it is trained on.
        batch: inputs and targets (B, T) as they will come; this memory is written over.
        optimizer: over all parameters that are trained; its `step` is replaced until `close`. Apart from the rates its
            settings are fixed.

    Raises:
        Exception: whatever a pass or the update raises, above all where it does what cannot be recorded.
    """

    def __init__(
        self, loss_fn: Callable[[Tensor, Tensor], Tensor], batch: tuple[Tensor, Tensor], optimizer: Optimizer
    ) -> None:
        self.loss_fn, self.optimizer, self.eager_update = loss_fn, optimizer, optimizer.step
        self.inputs, self.targets = batch
        self.parameters: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        self.rates = [torch.zeros((), device=self.inputs.device) for _ in optimizer.param_groups]
        self.record()
        vars(optimizer)["step"] = self.step

    @staticmethod
    def serves(device: torch.device) -> bool:
        """Whether the device plays recordings."""
        return device.type == "cuda"

    def record(self) -> None:
        """Records the three parts on the batch that lies there."""
        gc.collect()  # so that no graph of an earlier pass lives on, and lends nodes that belong to another stream
        device = self.inputs.device
        self.recorder = Recorder(device)
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            as_it_was(self.optimizer),
            rates_in_memory(self.optimizer, self.rates),
        ):
            for _ in range(WARM_UPS):
                self.recorder.warm_up(self.whole)
            self.play_forward = self.recorder.capture(self.forward_pass)
            self.play_backward = self.recorder.capture(self.backward_pass)
            self.play_update = self.recorder.capture(self.update)
        self.gradients = [p.grad for p in self.parameters]
        self.places = self.places_now()

    def whole(self) -> None:
        """The step without a recording."""
        self.forward_pass()
        self.backward_pass()
        self.update()

    def forward_pass(self) -> Tensor:
        """The loss, which is kept for the backward pass."""
        self.loss = self.loss_fn(self.inputs, self.targets)
        return self.loss.detach()

    def backward_pass(self) -> None:
        """Gradients in memory of their own: where there are none yet, they are written and not added."""
        for parameter in self.parameters:
            parameter.grad = None
        self.loss.backward()
        del self.loss  # its graph would lend the next one nodes that belong to the stream of this one

    def update(self) -> None:
        """The optimizer's step, its own."""
        self.eager_update()

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Loss () of inputs and targets (B, T), in memory that the next call writes over.

        Raises:
            ValueError: when the batch has another shape than the one recorded.
        """
        if inputs.shape != self.inputs.shape:
            raise ValueError(f"the step was recorded for {tuple(self.inputs.shape)} tokens, not {tuple(inputs.shape)}")
        if self.places_now() != self.places:
            self.record()
        self.inputs.copy_(inputs)
        self.targets.copy_(targets)
        return self.play_forward()

    def backward(self) -> None:
        """Gradients of the last loss, where the parameters have them."""
        self.play_backward()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            if parameter.grad is None:
                parameter.grad = gradient

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates the weights at the groups' rates; returns what `closure`, called first, returned."""
        loss = None if closure is None else closure()
        for rate, group in zip(self.rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        self.play_update()
        return loss

    def places_now(self) -> list[int]:
        """Addresses of the weights and of the optimizer's state."""
        return [tensor.data_ptr() for tensor in held_by(self.optimizer)]

    def close(self) -> None:
        """Gives the optimizer its own step back."""
        vars(self.optimizer).pop("step", None)
        self.optimizer.zero_grad(set_to_none=True)


def record_training(
    loss_fn: Callable[[Tensor, Tensor], Tensor], batch: tuple[Tensor, Tensor], optimizer: Optimizer
) -> tuple[RecordedStep | None, str]:
    """A `RecordedStep` and what happened, in words; None where recording fails, which costs speed and nothing else."""
    started = time.perf_counter()
    try:
        recorded = RecordedStep(loss_fn, batch, optimizer)
    except Exception as error:  # of whatever a compiler, a driver or a full memory can raise
        close_attempt(batch[0].device)
        optimizer.zero_grad(set_to_none=True)
        return None, f"not recorded as CUDA graphs, which is slower but changes nothing else: {reason_of(error)}"
    return recorded, f"recorded as CUDA graphs in {time.perf_counter() - started:.0f} s"


def held_by(optimizer: Optimizer) -> Iterator[Tensor]:
    """The weights, and all tensors of the optimizer's state."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield parameter
            state = optimizer.state.get(parameter, {})
            yield from (value for value in state.values() if isinstance(value, Tensor))


@contextmanager
def as_it_was(optimizer: Optimizer) -> Iterator[None]:
    """Puts weights and state back in the end. What state did not exist becomes zeros, which is what it begins with."""
    before = {tensor: tensor.detach().to("cpu", copy=True) for tensor in held_by(optimizer)}  # the device may be full
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor in held_by(optimizer):
                if tensor in before:
                    tensor.copy_(before[tensor])
                else:
                    tensor.zero_()


@contextmanager
def rates_in_memory(optimizer: Optimizer, rates: list[Tensor]) -> Iterator[None]:
    """Inside, each group's rate is one of `rates`: tensors () that a recorded step reads when it is played."""
    groups = optimizer.param_groups
    before = [dict(group) for group in groups]
    for group, rate in zip(groups, rates, strict=True):
        group.update(lr=rate, capturable=True)  # which torch's AdamW wants to hear before it is recorded
    try:
        yield
    finally:
        for group, settings in zip(groups, before, strict=True):
            group.clear()
            group.update(settings)
