"""CUDA graphs give the logits of the model: the captured work run on a CPU, and real graphs on a GPU."""

import gc
import warnings
from collections.abc import Callable, Iterator
from itertools import islice

import pytest
import torch
from conftest import DIALECTS, random_gpt
from test_generate import RAGGED, generate, table
from torch import Tensor

from gptlit.device.cuda_graphs import CudaGraphCapturer
from gptlit.generation.engine import choose, cuda_step
from gptlit.generation.engine.cpu_step import CpuStep
from gptlit.generation.engine.cuda_step import CudaGraphStep, CudaGraphWindow
from gptlit.generation.engine.decoder import Decoder
from gptlit.generation.generate import Sampling, generate_naive
from gptlit.model.config import GPTConfig
from gptlit.model.gpt import GPT
from gptlit.model.kv_cache import KVCache

LONG = {**DIALECTS["modern"], "block_size": 160}  # three spans
CHOSEN = ("positions", "four heads", "gpt2", "modern", "modern, token shift")


def gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that needs a GPU."""
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")(test))


@pytest.fixture
def spans_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small windows are read over several spans too."""
    monkeypatch.setattr(cuda_step, "SHORTEST_SPAN", 4)


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch, spans_of_four: None) -> None:
    """`generate` does on a CPU what it does on a GPU, without capturing."""
    monkeypatch.setattr(CudaGraphStep, "serves", lambda decoder: True)
    monkeypatch.setattr(CpuStep, "serves", lambda decoder, rows: False)
    monkeypatch.setattr(choose, "CAPTURE_FROM_IDS", 1)


def ids_of(rows: int, T: int) -> Tensor:
    return torch.randint(65, (rows, T), generator=torch.Generator().manual_seed(1))


def spoiled(cache: KVCache) -> KVCache:
    """Return the cache with NaN where nothing was written, as uninitialised memory may hold."""
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    return cache


# ---------------------------------------------------------------- the work that is captured


@pytest.mark.usefixtures("spans_of_four")
@torch.inference_mode()
def test_a_token_over_a_fixed_span_is_the_models_own(dialect: GPTConfig) -> None:
    """A misplaced key, a position that does not advance, or attention past the row's end would change a logit."""
    model, T = random_gpt(dialect), dialect.block_size
    decoder, ids = Decoder(model), ids_of(3, T)
    expected = model(ids)
    of_the_model, cache = KVCache(dialect, 3, dtype=torch.float64), spoiled(decoder.new_cache(3, T))
    model(ids, of_the_model)
    decoder(ids[:, :3], cache=cache)
    step = CudaGraphStep(decoder, 3)
    for t in range(3, T):
        torch.testing.assert_close(step(ids[:, t], cache), expected[:, t])
    assert cache.length == T
    assert cache.row_lengths is None
    torch.testing.assert_close(cache.keys, of_the_model.keys)
    torch.testing.assert_close(cache.values, of_the_model.values)


@pytest.mark.usefixtures("spans_of_four")
@torch.inference_mode()
def test_rows_of_different_lengths_each_continue_from_their_own_end(dialect: GPTConfig) -> None:
    """One position for all rows would misplace a short row's key, and rotate it too far."""
    model, T = random_gpt(dialect), dialect.block_size
    decoder, ids, lengths = Decoder(model), ids_of(3, T), torch.tensor([4, 1, 2])
    expected, rows = model(ids), torch.arange(3)
    cache = spoiled(decoder.new_cache(3, T))
    decoder(ids[:, :4], lengths, cache)
    step = CudaGraphStep(decoder, 3)
    for n in range(T - 4):
        at = lengths + n
        torch.testing.assert_close(step(ids[rows, at], cache), expected[rows, at])
    assert cache.length == T
    assert cache.row_lengths is not None
    assert cache.row_lengths.tolist() == [T, T - 3, T - 2]


@pytest.mark.usefixtures("spans_of_four")
@torch.inference_mode()
def test_a_step_follows_a_cache_whose_rows_were_replaced_and_another_cache() -> None:
    """Positions or graphs kept from before would write to the old position, or to the old cache."""
    config = GPTConfig(**DIALECTS["modern, token shift"])
    decoder = Decoder(random_gpt(config))
    step = CudaGraphStep(decoder, 2)
    for ids in ids_of(4, 16).split(2):
        fixed, plain = decoder.new_cache(2, 16), decoder.new_cache(2, 16)
        for read, cache in ((step, spoiled(fixed)), (decoder.step, plain)):
            decoder(ids[:, :9], cache=cache)
            read(ids[:, 9], cache)
            half = decoder.new_cache(1, 3)
            decoder(ids[:1, 7:10], cache=half)
            cache.replace(torch.tensor([1]), half)
        for t in range(10, 15):
            torch.testing.assert_close(step(ids[:, t], fixed), decoder.step(ids[:, t], plain))


@torch.inference_mode()
def test_the_span_is_the_shortest_that_holds_the_token_and_never_exceeds_the_cache() -> None:
    decoder = Decoder(random_gpt(GPTConfig(**LONG)))
    cache, spans = decoder.new_cache(1, 150), []
    for cache.length in (1, 63, 64, 127, 128, 149):
        spans.append(CudaGraphStep.span(cache))
    assert spans == [64, 64, 128, 128, 150, 150]


@torch.inference_mode()
def test_the_captured_window_moves_on_by_one_id(dialect: GPTConfig) -> None:
    """It must drop the oldest id, not the newest, and remember what it read last."""
    decoder, ids, T = Decoder(random_gpt(dialect)), ids_of(2, 30), dialect.block_size
    read = CudaGraphWindow(decoder, ids[:, :T])
    for end in range(T, 30):
        torch.testing.assert_close(read(ids[:, end]), decoder(ids[:, end + 1 - T : end + 1]))


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("prompts", [[[1, 2, 3], [4, 5, 6]], RAGGED, [[7] * 40, [8, 9]]])
def test_the_ids_are_those_of_the_naive_reference(dialect: GPTConfig, prompts: list[list[int]]) -> None:
    """Within block_size, when a row first fills it, and far beyond, where the whole window is read again."""
    model, new = random_gpt(dialect), 3 * dialect.block_size
    texts = table(generate(model, prompts, new, num_samples=2, seed=5))
    assert texts == table(generate_naive(model, prompts, new, num_samples=2, seed=5))


def test_rolling_ids_are_those_without_graphs(dialect: GPTConfig, request: pytest.FixtureRequest) -> None:
    """Rows roll one by one: the cache changes between two steps."""
    model, new = random_gpt(dialect), 4 * dialect.block_size
    plain = table(generate(model, RAGGED, new, num_samples=2, seed=5, context="rolling"))
    request.getfixturevalue("everywhere")
    assert table(generate(model, RAGGED, new, num_samples=2, seed=5, context="rolling")) == plain


@pytest.mark.usefixtures("everywhere")
def test_short_texts_are_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capturing for a few ids would make a short text slower."""
    captured = []
    capture = CudaGraphCapturer.capture
    monkeypatch.setattr(CudaGraphCapturer, "capture", lambda self, work: captured.append(work) or capture(self, work))
    monkeypatch.setattr(choose, "CAPTURE_FROM_IDS", 8)
    model = random_gpt(GPTConfig(**DIALECTS["nanogpt"]))  # block_size 16
    counts = []
    for lengths, new in [([1], 8), ([1], 9), ([16], 8), ([16], 9), ([9], 9), ([16, 12], 11)]:
        list(generate(model, [[1] * length for length in lengths], new))
        counts.append(len(captured))
        captured.clear()
    # Of 8 ids, 7 are read. Then: spans of 4, 8 and 9 positions; the window only; 7 ids before the window is full and 1
    # after; 6 ids where both windows are full.
    assert counts == [0, 3, 0, 1, 0, 0]


def test_only_a_gpu_replays_graphs() -> None:
    assert not CudaGraphStep.serves(Decoder(random_gpt(GPTConfig(**DIALECTS["modern"]))))


# ---------------------------------------------------------------- graphs


def on_gpu(name: str = "modern", **changes: int) -> GPT:
    return random_gpt(GPTConfig(**{**DIALECTS[name], "block_size": 96, **changes})).to("cuda")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether each attempt gave a graph. It must: a test that falls back would have tested nothing."""
    made: list[bool] = []
    capture = CudaGraphCapturer.capture

    def spy(self: CudaGraphCapturer, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        replay = capture(self, work)
        made.append(replay is not work)
        return replay

    monkeypatch.setattr(CudaGraphCapturer, "capture", spy)
    yield made
    assert made
    assert all(made)


@gpu
@pytest.mark.parametrize("name", CHOSEN)
def test_graphs_give_the_ids_of_the_naive_reference(name: str, graphs: list[bool]) -> None:
    """Prompts of equal and of different lengths; across spans, and far beyond the window, which is captured too."""
    model = on_gpu(name)
    for prompts in ([[1, 2, 3], [4, 5, 6]], RAGGED, [[7] * 120, [8, 9]]):
        texts = table(generate(model, prompts, 170, seed=5))
        assert texts == table(generate_naive(model, prompts, 170, seed=5))
    assert len(graphs) == 3 + 3 + 1  # two spans and the window; a full row needs the window only


@gpu
@pytest.mark.parametrize("name", CHOSEN)
def test_graphs_give_the_rolling_ids_of_eager_kernels(
    name: str, graphs: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = on_gpu(name)
    texts = table(generate(model, RAGGED, 400, num_samples=2, seed=5, context="rolling"))
    assert len(graphs) == 2  # spans of 64 and 96, which are not captured again after a roll
    monkeypatch.setattr(CudaGraphStep, "serves", lambda decoder: False)
    assert table(generate(model, RAGGED, 400, num_samples=2, seed=5, context="rolling")) == texts


@gpu
@pytest.mark.parametrize(
    "sampling", [Sampling(0.0), Sampling(0.7, top_k=5), Sampling(1.2, top_p=0.8), Sampling(min_p=0.1)]
)
@pytest.mark.usefixtures("graphs")
def test_log_probabilities_of_graphs_are_the_models_own(sampling: Sampling) -> None:
    """The next token overwrites the logits: what is kept of them must be a copy."""
    model = on_gpu()
    logs: list[Tensor] = []
    texts = table(generate(model, [[1, 2, 3]], 80, sampling, num_samples=2, log_probabilities=logs))
    assert texts == table(generate_naive(model, [[1, 2, 3]], 80, sampling, num_samples=2))
    ids = torch.tensor([[1, 2, 3, *row] for row in texts], device="cuda")
    with torch.no_grad():
        expected = model(ids[:, :-1]).log_softmax(-1).gather(2, ids[:, 1:, None])[:, 2:, 0]
    torch.testing.assert_close(torch.stack(logs, 1), expected)


@gpu
@pytest.mark.usefixtures("graphs")
def test_two_texts_in_turn_do_not_share_memory() -> None:
    """Two sets of graphs at once: neither may write to the other's memory, nor be freed with it."""
    model = on_gpu()
    expected = table(generate_naive(model, [[1, 2]], 200, seed=1))[0]
    slow = generate(model, [[1, 2]], 200, seed=1)
    texts = [next(slow).item() for _ in range(80)]
    for seed in range(4):
        other = generate(model, [[3, 4, 5]], 120, num_samples=3, seed=seed)
        for _ in range(70):
            next(other)
            texts += [next(slow).item()] if len(texts) < 150 else []
        if seed % 2:
            other.close()
        del other
        gc.collect()
        torch.cuda.empty_cache()
        torch.full((2**24,), torch.nan, device="cuda")  # overwrites memory that was freed too early
    assert texts + [ids.item() for ids in slow] == expected


@gpu
@pytest.mark.usefixtures("graphs")
def test_memory_does_not_grow_with_the_number_of_texts() -> None:
    """Graphs, their memory and cuBLAS workspaces are freed with the text."""
    model, held = on_gpu(), []
    for seed in range(12):
        stream = generate(model, [[1, 2, 3]], 200, num_samples=4, seed=seed)
        for _ in islice(stream, 150):
            pass
        del stream
        gc.collect()
        torch.cuda.empty_cache()
        held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert held[3:] == held[3:4] * 9


@gpu
@pytest.mark.usefixtures("graphs")
def test_capturing_leaves_the_devices_random_state_unchanged() -> None:
    before = torch.cuda.get_rng_state()
    list(generate(on_gpu(), [[1, 2, 3]], 120))
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert torch.rand(3, device="cuda").shape == (3,)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_graphs_agree_with_eager_kernels_in_float32_and_bfloat16(dtype: torch.dtype, graphs: list[bool]) -> None:
    """Attention uses other kernels there than in float64, with alignment requirements of their own."""
    decoder, ids = Decoder(on_gpu("nanogpt", n_embd=64).to(dtype)), ids_of(3, 96).cuda()
    step, caches = CudaGraphStep(decoder, 3), [decoder.new_cache(3, 90) for _ in range(2)]
    for cache in caches:
        decoder(ids[:, :5], cache=cache)
    for t in range(5, 90):
        logits, expected = step(ids[:, t], caches[0]), decoder.step(ids[:, t], caches[1])
        torch.testing.assert_close(logits, expected, rtol=0.05, atol=1e-4 if dtype == torch.float32 else 0.3)
    assert len(graphs) == 2


@gpu
@torch.inference_mode()
def test_work_that_cannot_be_captured_runs_without_a_graph() -> None:
    """A failed capture costs speed only: it must not break the stream, the generator or the next capture."""
    numbers = torch.arange(5, device="cuda")
    capturer, stream = CudaGraphCapturer(numbers.device), torch.cuda.current_stream()

    def synchronises() -> Tensor:
        return numbers * int(numbers.sum())

    with pytest.warns(UserWarning, match="without a CUDA graph"):
        run = capturer.capture(synchronises)
    assert run().tolist() == [0, 10, 20, 30, 40]
    assert torch.cuda.current_stream() == stream
    assert torch.rand(3, device="cuda").shape == (3,)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert CudaGraphCapturer(numbers.device).capture(lambda: numbers + 1)().tolist() == [1, 2, 3, 4, 5]
