"""Every way to compute one token gives the logits of the model: torch, numpy, packed weights, folded norms."""

import gc
import math
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import DIALECTS, random_gpt
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gptlit.errors import UserError
from gptlit.generation.engine import affine
from gptlit.generation.engine.affine import Affine
from gptlit.generation.engine.choose import EagerWindow, make_step, make_window
from gptlit.generation.engine.cpu_step import CpuStep, TokenProgram, small_pieces
from gptlit.generation.engine.decoder import Decoder
from gptlit.generation.engine.folding import fold
from gptlit.generation.engine.limits import NUMPY_BELOW, PACK_FROM_WEIGHT, VECTOR_SIZE
from gptlit.generation.generate import generate
from gptlit.model.config import GPTConfig
from gptlit.model.gpt import GPT
from gptlit.model.kv_cache import KVCache


@pytest.fixture(scope="module")
def nanogpt() -> GPT:
    return random_gpt(GPTConfig(**DIALECTS["nanogpt"]))


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of any size are packed, on any CPU."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    monkeypatch.setattr(affine, "is_amd", lambda: True)
    monkeypatch.setattr(affine, "PACK_FROM_WEIGHT", 1)


# ---------------------------------------------------------------- the same logits as the model


@pytest.mark.parametrize("rows", [0, 3])
def test_the_decoder_equals_the_model_position_by_position(dialect: GPTConfig, rows: int) -> None:
    """Other layout and order of operations, the same logits and the same cache."""
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
            "decoder.ERF_BELOW": st.sampled_from([0, 4096]),
            "folding.ERF_BELOW": st.sampled_from([0, 4096]),
            "cpu_step.VECTOR_SIZE": st.sampled_from([1, 8, 32, 8192]),
            "cache_view.VECTOR_SIZE": st.sampled_from([0, 8, 8192]),
        }
    ),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=300)
def test_every_combination_of_switches_gives_the_models_logits(
    config: GPTConfig, shift: int, rows: int, laid_out: int, limits: dict[str, int], seed: int
) -> None:
    """Combinations that no dialect has, such as GELU without residual connections, and every threshold.

    Two texts alternate in the same step, which must not read the other's cache; each of them twice. Without residual
    connections a norm may amplify rounding errors.
    """
    check = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    config = replace(config, token_shift=shift if config.mlp_ratio else 0)
    model = random_gpt(config, seed)
    decoder, T = Decoder(model, laid_out * rows), config.block_size
    texts = torch.randint(11, (2, rows, T), generator=torch.Generator().manual_seed(seed))
    lengths = torch.tensor([T, *[T - 1] * (rows - 1)])
    with torch.no_grad(), ExitStack() as patches:
        for name, value in limits.items():
            patches.enter_context(mock.patch(f"gptlit.generation.engine.{name}", value))
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


@pytest.mark.usefixtures("packed")
@pytest.mark.parametrize("rows", [1, 2, 40])
def test_packed_weights_give_the_models_logits(dialect: GPTConfig, rows: int) -> None:
    """float64 cannot be packed, so the other tests never reach oneDNN's matmul."""
    model = random_gpt(dialect).float()
    decoder, T = Decoder(model, rows), dialect.block_size
    assert decoder.lm_head.packed is not None
    ids = torch.randint(65, (rows, T), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids)
        torch.testing.assert_close(decoder(ids), expected[:, -1], rtol=1e-4, atol=1e-4)
        cache = decoder.new_cache(rows, T)
        decoder(ids[:, :3], cache=cache)
        for t in range(3, T):
            torch.testing.assert_close(decoder.step(ids[:, t], cache), expected[:, t], rtol=1e-4, atol=1e-4)


def test_a_window_moves_on_by_one_id(nanogpt: GPT) -> None:
    """It must drop the oldest id, not the newest, and remember what it read last."""
    decoder, T = Decoder(nanogpt), nanogpt.config.block_size
    ids = torch.randint(65, (2, 30), generator=torch.Generator().manual_seed(1))
    read = make_window(decoder, ids[:, :T], ids_to_come=100)
    assert isinstance(read, EagerWindow)  # only a GPU replays graphs
    for end in range(T, 30):
        torch.testing.assert_close(read(ids[:, end]), decoder(ids[:, end + 1 - T : end + 1]))


def test_a_cache_that_holds_tokens_takes_one_at_a_time(nanogpt: GPT) -> None:
    """Several at once would need a mask that the decoder does not make."""
    decoder = Decoder(nanogpt)
    cache = decoder.new_cache(1, 8)
    decoder(torch.tensor([[1, 2]]), cache=cache)
    with pytest.raises(ValueError, match="one new token at a time"):
        decoder(torch.tensor([[3, 4]]), cache=cache)
    with pytest.raises(UserError, match="does not fit block_size 16"):
        decoder(torch.zeros(1, 17, dtype=torch.long))


# ---------------------------------------------------------------- which way is chosen


@pytest.mark.parametrize(
    ("dtype", "numpy"), [(torch.float32, True), (torch.float64, True), (torch.bfloat16, False), (torch.float16, False)]
)
def test_numpy_computes_in_the_precisions_that_it_has(nanogpt: GPT, dtype: torch.dtype, numpy: bool) -> None:
    """It has no bfloat16, and its float16 is a hundred times as slow."""
    step = make_step(Decoder(random_gpt(nanogpt.config).to(dtype)), 1, 10)
    assert isinstance(step, CpuStep) is numpy
    assert not CpuStep.serves(Decoder(GPT(nanogpt.config).to("meta")), 1)


def test_numpy_computes_small_tokens_only(nanogpt: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folding copies weights: for GPT-2 it would take half a gigabyte and a second, for nothing."""
    decoder = Decoder(nanogpt)
    weights = sum(p.numel() for name, p in nanogpt.named_parameters() if "c_" in name or "lm_head" in name)
    weights += nanogpt.lm_head.weight.numel()  # tied, and named as the token embedding
    monkeypatch.setattr("gptlit.generation.engine.cpu_step.NUMPY_BELOW", 3 * weights)
    assert isinstance(make_step(decoder, 3, 100), CpuStep)
    assert make_step(decoder, 4, 100) == decoder.step
    assert NUMPY_BELOW < 124_000_000


@pytest.mark.usefixtures("packed")
def test_numpy_leaves_packed_weights_to_torch(nanogpt: GPT) -> None:
    decoder = Decoder(random_gpt(nanogpt.config).float(), rows=1)
    assert make_step(decoder, 1, 100) == decoder.step


def test_weights_are_packed_where_that_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """On AMD CPUs, for large weights or many rows: oneDNN takes 9 µs to begin."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    small, large = torch.nn.Linear(128, 128, bias=False), torch.nn.Linear(384, 384)
    assert small.weight.numel() < PACK_FROM_WEIGHT <= large.weight.numel()
    monkeypatch.setattr(affine, "is_amd", lambda: True)
    assert Affine.of(small, 1).packed is None
    assert Affine.of(small, 128).packed is not None
    assert Affine.of(large, 1).packed is not None
    assert Affine.of(large, 0).packed is None
    assert Affine.of(large.double(), 1).packed is None
    monkeypatch.setattr(affine, "is_amd", lambda: False)
    assert Affine.of(torch.nn.Linear(384, 384), 1).packed is None


@pytest.mark.parametrize(("prompts", "made"), [([[1, 2]], 1), ([[1, 2], [3]], 0)])
def test_the_operations_of_a_token_are_prepared_once_and_only_if_needed(
    nanogpt: GPT, prompts: list[list[int]], made: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That takes the time of about ten tokens; rows of different lengths do not use them."""
    init, count = TokenProgram.__init__, []

    def spy(self: TokenProgram, decoder: Decoder, rows: int) -> None:
        count.append(rows)
        init(self, decoder, rows)

    monkeypatch.setattr(TokenProgram, "__init__", spy)
    list(generate(nanogpt, prompts, 12))
    assert len(count) == made


@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize("name", ["nanogpt", "modern"])
def test_numpy_computes_no_product_that_its_threads_would_share(
    name: str, num_samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With torch's threads on the same cores, shared products made 10 characters/s of 350.

    The weights here are larger than the limit, and so are the keys of a head from position 128 on.
    """
    model = random_gpt(GPTConfig(**{**DIALECTS[name], "block_size": 160, "n_embd": 128}), std=0.05)
    sizes = [0]

    def spied(product: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        def spy(a: np.ndarray, b: np.ndarray, **options: np.ndarray) -> np.ndarray:
            matrix = a if product is matvec else b
            sizes.append(math.prod(matrix.shape[-2:]))
            return product(a, b, **options)

        return spy

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("a product of unlimited size")

    matvec = np.matvec
    monkeypatch.setattr(np, "matvec", spied(np.matvec))
    monkeypatch.setattr(np, "vecmat", spied(np.vecmat))
    for product in ("matmul", "dot", "vdot", "inner", "outer", "tensordot", "einsum"):
        monkeypatch.setattr(np, product, fail)
    list(generate(model, [[1]], 159, num_samples=num_samples))
    assert max(sizes) <= VECTOR_SIZE
    assert (max(sizes) > 0) is (num_samples == 1)


@given(rows=st.integers(1, 300), columns=st.integers(1, VECTOR_SIZE))
@settings(deadline=None)
def test_pieces_of_a_weight_are_small_few_and_complete(rows: int, columns: int) -> None:
    weight = np.zeros(rows * columns).reshape(rows, columns)
    pieces = small_pieces(weight)  # (count, out / count, in)
    fewest = math.ceil(rows * columns / VECTOR_SIZE)
    counts = [n for n in range(fewest, fewest + 8) if rows % n == 0 and rows // n * columns <= VECTOR_SIZE]
    assert (pieces is None) == (not counts)  # 97 tokens would be 97 products
    if pieces is not None:
        assert pieces.shape == (counts[0], rows // counts[0], columns)
        assert np.shares_memory(pieces, weight)


# ---------------------------------------------------------------- folding


def test_a_folded_layer_norm_has_no_mean_left_to_subtract() -> None:
    """Everything that adds to the residual stream must be centred, or x / √(mean of x²) is another norm."""
    config = GPTConfig(**{**DIALECTS["nanogpt"], "bias": True})
    decoder = Decoder(random_gpt(config))
    folded = fold(decoder, 1)
    assert folded.eps == decoder.last_norm.eps  # type: ignore[attr-defined]
    assert (folded.scaled, folded.halved) == (True, True)
    adding = [folded.token_embedding, folded.position_embedding]
    adding += [part for layer in folded.layers for product in (layer.proj, layer.out) for part in tensors_of(product)]
    for part in adding:
        torch.testing.assert_close(part.mean(-1), torch.zeros_like(part[..., 0]), rtol=0, atol=1e-12)


def tensors_of(affine_map: Affine | None) -> list[Tensor]:
    assert affine_map is not None
    assert affine_map.bias is not None
    return [affine_map.weight, affine_map.bias]


@pytest.mark.parametrize(
    ("changes", "eps", "scaled", "halved"),
    [
        ({"norm": "rmsnorm"}, 1e-6, True, True),  # no gain to fold
        ({"norm": "none"}, None, True, True),
        ({"token_shift": 1}, None, True, True),  # the zeros before a text are not the output of a norm
        ({"qk_norm": True}, 1e-5, False, True),  # a norm removes a factor of its input
        ({"activation": "relu2"}, 1e-5, True, False),
    ],
)
def test_what_cannot_be_folded_is_left_alone(
    changes: dict[str, object], eps: float | None, scaled: bool, halved: bool
) -> None:
    folded = fold(Decoder(random_gpt(GPTConfig(**{**DIALECTS["nanogpt"], **changes}))), 1)
    assert (folded.eps, folded.scaled, folded.halved) == (eps, scaled, halved)


def test_only_what_is_folded_is_copied() -> None:
    """The modern dialect has nothing to fold: its weights are read where they are."""
    for changes in ({}, {"norm": "none", "qk_norm": False}):
        decoder = Decoder(random_gpt(GPTConfig(**{**DIALECTS["modern"], **changes})))
        for kept, layer in zip(decoder.layers, fold(decoder, 1).layers, strict=True):
            assert all(getattr(layer, name) is getattr(kept, name) for name in ("proj", "fc", "out"))
            assert (layer.qkv is kept.qkv) is not bool(changes)


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("rows", [1, 5])
def test_the_memory_of_a_text_is_freed_with_it(dialect: GPTConfig, rows: int) -> None:
    """In a reference cycle the folded weights of each text would stay until the garbage collector runs."""
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


def test_the_cache_is_no_larger_than_the_text_will_be(nanogpt: GPT) -> None:
    assert Decoder(nanogpt).new_cache(1, 4).keys.shape == (2, 1, 2, 4, 16)
    assert Decoder(nanogpt).new_cache(1, 99).keys.shape == (2, 1, 2, 16, 16)


def test_a_cleared_cache_is_an_empty_one(nanogpt: GPT) -> None:
    """Row lengths kept from before would mask what is read next."""
    decoder = Decoder(nanogpt)
    cache = decoder.new_cache(2, 8)
    decoder(torch.tensor([[1, 2], [3, 0]]), torch.tensor([2, 1]), cache=cache)
    assert cache.row_lengths is not None
    cache.clear()
    assert (cache.length, cache.row_lengths) == (0, None)
