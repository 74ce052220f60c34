"""torch.compile, tried before the first step and done without where it fails."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from gptlit.model import GPT


def compile_blocks(network: GPT, forward: Callable[[], Tensor]) -> str:
    """Compiles every block in place (the names of weights stay) and runs `forward` and its backward pass once.

    Block by block, since all blocks share one compiled graph: a sixth of the waiting for six layers. Returns what
    happened, in words; where compiling fails the network stays as it was.
    """
    started = time.perf_counter()
    for block in network.blocks:
        block.compile()
    try:
        torch.autograd.grad(forward(), [p for p in network.parameters() if p.requires_grad], allow_unused=True)
    except Exception as error:  # whatever a compiler can raise: the run can do without it
        for block in network.blocks:
            block._compiled_call_impl = None
        reason = " ".join(str(error).split())[:200]
        return f"not compiled, which is slower but changes nothing else: {type(error).__name__}: {reason}"
    return f"compiled in {time.perf_counter() - started:.0f} s"
