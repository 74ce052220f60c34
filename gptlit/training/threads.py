"""The number of CPU threads of a run: one or all, whichever makes a training step faster at the start."""

import statistics
import time
from collections.abc import Callable, Sequence

import lightning.pytorch as pl
import torch

from gptlit.data import TextDataModule
from gptlit.model.config import GPTConfig
from gptlit.model.gpt import GPT, meta_model
from gptlit.training.compiling import flops_per_token
from gptlit.training.module import LitGPT

ROUNDS, FEWEST_ROUNDS = 5, 3  # measured at most, and at least
ENOUGH_SECONDS = 1.0
CLEARLY_FASTER = 0.9  # one thread is chosen if its step takes less than this share of the time with all threads
LEAST_TERAFLOPS = 1.0  # of a run that is worth a measurement: some 250 steps of `base`
LARGEST_STEP = 2e10  # floating point operations of a measured step; larger batches are cut to fewer rows


def measuring_pays(module: LitGPT, data: TextDataModule, steps: int) -> bool:
    """Return whether a run is long enough for a measurement. Depends on the settings only.

    Args:
        module: the model.
        data: the text is loaded.
        steps: optimizer steps of the whole run.
    """
    tokens = data.batch_size * data.block_size * steps
    return flops_per_token(meta_model(config_of(module, data))) * tokens >= LEAST_TERAFLOPS * 1e12


def fastest_threads(trainer: pl.Trainer, module: LitGPT, data: TextDataModule) -> int:
    """Return 1 or `torch.get_num_threads()`: the number with which forward and backward pass are faster.

    A second model is measured. Weights, optimizer, random state and torch's settings stay as they are.

    Args:
        trainer: not yet running; its precision is used.
        module: the model; the network is not built yet.
        data: the text is loaded.
    """
    available = torch.get_num_threads()
    module.setup("fit")  # precision of float32 matmuls
    try:
        with torch.random.fork_rng(devices=[]):
            step = one_step(trainer, module, data)
            return faster_of(step, available)
    finally:
        torch.set_num_threads(available)
        module.teardown("fit")


def faster_of(step: Callable[[], object], available: int, clock: Callable[[], float] = time.perf_counter) -> int:
    """Time a step with one thread and with all in turn; return the number of threads with the lower median.

    The first round warms up, and counts only where it takes all the time that a measurement may take. Rounds that all
    say the same end the measurement early.

    Args:
        step: makes one step.
        available: number of all threads; it wins unless one thread is clearly faster.
        clock: returns seconds.
    """
    seconds: dict[int, list[float]] = {1: [], available: []}
    started = clock()
    for _ in range(1 + ROUNDS):
        for count, taken in seconds.items():
            torch.set_num_threads(count)
            before = clock()
            step()
            taken.append(clock() - before)
        if clock() - started >= ENOUGH_SECONDS or agree(*(taken[1:] for taken in seconds.values())):
            break
    one, all_threads = (statistics.median(taken[1:] or taken) for taken in seconds.values())
    return 1 if one < CLEARLY_FASTER * all_threads else available


def agree(one: Sequence[float], all_threads: Sequence[float]) -> bool:
    """Return whether every step with one thread was clearly faster than every step with all threads, or slower."""
    if len(one) < FEWEST_ROUNDS:
        return False
    return max(one) < CLEARLY_FASTER * min(all_threads) or max(all_threads) < min(one)


def one_step(trainer: pl.Trainer, module: LitGPT, data: TextDataModule) -> Callable[[], object]:
    """Return a function that makes a forward and a backward pass of a new network like that of the module."""
    config, precision = config_of(module, data), trainer.precision_plugin
    rows, length = data.batch_size // trainer.accumulate_grad_batches, data.block_size
    with precision.module_init_context():
        network = GPT(config)
    network = precision.convert_module(network).train()  # type: ignore[assignment]
    network.checkpoint_activations = module.checkpoint_activations
    rows = min(rows, max(1, int(LARGEST_STEP / (flops_per_token(network) * length))))
    ids = torch.arange(rows * (length + 1)).remainder(config.vocab_size).view(rows, length + 1)
    weights = [p for p in network.parameters() if p.requires_grad]

    def step() -> None:
        with precision.forward_context():
            loss = network(ids[:, :-1], targets=ids[:, 1:])
        torch.autograd.grad(loss, weights, allow_unused=True)

    return step


def config_of(module: LitGPT, data: TextDataModule) -> GPTConfig:
    """Return the architecture of the network that will be trained."""
    assert data.tokenizer is not None
    return module.gpt_for(data.tokenizer.vocab_size)
