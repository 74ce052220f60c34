"""The fast way to draw text gives the very text of the naive way; and every control does what its formula says."""

import gc
import math
import random
import resource
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import islice
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import DIALECTS, random_gpt
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gptlit.errors import UserError
from gptlit.generation.engine.affine import Affine
from gptlit.generation.engine.cpu_step import UNSHARED, CpuStep, TokenProgram, unshared_pieces
from gptlit.generation.engine.decoder import Decoder
from gptlit.generation.engine.folding import fold
from gptlit.generation.generate import (
    Sampling,
    draw,
    generate,
    generate_naive,
    next_token_probabilities,
    running_sums,
    uniform_numbers,
)
from gptlit.generation.text import TextStream
from gptlit.model.config import GPTConfig
from gptlit.model.gpt import GPT
from gptlit.model.kv_cache import KVCache
from gptlit.tokenizer import BPETokenizer, CharTokenizer

RAGGED = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10]]


def table(steps: Iterable[Tensor]) -> list[list[int]]:
    """The ids of every row."""
    return torch.stack(list(steps), 1).tolist()


@pytest.fixture(scope="module")
def nanogpt() -> GPT:
    return random_gpt(GPTConfig(**DIALECTS["nanogpt"]))


# ---------------------------------------------------------------- the same text as the naive way


@pytest.mark.parametrize(
    "prompts", [[[1, 2, 3], [4, 5, 6]], RAGGED, [[7] * 40, [8, 9]]], ids=["even", "ragged", "long"]
)
def test_the_cache_gives_the_text_of_the_naive_way(dialect: GPTConfig, prompts: list[list[int]]) -> None:
    """Inside block_size, when a row first fills it, and far beyond. A stale or misplaced key would change the text."""
    model = random_gpt(dialect)
    new = 3 * dialect.block_size
    fast = table(generate(model, prompts, new, num_samples=2, seed=5))
    assert fast == table(generate_naive(model, prompts, new, num_samples=2, seed=5))
    assert len({tuple(row) for row in fast}) > 1  # not one symbol over and over, which any mistake would pass


def test_where_numpy_cannot_read_the_weights_torch_gives_the_same_text(
    dialect: GPTConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, and in half precision, every token goes through the other step: it must not be forgotten."""
    model = random_gpt(dialect)
    expected = table(generate(model, [[1, 2, 3], [4, 5, 6]], 3 * dialect.block_size, num_samples=2, seed=5))
    monkeypatch.setattr(CpuStep, "__call__", None)
    monkeypatch.setattr(CpuStep, "serves", lambda decoder: False)
    assert expected == table(generate(model, [[1, 2, 3], [4, 5, 6]], 3 * dialect.block_size, num_samples=2, seed=5))


@pytest.mark.parametrize(
    ("dtype", "served"), [(torch.float32, True), (torch.float64, True), (torch.bfloat16, False), (torch.float16, False)]
)
def test_numpy_is_only_asked_for_what_it_computes(nanogpt: GPT, dtype: torch.dtype, served: bool) -> None:
    """It has no bfloat16, and its float16 is a hundred times as slow."""
    assert CpuStep.serves(Decoder(random_gpt(nanogpt.config).to(dtype))) is served
    assert not CpuStep.serves(Decoder(GPT(nanogpt.config).to("meta")))


@pytest.mark.parametrize("new", [1, 12, 13, 14])
def test_the_last_ids_before_and_after_the_window_is_full_are_the_naive_ones(nanogpt: GPT, new: int) -> None:
    """A prompt of 4 and 13 new ids need 16 cached positions, all of block_size; one more needs a recomputation."""
    prompt = [[1, 2, 3, 4]]
    assert table(generate(nanogpt, prompt, new)) == table(generate_naive(nanogpt, prompt, new))


def rolling_reference(model: GPT, prompt: list[int], new: int, seed: int, sample: int) -> list[int]:
    """`context="rolling"` without a cache: the context grows to block_size, then starts anew at half of it."""
    block, text = model.config.block_size, list(prompt)
    context = min(len(text), block)
    uniforms = uniform_numbers(seed, [sample], torch.device("cpu"))
    for _ in range(new):
        logits = model(torch.tensor([text[-context:]]))[:, -1]
        text.append(int(draw(next_token_probabilities(logits, Sampling()), next(uniforms))))
        context = context + 1 if context < block else max(block // 2, 1)
    return text[-new:]


@torch.no_grad()
def test_rolling_reads_the_newest_half_anew_whenever_a_row_is_full(dialect: GPTConfig) -> None:
    """Each row at its own time: with prompts of different lengths they are never full together."""
    model = random_gpt(dialect)
    new = 3 * dialect.block_size
    expected = [rolling_reference(model, prompt, new, 7, sample) for prompt in RAGGED for sample in range(2)]
    assert table(generate(model, RAGGED, new, num_samples=2, seed=7, context="rolling")) == expected


@pytest.mark.parametrize("context", ["exact", "rolling"])
@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_the_smallest_windows_work(block_size: int, context: str) -> None:
    model = random_gpt(GPTConfig(**{**DIALECTS["nanogpt"], "block_size": block_size}))
    drawn = table(generate(model, [[1, 2], [3]], 9, context=context))
    assert [len(row) for row in drawn] == [9, 9]
    if context == "exact":
        assert drawn == table(generate_naive(model, [[1, 2], [3]], 9))


@pytest.mark.parametrize("rows", [0, 3])
def test_the_decoder_is_the_model_position_by_position(dialect: GPTConfig, rows: int) -> None:
    """Its own forward passes (other layout, other order) must give the model's logits and leave the model's cache."""
    model = random_gpt(dialect)
    decoder, T = Decoder(model, rows), dialect.block_size
    ids = torch.randint(65, (3, T), generator=torch.Generator().manual_seed(1))
    steps = [lambda ids, cache: decoder(ids[:, None], cache=cache), decoder.step, CpuStep(decoder, 3)]
    of_the_model = KVCache(dialect, 3, dtype=torch.float64)
    with torch.no_grad():
        expected = model(ids)
        model(ids, of_the_model)
        for step in steps:
            cache = decoder.new_cache(3, T)
            torch.testing.assert_close(decoder(ids[:, :3], cache=cache), expected[:, 2])
            for t in range(3, T):
                torch.testing.assert_close(step(ids[:, t], cache), expected[:, t])
            assert cache.length == T
            torch.testing.assert_close(cache.keys, of_the_model.keys)
            torch.testing.assert_close(cache.values, of_the_model.values)


CONFIGS = st.builds(
    GPTConfig,
    vocab_size=st.just(11),
    block_size=st.integers(2, 6),
    n_layer=st.integers(0, 3),
    n_head=st.sampled_from([1, 2]),
    n_embd=st.sampled_from([4, 8]),
    bias=st.booleans(),
    qkv_bias=st.booleans(),
    position=st.sampled_from(["none", "learned", "rope"]),
    norm=st.sampled_from(["none", "layernorm", "rmsnorm"]),
    residual=st.booleans(),
    mlp_ratio=st.sampled_from([0, 1, 4]),
    activation=st.sampled_from(["relu", "gelu", "gelu_tanh", "relu2"]),
    qk_norm=st.booleans(),
    tie_weights=st.booleans(),
    logit_softcap=st.none() | st.just(3.0),
)


@given(
    config=CONFIGS,
    shift=st.integers(0, 3),
    rows=st.sampled_from([1, 2, 5]),
    laid_out=st.sampled_from([0, 1, 6]),
    limits=st.fixed_dictionaries(
        {
            "decode.ERF_PAYS_BELOW": st.sampled_from([0, 4096]),
            "folding.ERF_PAYS_BELOW": st.sampled_from([0, 4096]),
            "lean.UNSHARED": st.sampled_from([8, 32, 8192]),
            "lean.FEW_ROWS": st.sampled_from([0, 4]),
            "lean.FEW_HEADS": st.sampled_from([0, 32]),
        }
    ),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=300)
def test_the_decoder_knows_every_switch_of_the_model(
    config: GPTConfig, shift: int, rows: int, laid_out: int, limits: dict[str, int], seed: int
) -> None:
    """Combinations that no dialect has, such as GELU without residual connections, and every way to compute them.

    Two texts in turn by the same step, which must not look into the other's cache; and each of them twice. Without
    residual connections a norm may have to enlarge next to nothing, and with it what was rounded.
    """
    check = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    config = replace(config, token_shift=shift if config.mlp_ratio else 0)
    model = random_gpt(config, seed)
    decoder, T = Decoder(model, laid_out * rows), config.block_size
    texts = torch.randint(11, (2, rows, T), generator=torch.Generator().manual_seed(seed))
    lengths = torch.tensor([T, *[T - 1] * (rows - 1)])
    with torch.no_grad(), ExitStack() as patches:
        for name, value in limits.items():
            patches.enter_context(mock.patch(f"gptlit.{name}", value))
        expected = [model(ids) for ids in texts]
        check(decoder(texts[0], lengths), expected[0][torch.arange(rows), lengths - 1])
        for step in (decoder.step, CpuStep(decoder, rows)):
            caches = [decoder.new_cache(rows, T) for _ in texts]
            for _ in range(2):
                for cache, ids, logits in zip(caches, texts, expected, strict=True):
                    cache.clear()
                    check(decoder(ids[:, :1], cache=cache), logits[:, 0])
                for t in range(1, T):
                    for cache, ids, logits in zip(caches, texts, expected, strict=True):
                        check(step(ids[:, t], cache), logits[:, t])


@pytest.mark.parametrize("rows", [1, 2, 40])
def test_the_decoder_is_the_model_with_packed_weights_too(
    dialect: GPTConfig, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float64 cannot be packed: what every other test here compares never comes near oneDNN's product."""
    monkeypatch.setattr("gptlit.generation.engine.affine.LARGE", 1)
    model = random_gpt(dialect).float()
    decoder, T = Decoder(model, rows), dialect.block_size
    if torch.backends.mkldnn.is_available():
        assert decoder.lm_head.packed is not None
    ids = torch.randint(65, (rows, T), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids)
        torch.testing.assert_close(decoder(ids), expected[:, -1], rtol=1e-4, atol=1e-4)
        for step in (decoder.step, CpuStep(decoder, rows)):
            cache = decoder.new_cache(rows, T)
            decoder(ids[:, :3], cache=cache)
            for t in range(3, T):
                torch.testing.assert_close(step(ids[:, t], cache), expected[:, t], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 3])
def test_drawing_text_leaves_the_model_as_it_was(dialect: GPTConfig, rows: int) -> None:
    """Sampling lays weights out anew, and folds norms into them: done in place, the training would go on from those."""
    model = random_gpt(dialect)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    list(generate(model, [[1, 2]], 3 * dialect.block_size, num_samples=rows))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_folded_layer_norm_has_no_mean_left_to_take_off() -> None:
    """All that adds to the residual stream must be centred: with one product forgotten, x / √(mean of x²) is another
    norm, and the text another text.
    """
    config = GPTConfig(**{**DIALECTS["nanogpt"], "bias": True})
    decoder = Decoder(random_gpt(config))
    folded = fold(decoder, 1)
    assert folded.eps == decoder.last_norm.eps  # type: ignore[attr-defined]
    assert (folded.scaled, folded.halved) == (True, True)
    adding = [folded.tokens, folded.places]
    adding += [part for layer in folded.layers for product in (layer.proj, layer.out) for part in product_of(product)]
    for part in adding:
        torch.testing.assert_close(part.mean(-1), torch.zeros_like(part[..., 0]), rtol=0, atol=1e-12)


def product_of(affine: Affine | None) -> list[Tensor]:
    assert affine is not None
    assert affine.bias is not None
    return [affine.weight, affine.bias]


@pytest.mark.parametrize(
    ("changes", "eps", "scaled", "halved"),
    [
        ({"norm": "rmsnorm"}, 1e-6, True, True),  # its gain is 1: nothing to fold
        ({"norm": "none"}, None, True, True),
        ({"token_shift": 1}, None, True, True),  # the zeros before a text are not what a norm makes of anything
        ({"qk_norm": True}, 1e-5, False, True),  # a norm takes a factor of its input out again
        ({"activation": "relu2"}, 1e-5, True, False),
    ],
)
def test_what_cannot_be_folded_is_left_alone(
    changes: dict[str, object], eps: float | None, scaled: bool, halved: bool
) -> None:
    folded = fold(Decoder(random_gpt(GPTConfig(**{**DIALECTS["nanogpt"], **changes}))), 1)
    assert (folded.eps, folded.scaled, folded.halved) == (eps, scaled, halved)


def test_large_weights_are_not_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copied for a few small operations, GPT-2's would take half a gigabyte more and a second."""
    monkeypatch.setattr("gptlit.generation.engine.affine.LARGE", 1)
    decoder = Decoder(random_gpt(GPTConfig(**DIALECTS["nanogpt"])), rows=1)
    folded = fold(decoder, 1)
    assert folded.layers is decoder.layers
    assert folded.lm_head is decoder.lm_head
    assert (folded.eps, folded.scaled, folded.halved) == (None, False, False)


def test_only_what_is_folded_is_copied() -> None:
    """A modern dialect has nothing to fold: its weights are read where they are."""
    for changes in ({}, {"norm": "none", "qk_norm": False}):
        decoder = Decoder(random_gpt(GPTConfig(**{**DIALECTS["modern"], **changes})))
        for kept, layer in zip(decoder.layers, fold(decoder, 1).layers, strict=True):
            assert all(getattr(layer, name) is getattr(kept, name) for name in ("proj", "fc", "out"))
            assert (layer.qkv is kept.qkv) is not bool(changes)


def test_weights_are_packed_where_that_pays_and_only_there() -> None:
    """A small product is done before oneDNN has begun; large weights read by MKL take more than twice the time."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    small, large = torch.nn.Linear(128, 128, bias=False), torch.nn.Linear(384, 384)
    assert Affine.of(small, 1).packed is None
    assert Affine.of(small, 128).packed_for(128) is not None
    assert Affine.of(small, 128).packed_for(1) is None
    assert Affine.of(large, 1).packed_for(1) is not None
    assert Affine.of(large, 0).packed is None
    assert Affine.of(large.double(), 1).packed is None


@pytest.mark.parametrize(("prompts", "written"), [([[1, 2]], 1), ([[1, 2], [3]], 0)])
def test_the_operations_of_a_token_are_written_down_once_and_only_if_needed(
    nanogpt: GPT, prompts: list[list[int]], written: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That takes the time of some ten tokens; rows of different lengths go another way, and have no use for it."""
    init, count = TokenProgram.__init__, []

    def spy(self: TokenProgram, decoder: Decoder, rows: int) -> None:
        count.append(rows)
        init(self, decoder, rows)

    monkeypatch.setattr(TokenProgram, "__init__", spy)
    list(generate(nanogpt, prompts, 12))
    assert len(count) == written


def test_a_cache_that_was_cleared_is_an_empty_one(nanogpt: GPT) -> None:
    """Also when its rows had different lengths: kept, they would mask what is read next."""
    decoder = Decoder(nanogpt)
    cache = decoder.new_cache(2, 8)
    decoder(torch.tensor([[1, 2], [3, 0]]), torch.tensor([2, 1]), cache=cache)
    assert cache.row_lengths is not None
    cache.clear()
    assert (cache.length, cache.row_lengths) == (0, None)


@pytest.mark.parametrize("large", [1, 2**17])
@pytest.mark.parametrize("rows", [1, 5])
def test_the_memory_of_a_text_goes_with_it(
    dialect: GPTConfig, rows: int, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operations of a token are kept in a list. If one knew of the object that keeps it, the weights laid out for
    each text would stay until the garbage collector comes by: 43 MB a text at the size of `scaled`.
    """
    monkeypatch.setattr("gptlit.generation.engine.affine.LARGE", large)
    decoder = Decoder(random_gpt(dialect).float(), rows)
    gc.collect()
    gc.disable()
    try:
        step = CpuStep(decoder, rows)
        cache = decoder.new_cache(rows, 3)
        decoder(torch.zeros(rows, 1, dtype=torch.long), cache=cache)
        step(torch.zeros(rows, dtype=torch.long), cache)
        gone = weakref.ref(step.program)
        del step
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize("name", ["nanogpt", "modern"])
def test_numpy_is_left_no_product_that_its_threads_would_share(
    name: str, num_samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside torch's, which wait for work on the same cores, they made 10 characters a second of 350.

    The weights are larger than a product may be, and so are the keys of a head from position 128 on.
    """
    model = random_gpt(GPTConfig(**{**DIALECTS[name], "block_size": 160, "n_embd": 128}), std=0.05)
    sizes = []

    def spied(product: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        def spy(a: np.ndarray, b: np.ndarray, **options: np.ndarray) -> np.ndarray:
            matrix = a if product is matvec else b
            sizes.append(math.prod(matrix.shape[-2:]))
            return product(a, b, **options)

        return spy

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("a product that nobody has measured")

    matvec = np.matvec
    monkeypatch.setattr(np, "matvec", spied(np.matvec))
    monkeypatch.setattr(np, "vecmat", spied(np.vecmat))
    for product in ("matmul", "dot", "vdot", "inner", "outer", "tensordot", "einsum"):
        monkeypatch.setattr(np, product, fail)
    list(generate(model, [[1]], 159, num_samples=num_samples))
    assert 0 < max(sizes) <= UNSHARED


@given(rows=st.integers(1, 300), columns=st.integers(1, UNSHARED))
@settings(deadline=None)
def test_pieces_of_a_weight_are_small_and_few_and_lose_nothing(rows: int, columns: int) -> None:
    weight = np.zeros(rows * columns).reshape(rows, columns)
    pieces = unshared_pieces(weight)  # (count, out / count, in)
    fewest = math.ceil(rows * columns / UNSHARED)
    counts = [n for n in range(fewest, fewest + 8) if rows % n == 0 and rows // n * columns <= UNSHARED]
    assert (pieces is None) == (not counts)  # 97 symbols would be 97 products
    if pieces is not None:
        assert pieces.shape == (counts[0], rows // counts[0], columns)
        assert np.shares_memory(pieces, weight)


def test_a_cache_that_holds_tokens_takes_one_at_a_time(nanogpt: GPT) -> None:
    """Several at once would need a mask that the decoder does not make: wrong logits, were they let through."""
    decoder = Decoder(nanogpt)
    cache = decoder.new_cache(1, 8)
    decoder(torch.tensor([[1, 2]]), cache=cache)
    with pytest.raises(ValueError, match="one new token at a time"):
        decoder(torch.tensor([[3, 4]]), cache=cache)
    with pytest.raises(UserError, match="does not fit block_size 16"):
        decoder(torch.zeros(1, 17, dtype=torch.long))


def test_a_prompt_is_read_once_for_all_its_samples(nanogpt: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading it for every sample, or every id anew, is what makes sampling slow."""
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


def test_of_a_prompt_longer_than_block_size_the_end_is_read(nanogpt: GPT) -> None:
    long = list(range(40))
    assert table(generate(nanogpt, [long], 20)) == table(generate(nanogpt, [long[-16:]], 20))


def test_prompts_may_be_a_tensor(nanogpt: GPT) -> None:
    ids = torch.tensor([[1, 2], [3, 4]])
    assert table(generate(nanogpt, ids, 5)) == table(generate(nanogpt, [[1, 2], torch.tensor([3, 4])], 5))


def test_new_weights_are_seen_by_the_next_call(nanogpt: GPT) -> None:
    """The decoder keeps a copy of the weights: a kept copy would show a training run its first weights for ever."""
    model = random_gpt(nanogpt.config, seed=1)
    before = table(generate(model, [[1]], 10))
    model.load_state_dict(random_gpt(nanogpt.config, seed=2).state_dict())
    after = table(generate(model, [[1]], 10))
    assert after != before
    assert after == table(generate_naive(model, [[1]], 10))


# ---------------------------------------------------------------- seeds, and what is left alone


def test_a_sample_is_the_same_whatever_else_is_drawn_with_it(nanogpt: GPT) -> None:
    """Neither the number of samples nor the other prompts move a sample of a seed."""
    for context in ("exact", "rolling"):
        many = table(generate(nanogpt, [[1, 2], [9], [3, 4, 5]], 40, num_samples=5, seed=3, context=context))
        alone = table(generate(nanogpt, [[9]], 40, num_samples=2, seed=3, context=context))
        assert many[5:7] == alone


def test_seeds_and_samples_differ_and_repeat(nanogpt: GPT) -> None:
    one = table(generate(nanogpt, [[1]], 30, num_samples=3, seed=1))
    assert one == table(generate(nanogpt, [[1]], 30, num_samples=3, seed=1))
    other = table(generate(nanogpt, [[1]], 30, num_samples=3, seed=2))
    assert len({tuple(row) for row in one + other}) == 6


def test_the_random_streams_of_neighbouring_seeds_do_not_meet() -> None:
    """Seeding with seed + sample would make sample 1 of seed 0 the same text as sample 0 of seed 1."""
    numbers = [tuple(next(uniform_numbers(seed, range(8), torch.device("cpu"))).tolist()) for seed in range(8)]
    assert len({number for row in numbers for number in row}) == 64
    ahead = list(islice(uniform_numbers(0, [2, 5], torch.device("cpu")), 600))
    assert torch.equal(
        torch.stack(ahead)[:, 0], torch.cat(list(islice(uniform_numbers(0, [2], torch.device("cpu")), 600)))
    )


def test_drawing_leaves_every_global_random_state_alone(nanogpt: GPT) -> None:
    """A sample drawn during training would otherwise change the training."""
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    list(generate(nanogpt, [[1]], 20, num_samples=2, sampling=Sampling(top_k=5, top_p=0.9)))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state


def test_a_model_in_training_samples_without_dropout_and_stays_in_training(nanogpt: GPT) -> None:
    dropping = {"dropout": 0.5, "attention_dropout": 0.5, "embedding_dropout": 0.5}
    model = random_gpt(GPTConfig(**DIALECTS["nanogpt"], **dropping)).train()
    model.transformer["h"][0].eval()  # part of it frozen by its owner
    flags = [module.training for module in model.modules()]
    expected = table(generate(nanogpt, [[1]], 40))
    assert table(generate(model, [[1]], 40)) == expected
    assert table(generate_naive(model, [[1]], 40)) == expected
    assert [module.training for module in model.modules()] == flags


def test_the_caller_is_not_left_in_inference_mode_between_two_ids(nanogpt: GPT) -> None:
    """A context manager around a `yield` would lend its mode to the caller: gradients would silently vanish."""
    for _ in generate(nanogpt, [[1]], 3):
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", ["nanogpt", "modern"])
def test_autocast_around_it_changes_nothing(name: str) -> None:
    """A trainer in mixed precision samples inside of it; a float32 cache does not take bfloat16 keys."""
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


# ---------------------------------------------------------------- what an id is chosen by

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
        for symbol in sorted(range(len(p)), key=lambda symbol: -p[symbol]):
            if mass >= sampling.top_p:
                break
            kept.add(symbol)
            mass += p[symbol]
        p = [q if symbol in kept else 0.0 for symbol, q in enumerate(p)]
    if sampling.min_p is not None:
        p = [q if q >= sampling.min_p * max(p) else 0.0 for q in p]
    return [q / sum(p) for q in p]


@given(logits=LOGITS, sampling=SAMPLINGS)
@settings(deadline=None)
def test_the_filters_are_what_they_say(logits: list[list[float]], sampling: Sampling) -> None:
    got = next_token_probabilities(torch.tensor(logits, dtype=torch.float64), sampling)
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
def test_the_filters_mean_what_they_mean_elsewhere(options: dict[str, float]) -> None:
    """The same words must give the distribution that `transformers` gives them."""
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
    torch.testing.assert_close(next_token_probabilities(logits, Sampling(**options)), scores.softmax(1))


def test_probabilities_do_not_change_the_logits_they_come_from() -> None:
    logits = torch.randn(2, 9, dtype=torch.float64)
    before = logits.clone()
    next_token_probabilities(logits, Sampling(temperature=0.5, top_k=3, top_p=0.5, min_p=0.1))
    assert torch.equal(logits, before)


def test_temperature_zero_takes_the_most_probable_symbol_whatever_the_seed(nanogpt: GPT) -> None:
    greedy = Sampling(temperature=0)
    texts = [table(generate(nanogpt, [[1, 2]], 30, greedy, seed=seed)) for seed in (0, 1)]
    text = [1, 2]
    with torch.no_grad():
        for _ in range(30):
            text.append(int(nanogpt(torch.tensor([text[-16:]]))[0, -1].argmax()))
    assert texts == [[text[2:]], [text[2:]]]


@pytest.mark.parametrize("temperature", [1e-300, 1e-9, 1e9])
def test_extreme_temperatures_overflow_nothing(temperature: float) -> None:
    p = next_token_probabilities(torch.tensor([[90.0, -90.0, 89.0]]), Sampling(temperature=temperature))
    assert bool(p.isfinite().all())
    assert float(p.sum()) == pytest.approx(1)


@given(weights=st.lists(st.sampled_from([0.0, 1e-12, 0.1, 1.0, 3.0]), min_size=1, max_size=8).filter(any))
@settings(deadline=None)
def test_a_number_picks_the_symbol_whose_share_of_the_line_it_falls_in(weights: list[float]) -> None:
    """Evenly spaced numbers, and the ends 0 and just below 1: each symbol is met as often as it is probable."""
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


def test_under_deterministic_algorithms_the_same_text_is_drawn(nanogpt: GPT) -> None:
    """There a GPU refuses to add fractions, and whole numbers are added: they must pick the same symbols."""
    sampling = Sampling(top_p=0.95)
    before = torch.stack(list(generate(nanogpt, [[1, 2, 3]], 40, sampling, num_samples=8)))
    torch.use_deterministic_algorithms(True)
    again = torch.stack(list(generate(nanogpt, [[1, 2, 3]], 40, sampling, num_samples=8)))
    sums = running_sums(torch.tensor([[0.5, 0.0, 0.3, 0.2]], dtype=torch.float64))
    assert again.tolist() == before.tolist()
    torch.testing.assert_close(sums, torch.tensor([[0.5, 0.5, 0.8, 1.0]], dtype=torch.float64), rtol=0, atol=1e-15)
    assert sums[0, 0] == sums[0, 1]  # or the symbol of probability 0 could be drawn


def test_log_probabilities_are_the_models_own(nanogpt: GPT) -> None:
    """Of temperature 1 and without filters, whatever the ids were drawn with: minus their mean is the text's loss."""
    scores: list[Tensor] = []
    prompt, filtered = [1, 2, 3], Sampling(temperature=0.5, top_k=5)
    drawn = table(generate(nanogpt, [prompt], 12, filtered, num_samples=2, log_probabilities=scores))
    for row, ids in enumerate(drawn):
        with torch.no_grad():
            logits = nanogpt(torch.tensor([prompt + ids[:-1]]))[0, len(prompt) - 1 :]  # (12, V)
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(ids))
        assert float(-torch.stack(scores, 1)[row].mean()) == pytest.approx(float(loss))


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"temperature": -1.0}, "--temperature is -1.0"),
        ({"temperature": math.nan}, "--temperature is nan"),
        ({"temperature": math.inf}, "--temperature is inf"),
        ({"top_k": 0}, "--top_k is 0"),
        ({"top_p": 0.0}, "--top_p is 0.0"),
        ({"top_p": 1.5}, "--top_p is 1.5"),
        ({"min_p": -0.1}, "--min_p is -0.1"),
        ({"min_p": 2.0}, "--min_p is 2.0"),
    ],
)
def test_a_number_out_of_range_is_named_with_its_flag(options: dict[str, float], flag: str) -> None:
    with pytest.raises(UserError, match=flag):
        Sampling(**options)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "no prompt"),
        ([[1], []], {}, "prompt 2 is empty"),
        ([[1, 65]], {}, "outside 0 … 64"),
        ([[-1]], {}, "outside 0 … 64"),
        ([[1]], {"max_new_tokens": 0}, "--max_new_tokens is 0"),
        ([[1]], {"num_samples": 0}, "--num_samples is 0"),
        ([[1]], {"context": "window"}, "--context is window"),
    ],
)
def test_a_mistake_is_told_at_the_call_and_not_at_the_first_id(
    nanogpt: GPT, prompts: list[list[int]], options: dict[str, object], message: str
) -> None:
    """Ids outside the vocabulary would read beyond the table; a generator would tell of nothing until it is read."""
    with pytest.raises(UserError, match=message):
        generate(nanogpt, prompts, **{"max_new_tokens": 5, **options})


def test_a_model_that_has_diverged_is_named_as_such(nanogpt: GPT) -> None:
    """NaN logits would otherwise pick symbols beyond the vocabulary, and fail somewhere else."""
    model = random_gpt(nanogpt.config)
    with torch.no_grad():
        model.transformer["wte"].weight.fill_(math.nan)
    with pytest.raises(UserError, match="went astray"):
        next(generate(model, [[1]], 5))


# ---------------------------------------------------------------- memory


def live_tensors() -> int:
    gc.collect()
    return sum(isinstance(thing, Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize("context", ["exact", "rolling"])
def test_a_long_text_keeps_no_more_than_its_window(nanogpt: GPT, context: str) -> None:
    """Whatever grows with the text (a list of ids, a cache of all positions) would end a long run out of memory."""
    stream: Iterator[Tensor] = generate(nanogpt, [[1]], 10_000, context=context)
    counts = []
    for _ in range(3):
        list(islice(stream, 9 * 32))  # a row rolls at every ninth id
        counts.append(live_tensors())
    assert counts[1] == counts[2]


def test_the_cache_is_no_larger_than_the_text_will_be(nanogpt: GPT) -> None:
    short = list(generate(nanogpt, [[1, 2, 3]], 2))
    assert len(short) == 2
    assert Decoder(nanogpt).new_cache(1, 4).keys.shape == (2, 1, 2, 4, 16)
    assert Decoder(nanogpt).new_cache(1, 99).keys.shape == (2, 1, 2, 16, 16)


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


# ---------------------------------------------------------------- text

ALPHABET = CharTokenizer("abc")


class Pieces:
    """A tokenizer whose tokens are several letters long."""

    tokens = ("a", "b", "c", "ab", "bca", "cc", "abcab")

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.tokens[i] for i in ids)


def before_first_stop(text: str, stop: Sequence[str]) -> str:
    """Letter by letter: the first moment at which the text ends with a stop text."""
    for end in range(1, len(text) + 1):
        met = [len(s) for s in stop if text[:end].endswith(s)]
        if met:
            return text[: end - max(met)]
    return text


def streamed(stream: TextStream, ids: Iterable[int]) -> list[str]:
    return [*(stream.push(i) for i in ids), stream.close()]


@given(
    ids=st.lists(st.integers(0, 6), max_size=30),
    stop=st.lists(st.text("abc", min_size=1, max_size=6), max_size=3),
)
def test_the_text_ends_before_the_first_stop_text_however_it_is_cut_into_tokens(
    ids: list[int], stop: list[str]
) -> None:
    text = Pieces().decode(ids)
    assert "".join(streamed(TextStream(Pieces(), stop), ids)) == before_first_stop(text, stop)


def test_only_what_may_begin_a_stop_text_is_held_back() -> None:
    """Text that cannot be part of a stop text must not wait: a reader would see it stutter."""
    stream = TextStream(ALPHABET, ["abc"])
    assert streamed(stream, ALPHABET.encode("cabab")) == ["c", "", "", "ab", "", "ab"]
    assert not stream.stopped
    stream = TextStream(ALPHABET, ["abc"])
    assert streamed(stream, ALPHABET.encode("cababca")) == ["c", "", "", "ab", "", "", "", ""]
    assert stream.stopped


def test_without_a_stop_text_every_character_comes_at_once() -> None:
    assert streamed(TextStream(ALPHABET), [0, 1, 2]) == ["a", "b", "c", ""]


VERSE = "naïve 日本語 😀 \ufffd end"


@given(text=st.text(max_size=20) | st.text(VERSE, max_size=20), cut=st.integers(0, 20))
@settings(deadline=None)
def test_half_a_character_is_never_shown(text: str, cut: int) -> None:
    """A byte-level token may end inside a character: shown at once it would be a �, and stay one."""
    tokenizer = BPETokenizer.train([VERSE], vocab_size=256, source="verse")
    ids = tokenizer.encode(text)
    pieces = streamed(TextStream(tokenizer), ids)
    assert "".join(pieces) == text
    broken = ids[:cut]  # ends anywhere, as a text of max_new_tokens does
    assert "".join(streamed(TextStream(tokenizer), broken)) == tokenizer.decode(broken)
