"""torch.compile for training: when it pays, one trial before the first step, and eager execution where it fails."""

import time
from collections.abc import Callable
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from gptlit.data import TextDataModule
from gptlit.device.processes import blank_batch
from gptlit.errors import reason_of
from gptlit.model.block import Block
from gptlit.model.gpt import GPT, next_token_loss
from gptlit.training.lightning_internals import datamodule_of, steps_of_run

STEPS_ON_A_GPU = 500  # not measured

Mode = Literal["default", "reduce-overhead"]


def compiling_pays(steps: float, device: torch.device) -> bool:
    """Return whether a run saves more time by compiling than compiling takes.

    Depends on the settings only, never on a measured time: a resumed run must decide as it did before, since a compiled
    step rounds differently. On a CPU an eager step takes as long as a compiled one (`gptlit.model.fused`).

    Args:
        steps: optimizer steps of the whole run.
        device: device of the run.
    """
    return device.type != "cpu" and steps >= STEPS_ON_A_GPU


def flops_per_token(network: GPT) -> float:
    """Return the floating point operations of a forward and backward pass per token.

    6 per weight of a matrix multiplication plus 12·L·C·T for attention: PaLM, appendix B (arXiv:2204.02311), and
    nanoGPT's count. Recomputation and the optimizer are not included.
    """
    config = network.config
    weights = sum(p.numel() for p in network.parameters() if p.dim() > 1)
    looked_up = 0 if config.tie_weights else config.vocab_size  # a tied embedding is the head too
    looked_up += config.block_size if config.position == "learned" else 0
    weights -= looked_up * config.n_embd
    return 6.0 * weights + 12.0 * config.n_layer * config.n_embd * config.block_size


def is_compiled(trainer: pl.Trainer, setting: bool | str) -> bool:
    """Return whether a fit compiles its network.

    Args:
        trainer: before its first step.
        setting: `model.compile`: true, false, `auto` or `reduce-overhead`.
    """
    if setting == "auto":
        return compiling_pays(steps_of_run(trainer), trainer.strategy.root_device)
    return bool(setting)


def batch_of_known_shape(trainer: pl.Trainer) -> tuple[Tensor, Tensor] | None:
    """Return inputs and targets of the shape of every micro-batch of a fit; None for data that does not tell it."""
    data = datamodule_of(trainer)
    if not isinstance(data, TextDataModule):
        return None
    rows = data.batch_size // (trainer.world_size * trainer.accumulate_grad_batches)
    return blank_batch(rows, data.block_size, trainer.strategy.root_device)


def compile_network(trainer: pl.Trainer, network: GPT, setting: bool | str, batch: tuple[Tensor, Tensor]) -> str:
    """Compile the network of a fit as `model.compile` says.

    Args:
        trainer: of the fit.
        network: its model.
        setting: true, `auto` or `reduce-overhead`.
        batch: inputs and targets of the shape of the micro-batches, for the trial.

    Returns:
        What happened, as a line for the user.
    """
    inputs, targets = batch

    def forward() -> Tensor:
        with trainer.precision_plugin.forward_context():
            loss: Tensor = network.train()(inputs, targets=targets)
            return loss

    return compile_training(network, forward, "reduce-overhead" if setting == "reduce-overhead" else "default")


def compile_training(network: GPT, forward: Callable[[], Tensor], mode: Mode = "default") -> str:
    """Compile every block, and head and loss together, in place; names of weights stay.

    Blocks are compiled one by one because they share one compiled graph: with six layers, a sixth of the time. Then
    `forward` and its backward pass run once, so that a failure costs nothing.

    Args:
        network: the model; stays eager where compiling fails.
        forward: returns the training loss of a batch of the right shape.
        mode: as in torch.compile; `reduce-overhead` uses CUDA graphs.

    Returns:
        What happened, as a line for the user.
    """
    started = time.perf_counter()
    for block in network.blocks:
        block.compile(mode=mode)
        use_compiled_in_training_only(block)
    network.loss_fn = torch.compile(next_token_loss, mode=mode)
    try:
        torch.autograd.grad(forward(), [p for p in network.parameters() if p.requires_grad], allow_unused=True)
    except Exception as error:  # a compiler can raise anything, and the run works without it
        for block in network.blocks:
            block._compiled_call_impl = None  # noqa: SLF001
        network.loss_fn = next_token_loss
        return f"not compiled (slower, same result): {reason_of(error)}"
    return f"compiled in {time.perf_counter() - started:.0f} s"


def use_compiled_in_training_only(block: Block) -> None:
    """Make a compiled block run eagerly in evaluation mode.

    Validation and sampling have other shapes; each would be compiled again for a few calls.
    """
    # torch.nn.Module keeps what `compile()` made under this name, and calls it if it is not None.
    compiled: Any = block._compiled_call_impl  # noqa: SLF001
    eager: Any = block._call_impl  # noqa: SLF001

    def call(*args: Any, **kwargs: Any) -> Any:
        return (compiled if block.training else eager)(*args, **kwargs)

    block._compiled_call_impl = call  # noqa: SLF001
