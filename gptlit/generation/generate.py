"""Sampling: the next symbol chosen by a pure function, ids streamed from a cache, and text streamed from ids.

Shapes: B rows (one for each sample of each prompt) and V symbols.
"""

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gptlit.errors import UserError
from gptlit.generation.context import DecodingContext
from gptlit.model.gpt import GPT

Context = Literal["exact", "rolling"]
Prompts = Tensor | Sequence[Tensor] | Sequence[Sequence[int]]
UNIFORMS_AT_ONCE = 64  # random numbers drawn ahead for each row


@dataclass(frozen=True)
class Sampling:
    """How the next symbol is chosen from the logits l. The filters act in this order, each on what the last left."""

    temperature: float = 1.0
    """T in p = softmax(l / T). 0 takes the most probable symbol always; 1 is the model's own distribution."""
    top_k: int | None = None
    """Keep the k most probable symbols, and those that tie with the last of them (arXiv:1805.04833)."""
    top_p: float | None = None
    """The nucleus: keep the fewest most probable symbols that together reach probability top_p (arXiv:1904.09751)."""
    min_p: float | None = None
    """Keep the symbols of probability at least min_p · max(p) (arXiv:2407.01082)."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"--temperature is {self.temperature}: it must be 0 (the most probable symbol) or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"--top_k is {self.top_k}: it must be 1 or more; leave it out to keep every symbol")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"--top_p is {self.top_p}: it must be above 0 and at most 1, which keeps every symbol")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise UserError(f"--min_p is {self.min_p}: it must be between 0, which keeps every symbol, and 1")


PLAIN = Sampling()


def next_token_probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution (B, V) that the next symbol is drawn from, of logits (B, V); rows sum to 1.

    In float64, where the device has it, so that only the logits round.
    """
    dtype = sampling_dtype(logits.device)
    if sampling.temperature == 0:
        return torch.zeros_like(logits, dtype=dtype).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
    if sampling.top_k is not None and sampling.top_k < logits.size(1):
        last_kept = logits.topk(sampling.top_k).values[:, -1:]  # (B, 1); before the division, which may make new ties
        logits = logits.masked_fill(logits < last_kept, -math.inf)
    if sampling.temperature != 1:
        # The maximum first: no temperature is so small that what is left overflows.
        logits = (logits.to(dtype) - logits.amax(1, keepdim=True)) / sampling.temperature
    p = logits.softmax(1, dtype=dtype)
    if sampling.top_p is not None and sampling.top_p < 1:
        ranked, order = p.sort(dim=1, descending=True, stable=True)
        before = running_sums(ranked) - ranked  # mass of the more probable symbols
        p = p.scatter(1, order, ranked.masked_fill(before >= sampling.top_p, 0.0))
    if sampling.min_p:
        p = p.masked_fill(p < sampling.min_p * p.amax(1, keepdim=True), 0.0)
    return p if sampling.top_p is None and sampling.min_p is None else p / p.sum(1, keepdim=True)


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The symbols (B,) that numbers `uniform` (B,) from [0, 1) pick out of probabilities (B, V): the inverse of the
    cumulative distribution. One of probability 0 is never picked.
    """
    cumulative = running_sums(probabilities)
    total = cumulative.select(1, -1)  # 1, but for rounding
    return torch.searchsorted(cumulative, (uniform * total).unsqueeze(1), right=True).squeeze(1)


def running_sums(values: Tensor) -> Tensor:
    """Sums of the first 1, 2, … V of each row (B, V) of probabilities.

    A GPU adds fractions in no fixed order, and torch.use_deterministic_algorithms does not let it. Under that they are
    added as whole numbers, which loses no more than rounding does.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return values.cumsum(1)
    one = 1 / torch.finfo(values.dtype).eps
    return (values * one).long().cumsum(1).to(values.dtype) / one


def sampling_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64


def uniform_numbers(seed: int, samples: Sequence[int], device: torch.device) -> Iterator[Tensor]:
    """Endless random numbers (B,) from [0, 1): row i reads the stream that belongs to `seed` and `samples[i]` alone.

    Python's generator, because each has its own state, takes the whole of (seed, sample) as its seed, and gives the
    same numbers on every machine.
    """
    streams = [random.Random(f"{seed}/{sample}") for sample in samples]
    dtype = sampling_dtype(device)
    below_one = 1 - torch.finfo(dtype).eps / 2  # float32 would round the largest numbers up to 1
    while True:
        numbers = [[stream.random() for stream in streams] for _ in range(UNIFORMS_AT_ONCE)]
        yield from torch.tensor(numbers, dtype=dtype, device=device).clamp_(max=below_one).unbind()  # (B,) each


def generate(
    model: GPT,
    prompts: Prompts,
    max_new_tokens: int,
    sampling: Sampling = PLAIN,
    *,
    num_samples: int = 1,
    seed: int = 0,
    context: Context = "exact",
    log_probabilities: list[Tensor] | None = None,
) -> Iterator[Tensor]:
    """Continues every prompt `num_samples` times; yields the ids (B,) of one step as soon as they are drawn.

    Row p · num_samples + k is sample k of prompt p. It depends on the model, the prompt, `seed` and k alone: not on
    the other rows, nor on torch's random state, which is neither read nor moved. (In float32, another batch size may
    round the logits differently: about one draw in a million then falls on the other side of a boundary.)
    To stop early, stop asking. The weights must not change in the meantime. The training flag does not matter: nothing
    is dropped.

    Args:
        model: the model.
        prompts: ids (P, T), or P sequences of any lengths. Only the last `block_size` ids of each are read.
        max_new_tokens: ids drawn for each row.
        sampling: how an id is chosen.
        num_samples: rows for each prompt; the prompt is read once for all of them.
        seed: sample k of a seed draws from a random stream of its own.
        context: what is seen once a row is longer than `block_size`. `exact`: its last `block_size` ids, as the
            lecture and nanoGPT have it, at the price of reading the whole window for every id. `rolling`: whenever
            the cache is full, its newest half is read anew, so that the context grows from half of `block_size` to
            all of it, again and again; an id then costs little more than before.
        log_probabilities: a list to which log softmax(l) of the ids (B,) is appended at every step, in nats. It is
            the model's own, unfiltered and at temperature 1: its mean over a text is minus the loss of that text.

    Raises:
        UserError: for a number out of range, an empty prompt, or ids that the model does not know.
    """
    rows = prompt_rows(prompts, model.config.vocab_size)
    check_counts(max_new_tokens, num_samples)
    if context not in ("exact", "rolling"):
        raise UserError(f"--context is {context}: choose exact or rolling")
    return _generate(model, rows, max_new_tokens, sampling, num_samples, seed, context, log_probabilities)


def _generate(
    model: GPT,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    num_samples: int,
    seed: int,
    context: Context,
    log_probabilities: list[Tensor] | None,
) -> Iterator[Tensor]:
    ids: Tensor | None = None
    device = model.lm_head.weight.device
    for _ in range(max_new_tokens):
        with quietly(device):  # left before every yield: the modes are the caller's too
            if ids is None:
                reader = DecodingContext(model, prompts, num_samples, max_new_tokens, rolling=context == "rolling")
                logits = reader.logits  # (B, V)
                uniforms = uniform_numbers(seed, [*range(num_samples)] * len(prompts), logits.device)
                if bool(logits.isnan().any()):
                    raise UserError("the model's logits are NaN: its training went astray, take an earlier checkpoint")
            else:
                logits = reader.read(ids)  # (B, V)
            ids = draw(next_token_probabilities(logits, sampling), next(uniforms))  # (B,)
            if log_probabilities is not None:
                log_probabilities.append(logits.log_softmax(1).gather(1, ids[:, None])[:, 0])
        yield ids


def quietly(device: torch.device) -> AbstractContextManager[object]:
    """Without gradients, and in the weights' own precision even under autocast."""
    return without_autocast(device) if torch.is_autocast_enabled(device.type) else torch.inference_mode()


@contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """Without gradients, and with autocast off."""
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        yield


def generate_naive(
    model: GPT,
    prompts: Prompts,
    max_new_tokens: int,
    sampling: Sampling = PLAIN,
    *,
    num_samples: int = 1,
    seed: int = 0,
) -> Iterator[Tensor]:
    """What `generate` must equal, written the obvious way: crop to `block_size`, run the whole model, for every row
    and every id (Karpathy, "Let's build GPT"). Without cache or batch, and with `context="exact"`.
    """
    texts = [list(prompt) for prompt in prompt_rows(prompts, model.config.vocab_size) for _ in range(num_samples)]
    check_counts(max_new_tokens, num_samples)
    device = model.lm_head.weight.device
    uniforms = uniform_numbers(seed, [row % num_samples for row in range(len(texts))], device)
    for _ in range(max_new_tokens):
        with quietly(device), evaluating(model):
            windows = [torch.tensor([text[-model.config.block_size :]], device=device) for text in texts]  # (1, T) each
            logits = torch.cat([model(window)[:, -1] for window in windows])  # (B, V)
            ids = draw(next_token_probabilities(logits, sampling), next(uniforms))  # (B,)
        for text, token in zip(texts, ids.tolist(), strict=True):
            text.append(token)
        yield ids


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Switches dropout off, and puts every module's training flag back as it was."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def prompt_rows(prompts: Prompts, vocab_size: int) -> list[list[int]]:
    """The prompts as lists of ids, each known to the model and none empty."""
    rows = [row.tolist() if isinstance(row, Tensor) else list(row) for row in prompts]
    if not rows:
        raise UserError("there is no prompt to continue: give one, or more")
    for number, row in enumerate(rows, 1):
        if not row:
            raise UserError(f"prompt {number} is empty: give it at least one symbol, such as a newline")
        if not 0 <= min(row) <= max(row) < vocab_size:
            raise UserError(
                f"prompt {number} holds an id outside 0 … {vocab_size - 1}, which the model does not know: "
                "encode it with the tokenizer that the model was trained with"
            )
    return rows


def check_counts(max_new_tokens: int, num_samples: int) -> None:
    for flag, value in (("--max_new_tokens", max_new_tokens), ("--num_samples", num_samples)):
        if value < 1:
            raise UserError(f"{flag} is {value}: it must be 1 or more")
