"""Sampling: the next token chosen by a pure function of the logits, and ids generated one step at a time.

Shapes: B rows (one for each sample of each prompt), P prompts, T positions, V tokens.
"""

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gptlit.errors import UserError, require
from gptlit.generation.context import DecodingContext
from gptlit.generation.engine.small_weights import WeightsDtype, check_weights_dtype
from gptlit.model.gpt import GPT

Context = Literal["exact", "rolling"]
Prompts = Tensor | Sequence[Tensor] | Sequence[Sequence[int]]
UNIFORMS_AT_ONCE = 64  # random numbers made ahead for each row


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the logits. The filters apply in this order, each to what the last one kept.

    Raises:
        UserError: for a value out of range.
    """

    temperature: float = 1.0
    """T in softmax(logits / T). 1 is the model's own distribution; 0 always takes the most probable token."""
    top_k: int | None = None
    """Keep the k most probable tokens, and those that tie with the last of them (arXiv:1805.04833)."""
    top_p: float | None = None
    """Nucleus sampling: keep the fewest most probable tokens that together reach probability top_p
    (arXiv:1904.09751)."""
    min_p: float | None = None
    """Keep the tokens of probability at least min_p · max(p) (arXiv:2407.01082)."""

    def __post_init__(self) -> None:
        T, k, p, m = self.temperature, self.top_k, self.top_p, self.min_p
        require(0 <= T < math.inf, "temperature", T, "0 (the most probable token) or more, and finite")
        require(k is None or k >= 1, "top_k", k, "1 or more; leave it out to keep every token")
        require(p is None or 0 < p <= 1, "top_p", p, "above 0 and at most 1, which keeps every token")
        require(m is None or 0 <= m <= 1, "min_p", m, "between 0, which keeps every token, and 1")


PLAIN = Sampling()


def next_token_probabilities(
    model: GPT, prompts: Prompts, sampling: Sampling = PLAIN, *, weights_dtype: WeightsDtype | None = None
) -> Tensor:
    """Return the distribution that `generate` samples the next token of each prompt from.

    Args:
        model: the model, such as `LitGPT.network`. Its training flag is ignored: there is no dropout.
        prompts: ids (P, T), or P sequences of any lengths. The last `block_size` ids of each are read.
        sampling: temperature and filters; by default the model's own distribution.
        weights_dtype: as of `generate`.

    Returns:
        Probabilities (P, V), in float64 where the device has it; rows sum to 1.

    Raises:
        UserError: for an empty prompt, an id outside the vocabulary, NaN logits, or a `weights_dtype` that device or
            model do not take.
    """
    rows = prompt_rows(prompts, model.config.vocab_size)
    check_weights_dtype(model, weights_dtype)
    with no_grad_no_autocast(model.lm_head.weight.device):
        logits = DecodingContext(model, rows, 1, 1, rolling=False, weights_dtype=weights_dtype).logits  # (P, V)
        check_finite(logits)
        probabilities = distribution(logits, sampling)
    return probabilities.clone()  # outside of inference mode: an ordinary tensor


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return the distribution (B, V) after temperature and filters for logits (B, V); rows sum to 1.

    In float64 where the device has it, so that only the logits are rounded.
    """
    dtype = sampling_dtype(logits.device)
    if sampling.temperature == 0:
        return torch.zeros_like(logits, dtype=dtype).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
    if sampling.top_k is not None and sampling.top_k < logits.size(1):
        last_kept = logits.topk(sampling.top_k).values[:, -1:]  # (B, 1); before the division, which may make new ties
        logits = logits.masked_fill(logits < last_kept, -math.inf)
    if sampling.temperature != 1:
        # Subtract the maximum first, so that the smallest temperature does not overflow.
        logits = (logits.to(dtype) - logits.amax(1, keepdim=True)) / sampling.temperature
    p = logits.softmax(1, dtype=dtype)
    if sampling.top_p is not None and sampling.top_p < 1:
        ranked, order = p.sort(dim=1, descending=True, stable=True)
        before = running_sums(ranked) - ranked  # mass of the more probable tokens
        p = p.scatter(1, order, ranked.masked_fill(before >= sampling.top_p, 0.0))
    if sampling.min_p:
        p = p.masked_fill(p < sampling.min_p * p.amax(1, keepdim=True), 0.0)
    return p if sampling.top_p is None and sampling.min_p is None else p / p.sum(1, keepdim=True)


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Return the ids (B,) at numbers `uniform` (B,) from [0, 1) in the inverse cumulative distribution.

    An id of probability 0 is never returned.

    Args:
        probabilities: (B, V).
        uniform: (B,).
    """
    cumulative = running_sums(probabilities)
    total = cumulative.select(1, -1)  # 1, up to rounding
    return torch.searchsorted(cumulative, (uniform * total).unsqueeze(1), right=True).squeeze(1)


def running_sums(values: Tensor) -> Tensor:
    """Return the cumulative sums of each row (B, V) of probabilities.

    `cumsum` of fractions on a GPU is not deterministic, and torch.use_deterministic_algorithms refuses it. Under that
    setting the sums are of integers, which loses no more than rounding does.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return values.cumsum(1)
    one = 1 / torch.finfo(values.dtype).eps
    return (values * one).long().cumsum(1).to(values.dtype) / one


def sampling_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # Apple GPUs have no float64


def uniform_numbers(seed: int, samples: Sequence[int], device: torch.device) -> Iterator[Tensor]:
    """Yield random numbers (B,) from [0, 1) without end; row i has the stream of (`seed`, `samples[i]`).

    Python's generator: each stream has its own state, is seeded with all of (seed, sample), and gives the same numbers
    on every machine.
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
    context: Context = "rolling",
    weights_dtype: WeightsDtype | None = None,
    log_probabilities: list[Tensor] | None = None,
) -> Iterator[Tensor]:
    """Continue every prompt `num_samples` times; yield the ids (B,) of each step as soon as they are sampled.

    Row p · num_samples + k is sample k of prompt p. It depends only on the model, the prompt, `seed` and k, not on the
    batch, nor on torch's global random state, which is neither read nor changed. (In float32 another batch size may
    round the logits differently, which changes about one token in a million.)
    To stop early, stop iterating. The weights must not change meanwhile. The training flag is ignored: there is no
    dropout.

    Args:
        model: the model, such as `LitGPT.network`.
        prompts: ids (P, T), or P sequences of any lengths. The last `block_size` ids of each are read.
        max_new_tokens: ids to generate for each row.
        sampling: how the next id is chosen.
        num_samples: rows per prompt; the prompt is read once for all of them.
        seed: sample k of a seed has its own random stream.
        context: what the model sees once a row is longer than `block_size`. `rolling`: whenever the cache is full, its
            newest half is read again, so that the context grows from half of `block_size` to all of it, repeatedly; an
            id costs about as much as within `block_size`. `exact`: the last `block_size` ids, as in the lecture and
            nanoGPT; the whole window is read again for every id, which is many times slower. Rolling did not raise the
            loss of any model that was measured (`tests/benchmarks/README.md`).
        weights_dtype: `bfloat16` or `int8` rounds the large weight matrices, on a CPU with instructions for bfloat16
            and for models from a few million parameters on; a token takes less time, and its probabilities change
            (`tests/benchmarks/README.md`). The model itself keeps its weights.
        log_probabilities: a list; log softmax(logits) of the ids (B,) is appended at every step, in nats. It is the
            model's own distribution, without filters and at temperature 1: minus its mean over a text is the loss.

    Yields:
        Ids (B,) int64, on the model's device.

    Raises:
        UserError: at the call for a number out of range, an empty prompt, or an id outside the vocabulary, or a
            `weights_dtype` that device or model do not take; at the first step for NaN logits.
    """
    rows = prompt_rows(prompts, model.config.vocab_size)
    check_counts(max_new_tokens, num_samples)
    if context not in ("exact", "rolling"):
        raise UserError(f"is {context}: choose exact or rolling", "context")
    check_weights_dtype(model, weights_dtype)
    return _generate(
        model, rows, max_new_tokens, sampling, num_samples, seed, context, weights_dtype, log_probabilities
    )


def _generate(
    model: GPT,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    num_samples: int,
    seed: int,
    context: Context,
    weights_dtype: WeightsDtype | None,
    log_probabilities: list[Tensor] | None,
) -> Iterator[Tensor]:
    ids: Tensor | None = None
    device = model.lm_head.weight.device
    for _ in range(max_new_tokens):
        with no_grad_no_autocast(device):  # left before every yield: the modes are global
            if ids is None:
                decoding = DecodingContext(
                    model, prompts, num_samples, max_new_tokens, context == "rolling", weights_dtype
                )
                logits = decoding.logits  # (B, V)
                uniforms = uniform_numbers(seed, [*range(num_samples)] * len(prompts), logits.device)
                check_finite(logits)
            else:
                logits = decoding.read(ids)  # (B, V)
            ids = draw(distribution(logits, sampling), next(uniforms))  # (B,)
            if log_probabilities is not None:
                log_probabilities.append(logits.log_softmax(1).gather(1, ids[:, None])[:, 0])
        yield ids


def check_finite(logits: Tensor) -> None:
    """Raise `UserError` if a logit is NaN."""
    if bool(logits.isnan().any()):
        raise UserError("the model's logits are NaN: its training diverged; use an earlier checkpoint")


def no_grad_no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Context without gradients, and with autocast off, so that the weights' own precision is used."""
    return _without_autocast(device) if torch.is_autocast_enabled(device.type) else torch.inference_mode()


@contextmanager
def _without_autocast(device: torch.device) -> Iterator[None]:
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
    """Specification of `generate` with `context="exact"`: crop to `block_size` and run the whole model for every row
    and every id (Karpathy, "Let's build GPT"), without cache or batch.
    """
    texts = [list(prompt) for prompt in prompt_rows(prompts, model.config.vocab_size) for _ in range(num_samples)]
    check_counts(max_new_tokens, num_samples)
    device = model.lm_head.weight.device
    uniforms = uniform_numbers(seed, [row % num_samples for row in range(len(texts))], device)
    for _ in range(max_new_tokens):
        with no_grad_no_autocast(device), evaluating(model):
            windows = [torch.tensor([text[-model.config.block_size :]], device=device) for text in texts]  # (1, T) each
            logits = torch.cat([model(window)[:, -1] for window in windows])  # (B, V)
            ids = draw(distribution(logits, sampling), next(uniforms))  # (B,)
        for text, token in zip(texts, ids.tolist(), strict=True):
            text.append(token)
        yield ids


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Context in evaluation mode; every module's training flag is restored afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def prompt_rows(prompts: Prompts, vocab_size: int) -> list[list[int]]:
    """Return the prompts as lists of ids.

    Raises:
        UserError: if there is no prompt, one is empty, or an id is outside the vocabulary.
    """
    rows = [row.tolist() if isinstance(row, Tensor) else list(row) for row in prompts]
    if not rows:
        raise UserError("there is no prompt to continue: give at least one")
    for number, row in enumerate(rows, 1):
        if not row:
            raise UserError(f"prompt {number} is empty: give it at least one token, such as a newline")
        if not 0 <= min(row) <= max(row) < vocab_size:
            raise UserError(
                f"prompt {number} has an id outside 0 … {vocab_size - 1}, the vocabulary of the model: "
                "encode it with the tokenizer that the model was trained with"
            )
    return rows


def check_counts(max_new_tokens: int, num_samples: int) -> None:
    """Raise `UserError` unless both numbers are 1 or more."""
    require(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "1 or more")
    require(num_samples >= 1, "num_samples", num_samples, "1 or more")
