"""Batches are a function of (seed, step), validation counts every token once, short texts are refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptlit import TextDataModule
from gptlit.data import IGNORED, LossEstimate, RandomChunks, TrainingBatches, ValidationWindows
from gptlit.errors import UserError

TOKENS = torch.arange(1000, dtype=torch.int32)


def test_targets_are_the_inputs_shifted_by_one() -> None:
    """Guards against predicting the input itself."""
    inputs, targets = RandomChunks(TOKENS, block_size=8, batch_size=4, seed=1)[0]
    assert inputs.shape == targets.shape == (4, 8)
    assert inputs.dtype == torch.int64
    assert torch.equal(targets, inputs + 1)  # the text counts upwards
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(8))


@given(seed=st.integers(-(2**40), 2**70), step=st.integers(0, 2**40))
@settings(max_examples=50, deadline=None)
def test_a_batch_depends_on_seed_and_step_alone(seed: int, step: int) -> None:
    """Two samplers that have been used differently agree, as exact resume requires."""
    fresh, used = (RandomChunks(TOKENS, 8, 4, seed) for _ in range(2))
    for other in range(3):
        used[other]
    assert torch.equal(fresh[step][0], used[step][0])


def test_steps_and_seeds_give_different_batches() -> None:
    """Guards against a counter or a key that is ignored, which would repeat one batch."""
    batches = [RandomChunks(TOKENS, 8, 16, seed).offsets(step).tobytes() for seed in range(20) for step in range(20)]
    assert len(set(batches)) == 400


def test_every_chunk_is_sampled_about_equally_often() -> None:
    """Guards against an end of the text that is never sampled."""
    chunks = RandomChunks(TOKENS[:108], block_size=8, batch_size=1000, seed=3)
    counts = np.bincount(np.concatenate([chunks.offsets(step) for step in range(20)]), minlength=100)
    assert len(counts) == 100  # offsets 0 … 99: the last chunk ends with the text
    assert 130 < counts.min() <= counts.max() < 280  # 200 expected, standard deviation 14


def test_a_memory_mapped_text_gives_the_same_batches(tmp_path: Path) -> None:
    """Both code paths give the same result."""
    np.save(tmp_path / "tokens.npy", TOKENS.numpy().astype(np.uint16))
    mapped = np.load(tmp_path / "tokens.npy", mmap_mode="r")
    for here, there in zip(RandomChunks(TOKENS, 8, 4, 1)[5], RandomChunks(mapped, 8, 4, 1)[5], strict=True):
        assert torch.equal(here, there)
    ours, theirs = ValidationWindows(TOKENS, 8, 5), ValidationWindows(mapped, 8, 5)
    assert all(torch.equal(a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (1, 3), (2, 1), (2, 3), (4, 3)])
def test_processes_and_micro_batches_share_one_global_batch(world_size: int, accumulate: int) -> None:
    """However a step is split, its parts hold the same rows, each once."""
    chunks = RandomChunks(TOKENS, 8, 12, seed=5)
    loaders = [TrainingBatches(chunks, 7, accumulate, rank, world_size, done=lambda: 4) for rank in range(world_size)]
    assert {len(loader) for loader in loaders} == {7 * accumulate}
    parts = [list(loader) for loader in loaders]
    for step in (4, 5, 6):
        rows = [
            parts[rank][(step - 4) * accumulate + part][0] for part in range(accumulate) for rank in range(world_size)
        ]
        assert torch.equal(torch.cat(rows).sort(dim=0).values, chunks[step][0].sort(dim=0).values)
    assert all(len(part) == 3 * accumulate for part in parts)  # it resumed at step 4 of 7


def test_a_batch_that_cannot_be_shared_equally_is_refused_by_name() -> None:
    """Guards against a mean of unequal parts, which is another gradient."""
    with pytest.raises(UserError, match=r"batch_size is 12, .* multiple of 8"):
        TrainingBatches(RandomChunks(TOKENS, 8, 12, 1), 10, 4, 0, 2, done=lambda: 0)


@given(length=st.integers(9, 200), batch=st.integers(1, 7), world_size=st.integers(1, 4))
@settings(max_examples=80, deadline=None)
def test_validation_predicts_every_token_but_the_first_exactly_once(length: int, batch: int, world_size: int) -> None:
    """For any length, batch size and number of processes, with equal numbers of batches."""
    loaders = [ValidationWindows(TOKENS[:length], 8, batch, rank, world_size) for rank in range(world_size)]
    assert len({len(list(loader)) for loader in loaders}) == 1
    assert all(len(list(loader)) == len(loader) for loader in loaders)
    pairs = [(i, t) for loader in loaders for i, t in loader]
    targets = torch.cat([t.flatten() for _, t in pairs])
    inputs = torch.cat([i.flatten() for i, _ in pairs])
    counted = targets != IGNORED
    assert sorted(targets[counted].tolist()) == list(range(1, length))
    assert torch.equal(inputs[counted] + 1, targets[counted])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_loss_estimates_are_the_same_batches_for_any_number_of_processes(world_size: int) -> None:
    """Guards against an estimate that changes with the batches instead of the weights."""
    chunks = RandomChunks(TOKENS, 8, 4, seed=1)
    wanted = sorted(row for i, _ in LossEstimate(chunks, 5) for row in i[:, 0].tolist())
    loaders = [LossEstimate(chunks, 5, rank, world_size) for rank in range(world_size)]
    counted = sorted(row for loader in loaders for i, t in loader if (t >= 0).all() for row in i[:, 0].tolist())
    assert counted == wanted
    assert len({len(list(loader)) for loader in loaders}) == 1


@pytest.mark.parametrize("make", [lambda t: RandomChunks(t, 8, 4, 1), lambda t: ValidationWindows(t, 8, 4)])
def test_a_text_shorter_than_one_chunk_is_refused(make) -> None:
    """block_size + 1 tokens are enough, one less is not."""
    make(TOKENS[:9])
    with pytest.raises(UserError, match="block_size 8"):
        make(TOKENS[:8])


def test_a_data_module_gives_batches_without_a_trainer(tmp_path: Path) -> None:
    """As in a notebook: the batches of steps 0, 1, 2, …, and the whole validation part."""
    (tmp_path / "a.txt").write_text("hello world\n" * 30)
    data = TextDataModule(str(tmp_path / "a.txt"), block_size=8, batch_size=4, estimate_batches=2, seed=3)
    batches = iter(data.train_dataloader())
    chunks = RandomChunks(data.train_tokens, 8, 4, seed=3)
    for step in range(3):
        inputs, targets = next(batches)
        assert torch.equal(inputs, chunks[step][0])
        assert torch.equal(targets, chunks[step][1])
    fresh = TextDataModule(str(tmp_path / "a.txt"), block_size=8)
    (windows,) = fresh.val_dataloader()
    assert sum(int((targets != IGNORED).sum()) for _, targets in windows) == len(fresh.val_tokens) - 1


@pytest.mark.parametrize(("characters", "dtype"), [(256, torch.uint8), (257, torch.int16), (32_769, torch.int32)])
def test_ids_in_memory_are_as_narrow_as_torch_can_index(tmp_path: Path, characters: int, dtype: torch.dtype) -> None:
    """With a narrower type the highest ids would overflow."""
    text = "".join(map(chr, range(0x20000, 0x20000 + characters))) * 2
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    data = TextDataModule(str(tmp_path / "a.txt"), block_size=8, batch_size=4)
    data.setup()
    assert data.train_tokens.dtype == data.val_tokens.dtype == dtype
    inputs, _ = data.train_dataloader().chunks[0]
    assert inputs.dtype == torch.int64
    decoded = data.tokenizer.decode(data.train_tokens.tolist() + data.val_tokens.tolist())
    assert decoded == text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0: it must be 1 or more"),
        ({"eval_batch_size": 0}, "eval_batch_size is 0: it must be 1 or more"),
        ({"estimate_batches": -1}, "estimate_batches is -1: it must be 0 or more"),
        ({"val_fraction": 0.0}, "val_fraction is 0.0: it must be above 0 and below 1"),
    ],
)
def test_a_setting_out_of_range_is_named(settings: dict[str, float], message: str) -> None:
    with pytest.raises(UserError) as caught:
        TextDataModule("sample", **settings)
    assert str(caught.value) == message
    assert caught.value.setting == next(iter(settings))
