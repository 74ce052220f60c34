"""`generate` gives the ids of the naive reference, whatever the device, the batch and the length."""

import gc
import math
import random
import resource
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice

import pytest
import torch
from conftest import DIALECTS, random_gpt
from torch import Tensor

import gptlit
from gptlit.cli.predict.command import make_parser
from gptlit.errors import UserError
from gptlit.generation import generate as generate_by_default
from gptlit.generation.engine.cpu_step import CpuStep
from gptlit.generation.engine.decoder import Decoder
from gptlit.generation.generate import (
    Sampling,
    distribution,
    draw,
    generate_naive,
    next_token_probabilities,
    uniform_numbers,
)
from gptlit.generation.text import GenerationConfig
from gptlit.model.config import GPTConfig
from gptlit.model.gpt import GPT
from gptlit.model.kv_cache import KVCache

RAGGED = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10]]
generate = partial(generate_by_default, context="exact")  # which is what the naive reference does


def table(steps: Iterable[Tensor]) -> list[list[int]]:
    """Return the ids of every row."""
    return torch.stack(list(steps), 1).tolist()


@pytest.fixture(scope="module")
def nanogpt() -> GPT:
    return random_gpt(GPTConfig(**DIALECTS["nanogpt"]))


# ---------------------------------------------------------------- equal to the naive reference


@pytest.mark.parametrize(
    "prompts", [[[1, 2, 3], [4, 5, 6]], RAGGED, [[7] * 40, [8, 9]]], ids=["even", "ragged", "long"]
)
def test_the_cache_gives_the_ids_of_the_naive_reference(dialect: GPTConfig, prompts: list[list[int]]) -> None:
    """Within block_size, when a row first fills it, and far beyond. A stale or misplaced key would change the ids."""
    model = random_gpt(dialect)
    new = 3 * dialect.block_size
    fast = table(generate(model, prompts, new, num_samples=2, seed=5))
    assert fast == table(generate_naive(model, prompts, new, num_samples=2, seed=5))
    assert len({tuple(row) for row in fast}) > 1  # not one id repeated, which would hide any error


def test_the_torch_step_gives_the_ids_of_the_numpy_step(dialect: GPTConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half precision and large models take the torch step, which the other tests would not reach."""
    model = random_gpt(dialect)
    expected = table(generate(model, [[1, 2, 3], [4, 5, 6]], 3 * dialect.block_size, num_samples=2, seed=5))
    monkeypatch.setattr(CpuStep, "__call__", None)
    monkeypatch.setattr(CpuStep, "serves", lambda decoder, rows: False)
    assert expected == table(generate(model, [[1, 2, 3], [4, 5, 6]], 3 * dialect.block_size, num_samples=2, seed=5))


@pytest.mark.parametrize("new", [1, 12, 13, 14])
def test_the_last_ids_before_and_after_the_window_is_full_are_the_naive_ones(nanogpt: GPT, new: int) -> None:
    """A prompt of 4 and 13 new ids need 16 cached positions, all of block_size; one more needs the window again."""
    prompt = [[1, 2, 3, 4]]
    assert table(generate(nanogpt, prompt, new)) == table(generate_naive(nanogpt, prompt, new))


def rolling_reference(model: GPT, prompt: list[int], new: int, seed: int, sample: int) -> list[int]:
    """`context="rolling"` without a cache: the context grows to block_size, then starts again at half of it."""
    block, text = model.config.block_size, list(prompt)
    context = min(len(text), block)
    uniforms = uniform_numbers(seed, [sample], torch.device("cpu"))
    for _ in range(new):
        logits = model(torch.tensor([text[-context:]]))[:, -1]
        text.append(int(draw(distribution(logits, Sampling()), next(uniforms))))
        context = context + 1 if context < block else max(block // 2, 1)
    return text[-new:]


@torch.no_grad()
def test_rolling_reads_the_newest_half_again_whenever_a_row_is_full(dialect: GPTConfig) -> None:
    """Prompts of different lengths fill their rows at different times."""
    model = random_gpt(dialect)
    new = 3 * dialect.block_size
    expected = [rolling_reference(model, prompt, new, 7, sample) for prompt in RAGGED for sample in range(2)]
    assert table(generate(model, RAGGED, new, num_samples=2, seed=7, context="rolling")) == expected


def test_the_default_context_is_rolling_for_generate_and_predict(nanogpt: GPT) -> None:
    """One default, or the same seed would give two texts."""
    by_default = table(generate_by_default(nanogpt, [[1]], 60))
    assert by_default == table(generate(nanogpt, [[1]], 60, context="rolling")) != table(generate(nanogpt, [[1]], 60))
    assert GenerationConfig().context == make_parser().get_defaults().context == "rolling"


@pytest.mark.parametrize("context", ["exact", "rolling"])
@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_the_smallest_windows_work(block_size: int, context: str) -> None:
    model = random_gpt(GPTConfig(**{**DIALECTS["nanogpt"], "block_size": block_size}))
    ids = table(generate(model, [[1, 2], [3]], 9, context=context))
    assert [len(row) for row in ids] == [9, 9]
    if context == "exact":
        assert ids == table(generate_naive(model, [[1, 2], [3]], 9))


def test_a_prompt_is_read_once_for_all_its_samples(nanogpt: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading it for every sample, or again for every id, is what makes sampling slow."""
    shapes = []
    call, step = Decoder.__call__, CpuStep.__call__

    def spy_call(self: Decoder, ids: Tensor, *args: Tensor, **kwargs: KVCache) -> Tensor:
        shapes.append(tuple(ids.shape))
        return call(self, ids, *args, **kwargs)

    def spy_step(self: CpuStep, ids: Tensor, cache: KVCache) -> Tensor:
        shapes.append(tuple(ids.shape))
        return step(self, ids, cache)

    monkeypatch.setattr(Decoder, "__call__", spy_call)
    monkeypatch.setattr(CpuStep, "__call__", spy_step)
    list(generate(nanogpt, [[1, 2, 3, 4, 5]], 4, num_samples=6))
    assert shapes == [(1, 5), (6,), (6,), (6,)]


def test_the_end_of_a_prompt_longer_than_block_size_is_read(nanogpt: GPT) -> None:
    long = list(range(40))
    assert table(generate(nanogpt, [long], 20)) == table(generate(nanogpt, [long[-16:]], 20))


def test_prompts_may_be_a_tensor(nanogpt: GPT) -> None:
    ids = torch.tensor([[1, 2], [3, 4]])
    assert table(generate(nanogpt, ids, 5)) == table(generate(nanogpt, [[1, 2], torch.tensor([3, 4])], 5))


def test_new_weights_are_used_by_the_next_call(nanogpt: GPT) -> None:
    """The decoder copies weights: a copy kept between calls would show a training run its initial weights forever."""
    model = random_gpt(nanogpt.config, seed=1)
    before = table(generate(model, [[1]], 10))
    model.load_state_dict(random_gpt(nanogpt.config, seed=2).state_dict())
    after = table(generate(model, [[1]], 10))
    assert after != before
    assert after == table(generate_naive(model, [[1]], 10))


# ---------------------------------------------------------------- next-token probabilities


def test_next_token_probabilities_are_the_softmax_of_the_models_logits(dialect: GPTConfig) -> None:
    model = random_gpt(dialect)
    expected = [model(torch.tensor([prompt[-dialect.block_size :]]))[0, -1].softmax(-1) for prompt in RAGGED]
    p = gptlit.next_token_probabilities(model, RAGGED)
    torch.testing.assert_close(p, torch.stack(expected).detach())
    assert not p.requires_grad
    assert not p.is_inference()


def test_next_token_probabilities_are_those_that_generate_samples_from(nanogpt: GPT) -> None:
    sampling = Sampling(temperature=0.7, top_k=5, top_p=0.9)
    p = next_token_probabilities(nanogpt, [[1, 2, 3]], sampling)
    ids = [row[0] for row in table(generate(nanogpt, [[1, 2, 3]], 1, sampling, num_samples=2000))]
    counts = torch.bincount(torch.tensor(ids), minlength=65) / 2000
    assert int((p > 0).sum()) <= 5
    assert float((counts - p[0]).abs().max()) < 0.05  # 4 standard errors
    assert bool((counts[p[0] == 0] == 0).all())


def test_next_token_probabilities_ignore_dropout(nanogpt: GPT) -> None:
    dropping = random_gpt(GPTConfig(**DIALECTS["nanogpt"], dropout=0.5)).train()
    assert torch.equal(next_token_probabilities(dropping, [[1, 2]]), next_token_probabilities(nanogpt, [[1, 2]]))


@pytest.mark.parametrize(("prompts", "message"), [([[]], "prompt 1 is empty"), ([[65]], "outside 0 … 64")])
def test_next_token_probabilities_refuse_wrong_ids(nanogpt: GPT, prompts: list[list[int]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        next_token_probabilities(nanogpt, prompts)


# ---------------------------------------------------------------- seeds, and global state


def test_a_sample_depends_only_on_the_seed_and_its_number(nanogpt: GPT) -> None:
    """Neither the number of samples nor the other prompts change a sample of a seed."""
    for context in ("exact", "rolling"):
        many = table(generate(nanogpt, [[1, 2], [9], [3, 4, 5]], 40, num_samples=5, seed=3, context=context))
        alone = table(generate(nanogpt, [[9]], 40, num_samples=2, seed=3, context=context))
        assert many[5:7] == alone


def test_seeds_and_samples_differ_and_repeat(nanogpt: GPT) -> None:
    one = table(generate(nanogpt, [[1]], 30, num_samples=3, seed=1))
    assert one == table(generate(nanogpt, [[1]], 30, num_samples=3, seed=1))
    other = table(generate(nanogpt, [[1]], 30, num_samples=3, seed=2))
    assert len({tuple(row) for row in one + other}) == 6


def test_the_random_streams_of_neighbouring_seeds_are_different() -> None:
    """Seeding with seed + sample would make sample 1 of seed 0 the same text as sample 0 of seed 1."""
    numbers = [tuple(next(uniform_numbers(seed, range(8), torch.device("cpu"))).tolist()) for seed in range(8)]
    assert len({number for row in numbers for number in row}) == 64
    ahead = list(islice(uniform_numbers(0, [2, 5], torch.device("cpu")), 600))
    alone = list(islice(uniform_numbers(0, [2], torch.device("cpu")), 600))
    assert torch.equal(torch.stack(ahead)[:, 0], torch.cat(alone))


def test_sampling_leaves_every_global_random_state_unchanged(nanogpt: GPT) -> None:
    """A sample during training would otherwise change the training."""
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    list(generate(nanogpt, [[1]], 20, num_samples=2, sampling=Sampling(top_k=5, top_p=0.9)))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state


@pytest.mark.parametrize("rows", [1, 3])
def test_sampling_leaves_the_weights_unchanged(dialect: GPTConfig, rows: int) -> None:
    """Sampling folds norms into copies of the weights: done in place, training would continue from those."""
    model = random_gpt(dialect)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    list(generate(model, [[1, 2]], 3 * dialect.block_size, num_samples=rows))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_model_in_training_mode_samples_without_dropout_and_stays_in_training_mode(nanogpt: GPT) -> None:
    dropping = {"dropout": 0.5, "attention_dropout": 0.5, "embedding_dropout": 0.5}
    model = random_gpt(GPTConfig(**DIALECTS["nanogpt"], **dropping)).train()
    model.transformer["h"][0].eval()  # part of it frozen
    flags = [module.training for module in model.modules()]
    expected = table(generate(nanogpt, [[1]], 40))
    assert table(generate(model, [[1]], 40)) == expected
    assert table(generate_naive(model, [[1]], 40)) == expected
    assert [module.training for module in model.modules()] == flags


def test_the_caller_is_not_in_inference_mode_between_two_ids(nanogpt: GPT) -> None:
    """A context manager around a `yield` would leak its mode into the caller, where gradients would vanish."""
    for _ in generate(nanogpt, [[1]], 3):
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", ["nanogpt", "modern"])
def test_autocast_around_generate_changes_nothing(name: str) -> None:
    """A Trainer in mixed precision samples under autocast; a float32 cache cannot hold bfloat16 keys."""
    model = random_gpt(GPTConfig(**DIALECTS[name])).float()
    expected = table(generate(model, RAGGED, 40, context="rolling"))
    with torch.autocast("cpu", torch.bfloat16):
        assert table(generate(model, RAGGED, 40, context="rolling")) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_can_be_sampled(nanogpt: GPT, dtype: torch.dtype) -> None:
    model = random_gpt(nanogpt.config).to(dtype)
    assert [len(row) for row in table(generate(model, RAGGED, 40))] == [40] * 3


def test_an_id_is_yielded_before_the_next_one_is_computed(nanogpt: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = generate(nanogpt, [[1]], 100)
    next(stream)

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("computed ahead")

    monkeypatch.setattr(CpuStep, "__call__", fail)
    with pytest.raises(AssertionError, match="computed ahead"):
        next(stream)


def test_deterministic_algorithms_give_the_same_ids(nanogpt: GPT) -> None:
    """A GPU refuses the cumulative sum of fractions there; sums of integers must pick the same tokens."""
    sampling = Sampling(top_p=0.95)
    before = torch.stack(list(generate(nanogpt, [[1, 2, 3]], 40, sampling, num_samples=8)))
    torch.use_deterministic_algorithms(True)
    again = torch.stack(list(generate(nanogpt, [[1, 2, 3]], 40, sampling, num_samples=8)))
    assert again.tolist() == before.tolist()


def test_temperature_zero_takes_the_most_probable_token_whatever_the_seed(nanogpt: GPT) -> None:
    greedy = Sampling(temperature=0)
    texts = [table(generate(nanogpt, [[1, 2]], 30, greedy, seed=seed)) for seed in (0, 1)]
    text = [1, 2]
    with torch.no_grad():
        for _ in range(30):
            text.append(int(nanogpt(torch.tensor([text[-16:]]))[0, -1].argmax()))
    assert texts == [[text[2:]], [text[2:]]]


def test_log_probabilities_are_the_models_own(nanogpt: GPT) -> None:
    """At temperature 1 and without filters, whatever the sampling: minus their mean is the loss of the text."""
    scores: list[Tensor] = []
    prompt, filtered = [1, 2, 3], Sampling(temperature=0.5, top_k=5)
    texts = table(generate(nanogpt, [prompt], 12, filtered, num_samples=2, log_probabilities=scores))
    for row, ids in enumerate(texts):
        with torch.no_grad():
            logits = nanogpt(torch.tensor([prompt + ids[:-1]]))[0, len(prompt) - 1 :]  # (12, V)
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(ids))
        assert float(-torch.stack(scores, 1)[row].mean()) == pytest.approx(float(loss))


# ---------------------------------------------------------------- user errors


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "no prompt"),
        ([[1], []], {}, "prompt 2 is empty"),
        ([[1, 65]], {}, "outside 0 … 64"),
        ([[-1]], {}, "outside 0 … 64"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0: it must be 1 or more"),
        ([[1]], {"num_samples": 0}, "num_samples is 0: it must be 1 or more"),
        ([[1]], {"context": "window"}, "context is window"),
    ],
)
def test_an_error_is_raised_at_the_call_and_not_at_the_first_id(
    nanogpt: GPT, prompts: list[list[int]], options: dict[str, object], message: str
) -> None:
    """Ids outside the vocabulary would read past the table; a generator would raise only when it is read."""
    with pytest.raises(UserError, match=message):
        generate(nanogpt, prompts, **{"max_new_tokens": 5, **options})


def test_a_model_that_diverged_is_reported_as_such(nanogpt: GPT) -> None:
    """NaN logits would otherwise pick ids past the vocabulary, and fail elsewhere."""
    model = random_gpt(nanogpt.config)
    with torch.no_grad():
        model.transformer["wte"].weight.fill_(math.nan)
    with pytest.raises(UserError, match="diverged"):
        next(generate(model, [[1]], 5))
    with pytest.raises(UserError, match="diverged"):
        next_token_probabilities(model, [[1]])


# ---------------------------------------------------------------- memory


def live_tensors() -> int:
    gc.collect()
    return sum(isinstance(thing, Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize("context", ["exact", "rolling"])
def test_a_long_text_keeps_no_more_than_its_window(nanogpt: GPT, context: str) -> None:
    """Whatever grows with the text (a list of ids, a cache of all positions) would exhaust memory in the end."""
    stream: Iterator[Tensor] = generate(nanogpt, [[1]], 10_000, context=context)
    counts = []
    for _ in range(3):
        list(islice(stream, 9 * 32))  # a row rolls at every ninth id
        counts.append(live_tensors())
    assert counts[1] == counts[2]


@pytest.mark.slow
@pytest.mark.parametrize("context", ["exact", "rolling"])
def test_memory_is_flat_over_a_hundred_thousand_characters(context: str) -> None:
    model = random_gpt(GPTConfig(**DIALECTS["nanogpt"])).float()
    stream = generate(model, [[1]], 100_000, context=context)
    for _ in islice(stream, 2_000):
        pass
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert sum(1 for _ in stream) == 98_000
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB, on Linux
    assert grown < 2_048
