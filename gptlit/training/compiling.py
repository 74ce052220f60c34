"""torch.compile: whether it pays, tried before the first step, and done without where it fails."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gptlit.errors import reason_of
from gptlit.model.gpt import GPT, Block, next_token_loss

# Measured on two cores with AVX-512: 13 s the first time, which is 30 and more on slower machines; 1.2 s of one thread
# saved in a teraflop of `base`, 0.7 s in one of `laptop`.
COMPILE_SECONDS = 30.0
SAVED_PER_TERAFLOP = 0.7
STEPS_ON_A_GPU = 500  # not measured


def compiling_pays(network: GPT, tokens: int, steps: int, device: torch.device) -> bool:
    """Whether a run saves more time by compiling than compiling takes.

    A function of the settings and of the number of threads, and of nothing that is timed: a run that is resumed must
    decide as it did before, since a compiled step rounds otherwise.

    Args:
        network: what would be compiled.
        tokens: of an optimizer step, on this device.
        steps: optimizer steps of the whole run.
        device: where it runs.
    """
    if device.type != "cpu":
        return steps >= STEPS_ON_A_GPU
    teraflops = flops_per_token(network) * tokens * steps / 1e12
    return teraflops * SAVED_PER_TERAFLOP / torch.get_num_threads() > COMPILE_SECONDS


def flops_per_token(network: GPT) -> float:
    """Operations of a forward and backward pass: 6 for each weight of a product, and attention's 12·L·C·T.

    PaLM, appendix B (arXiv:2204.02311), which is also nanoGPT's count. Neither recomputation nor the optimizer counts.
    """
    config = network.config
    weights = sum(p.numel() for p in network.parameters() if p.dim() > 1)
    looked_up = 0 if config.tie_weights else config.vocab_size  # a tied table is the head too
    looked_up += config.block_size if config.position == "learned" else 0
    weights -= looked_up * config.n_embd
    return 6.0 * weights + 12.0 * config.n_layer * config.n_embd * config.block_size


def compile_training(network: GPT, forward: Callable[[], Tensor]) -> str:
    """Compiles every block, and head and loss together, in place (the names of weights stay); runs `forward` and its
    backward pass once.

    Block by block, since all blocks share one compiled graph: a sixth of the waiting for six layers. Returns what
    happened, in words; where compiling fails the network stays as it was.
    """
    started = time.perf_counter()
    for block in network.blocks:
        block.compile()
        block._compiled_call_impl = while_training(block, block._compiled_call_impl)
    network.loss_fn = torch.compile(next_token_loss)
    try:
        torch.autograd.grad(forward(), [p for p in network.parameters() if p.requires_grad], allow_unused=True)
    except Exception as error:  # whatever a compiler can raise: the run can do without it
        for block in network.blocks:
            block._compiled_call_impl = None
        network.loss_fn = next_token_loss
        return f"not compiled, which is slower but changes nothing else: {reason_of(error)}"
    return f"compiled in {time.perf_counter() - started:.0f} s"


def while_training(block: Block, compiled: Any) -> Callable[..., Tensor]:
    """Calls what was compiled in training only.

    Validation and sampling come with other shapes, each of which would be compiled anew for a few calls.
    """

    def call(*arguments: Any, **named: Any) -> Tensor:
        return (compiled if block.training else block._call_impl)(*arguments, **named)

    return call
