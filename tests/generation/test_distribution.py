"""Temperature and filters are what their formulas say, and ids are sampled in proportion to probability."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptlit.errors import UserError
from gptlit.generation.generate import Sampling, distribution, draw, running_sums

LOGITS = st.lists(st.lists(st.floats(-30, 30), min_size=7, max_size=7), min_size=1, max_size=3)
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.1, 0.7, 1.0, 3.0]),
    top_k=st.none() | st.integers(1, 9),
    top_p=st.none() | st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    min_p=st.none() | st.sampled_from([0.0, 0.05, 0.3, 1.0]),
)


def probabilities_by_hand(logits: list[float], sampling: Sampling) -> list[float]:
    """One row, filter after filter, in plain Python."""
    weights = [math.exp((logit - max(logits)) / sampling.temperature) for logit in logits]
    if sampling.top_k is not None:
        last_kept = sorted(logits, reverse=True)[: sampling.top_k][-1]
        weights = [weight if logit >= last_kept else 0.0 for weight, logit in zip(weights, logits, strict=True)]
    p = [weight / sum(weights) for weight in weights]
    if sampling.top_p is not None and sampling.top_p < 1:
        kept, mass = set(), 0.0
        for token in sorted(range(len(p)), key=lambda token: -p[token]):
            if mass >= sampling.top_p:
                break
            kept.add(token)
            mass += p[token]
        p = [q if token in kept else 0.0 for token, q in enumerate(p)]
    if sampling.min_p is not None:
        p = [q if q >= sampling.min_p * max(p) else 0.0 for q in p]
    return [q / sum(p) for q in p]


@given(logits=LOGITS, sampling=SAMPLINGS)
@settings(deadline=None)
def test_the_filters_equal_their_definitions(logits: list[list[float]], sampling: Sampling) -> None:
    got = distribution(torch.tensor(logits, dtype=torch.float64), sampling)
    want = torch.tensor([probabilities_by_hand(row, sampling) for row in logits], dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got.sum(1), torch.ones(len(logits), dtype=torch.float64))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 1.4, "top_k": 30, "top_p": 0.9, "min_p": 0.05},
    ],
)
def test_the_filters_equal_those_of_transformers(options: dict[str, float]) -> None:
    """The same names must give the same distribution."""
    transformers = pytest.importorskip("transformers")
    warpers = {
        "temperature": transformers.TemperatureLogitsWarper,
        "top_k": transformers.TopKLogitsWarper,
        "top_p": transformers.TopPLogitsWarper,
        "min_p": transformers.MinPLogitsWarper,
    }
    logits = torch.randn(4, 65, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    scores = logits
    for name, value in options.items():
        scores = warpers[name](value)(torch.zeros(4, 1, dtype=torch.long), scores)
    torch.testing.assert_close(distribution(logits, Sampling(**options)), scores.softmax(1))


def test_the_logits_are_not_changed() -> None:
    logits = torch.randn(2, 9, dtype=torch.float64)
    before = logits.clone()
    distribution(logits, Sampling(temperature=0.5, top_k=3, top_p=0.5, min_p=0.1))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("temperature", [1e-300, 1e-9, 1e9])
def test_extreme_temperatures_do_not_overflow(temperature: float) -> None:
    p = distribution(torch.tensor([[90.0, -90.0, 89.0]]), Sampling(temperature=temperature))
    assert bool(p.isfinite().all())
    assert float(p.sum()) == pytest.approx(1)


@given(weights=st.lists(st.sampled_from([0.0, 1e-12, 0.1, 1.0, 3.0]), min_size=1, max_size=8).filter(any))
@settings(deadline=None)
def test_evenly_spaced_numbers_pick_each_token_as_often_as_it_is_probable(weights: list[float]) -> None:
    """And the ends, 0 and just below 1, pick the first and the last possible token."""
    p = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    n = 500
    even = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    picked = draw(p.expand(n, -1), even)
    assert bool((picked.diff() >= 0).all())
    counts = torch.bincount(picked, minlength=len(weights)).double()
    assert float((counts / n - p).abs().max()) <= 1.0 / n
    ends = draw(p.expand(2, -1), torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
    possible = p.nonzero().flatten()
    assert ends.tolist() == [int(possible[0]), int(possible[-1])]


def test_deterministic_sums_are_exact_and_skip_impossible_tokens() -> None:
    torch.use_deterministic_algorithms(True)
    sums = running_sums(torch.tensor([[0.5, 0.0, 0.3, 0.2]], dtype=torch.float64))
    torch.testing.assert_close(sums, torch.tensor([[0.5, 0.5, 0.8, 1.0]], dtype=torch.float64), rtol=0, atol=1e-15)
    assert sums[0, 0] == sums[0, 1]  # otherwise the token of probability 0 could be picked


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"min_p": 2.0}, "min_p is 2.0"),
    ],
)
def test_a_value_out_of_range_names_its_field(options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}") as caught:
        Sampling(**options)
    assert caught.value.setting == next(iter(options))
