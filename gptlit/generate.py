"""Sampling: the next symbol chosen by a pure function, ids streamed from a cache, and text streamed from ids.

Shapes: B rows (one for each sample of each prompt) and V symbols.
"""

import math
import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from gptlit.decode import Decoder
from gptlit.errors import UserError
from gptlit.model import GPT

Context = Literal["exact", "rolling"]
Prompts = Tensor | Sequence[Tensor] | Sequence[Sequence[int]]
UNIFORMS_AT_ONCE = 256  # random numbers drawn ahead for each row


@dataclass(frozen=True)
class Sampling:
    """How the next symbol is chosen from the logits l. The filters act in this order, each on what the last left."""

    temperature: float = 1.0
    """T in p = softmax(l / T). 0 takes the most probable symbol always; 1 is the model's own distribution."""
    top_k: int | None = None
    """Keep the k most probable symbols, and those that tie with the last of them (arXiv:1805.04833)."""
    top_p: float | None = None
    """Keep the fewest most probable symbols whose probabilities sum to top_p or more: the nucleus (arXiv:1904.09751)."""
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
    logits = logits.to(sampling_dtype(logits.device))
    if sampling.temperature == 0:
        return torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
    if sampling.temperature != 1:
        # The maximum first: no temperature is so small that what is left overflows.
        logits = (logits - logits.amax(1, keepdim=True)) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.size(1):
        last_kept = logits.topk(sampling.top_k).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < last_kept, -math.inf)
    p = logits.softmax(1)
    if sampling.top_p is not None and sampling.top_p < 1:
        ranked, order = p.sort(1, descending=True, stable=True)
        before = ranked.cumsum(1) - ranked  # mass of the more probable symbols
        p = p.scatter(1, order, ranked.masked_fill(before >= sampling.top_p, 0.0))
    if sampling.min_p:
        p = p.masked_fill(p < sampling.min_p * p.amax(1, keepdim=True), 0.0)
    return p if sampling.top_p is None and sampling.min_p is None else p / p.sum(1, keepdim=True)


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The symbols (B,) that numbers `uniform` (B,) from [0, 1) pick out of probabilities (B, V): the inverse of the
    cumulative distribution. One of probability 0 is never picked.
    """
    cumulative = probabilities.cumsum(1)
    return torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0]


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
    To stop early, stop asking. The weights are read when the first id is asked for; the training flag is not, nothing
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


@torch.inference_mode()
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
    reader = Reader(model, prompts, max_new_tokens, num_samples, context == "rolling")
    samples = [k for _ in prompts for k in range(num_samples)]
    uniforms = uniform_numbers(seed, samples, reader.logits.device)
    if bool(reader.logits.isnan().any()):
        raise UserError("the model gives NaN: its training went astray, take an earlier checkpoint")
    for step in range(max_new_tokens):
        if step:
            reader.read(ids)
        ids = draw(next_token_probabilities(reader.logits, sampling), next(uniforms))  # (B,)
        if log_probabilities is not None:
            log_probabilities.append(reader.logits.log_softmax(1).gather(1, ids[:, None])[:, 0])
        yield ids


class Reader:
    """What generation remembers: each row's newest ids, the cache behind them, and the logits (B, V) of what follows."""

    def __init__(
        self, model: GPT, prompts: list[list[int]], max_new_tokens: int, num_samples: int, rolling: bool
    ) -> None:
        self.decoder = Decoder(model)
        self.block_size = model.config.block_size
        self.rolling = rolling
        device = self.decoder.device
        self.lengths = [min(len(prompt), self.block_size) for prompt in prompts]  # ids in each row's window
        longest = max(self.lengths)
        window = torch.zeros(len(prompts), longest, dtype=torch.long)  # (P, T), aligned at the right
        for row, (prompt, length) in enumerate(zip(prompts, self.lengths, strict=True)):
            window[row, longest - length :] = torch.tensor(prompt[-length:])
        window = window.to(device)

        capacity = min(self.block_size, longest + max_new_tokens - 1)  # the last id drawn is never read
        cache = self.decoder.new_cache(len(prompts), capacity)
        logits = self.decoder(*left_aligned(window, self.lengths), cache)
        ...
