"""The number of CPU threads is measured without a trace, and only where that pays."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from command import PLAY

from gptlit import GPTConfig, LitGPT, OptimizerConfig, TextDataModule
from gptlit.training import threads
from gptlit.training.threads import ENOUGH_SECONDS, FEWEST_ROUNDS, ROUNDS, faster_of, fastest_threads, measuring_pays

SIZE = {"block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 16, "dropout": 0.3, "token_noise": 0.1}


class Machine:
    """A clock, and a step that takes given seconds by number of threads; `stalls` are steps that take ten times that.

    It never asks the real clock.
    """

    def __init__(self, seconds: dict[int, float], stalls: tuple[int, ...] = ()) -> None:
        self.seconds, self.stalls, self.now, self.steps = seconds, stalls, 0.0, 0

    def clock(self) -> float:
        return self.now

    def step(self) -> None:
        self.steps += 1
        self.now += self.seconds[torch.get_num_threads()] * (10 if self.steps in self.stalls else 1)

    def answer(self) -> int:
        return faster_of(self.step, 2, self.clock)


@pytest.mark.parametrize(
    ("one", "two", "chosen"),
    [(0.057, 0.037, 2), (0.056, 0.124, 1), (0.050, 0.050, 2), (0.046, 0.050, 2), (0.044, 0.050, 1)],
    ids=["quiet", "busy", "equal", "a tie", "clearly faster"],
)
def test_one_thread_is_chosen_only_where_it_is_clearly_faster(one: float, two: float, chosen: int) -> None:
    assert Machine({1: one, 2: two}).answer() == chosen


@pytest.mark.parametrize("stalls", [(1, 2), (5,), (3, 8), (4, 6)])
def test_a_few_slow_steps_change_nothing(stalls: tuple[int, ...]) -> None:
    """The first round warms up, and medians are compared."""
    assert Machine({1: 0.010, 2: 0.007}, stalls).answer() == 2
    assert Machine({1: 0.007, 2: 0.010}, stalls).answer() == 1


def test_a_measurement_is_short() -> None:
    """Small models make a few rounds, fewer where all agree; large ones a single step with each number."""
    small, large = Machine({1: 0.01, 2: 0.01}), Machine({1: 20.0, 2: 10.0})
    assert (small.answer(), large.answer()) == (2, 2)
    assert small.steps == 2 * (1 + ROUNDS)
    assert large.steps == 2
    for clear in (Machine({1: 0.057, 2: 0.037}), Machine({1: 0.056, 2: 0.124})):
        clear.answer()
        assert clear.steps == 2 * (1 + FEWEST_ROUNDS)
    middle = Machine({1: 0.2, 2: 0.2})
    middle.answer()
    assert middle.now < ENOUGH_SECONDS + 0.4 + 1e-6


def parts(tmp_path: Path, precision: str = "32-true") -> tuple[pl.Trainer, LitGPT, TextDataModule]:
    """A Trainer, a model and its data, before training."""
    data = TextDataModule(str(PLAY), block_size=16, batch_size=8)
    data.prepare_data()
    data.setup("fit")
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=4, logger=False, precision=precision, default_root_dir=tmp_path
    )  # type: ignore[arg-type]
    return trainer, LitGPT(GPTConfig(**SIZE), OptimizerConfig(name="adamw"), matmul_precision="medium"), data


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_a_measurement_leaves_no_trace(tmp_path: Path, precision: str) -> None:
    trainer, module, data = parts(tmp_path, precision)
    torch.set_num_threads(2)
    state = torch.get_rng_state()
    assert fastest_threads(trainer, module, data) in (1, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == 2
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_default_dtype() == torch.float32
    assert module.net is None


def test_settings_alone_decide_whether_a_run_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, module, data = parts(tmp_path)
    flops = 128 * (6 * (12 * 16 * 16 + module.gpt.n_embd * data.tokenizer.vocab_size) + 12 * 16 * 16)
    steps = int(threads.LEAST_TERAFLOPS * 1e12 / flops)
    assert not measuring_pays(module, data, steps - 1)
    assert measuring_pays(module, data, steps + 1)


def test_large_batches_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To a size that takes a fraction of a second, and at least one sequence."""
    trainer, module, data = parts(tmp_path)
    seen: list[int] = []
    monkeypatch.setattr(threads, "GPT", lambda config: Watched(threads.meta_model(config), seen))
    monkeypatch.setattr(torch.autograd, "grad", lambda *_, **__: None)
    for limit in (1e12, 3.5e6, 1.0):
        monkeypatch.setattr(threads, "LARGEST_STEP", limit)
        threads.one_step(trainer, module, data)()
    assert seen == [8, *seen[1:2], 1]
    assert 1 < seen[1] < 8


class Watched(torch.nn.Module):
    """Notes the rows of each batch."""

    def __init__(self, network: torch.nn.Module, seen: list[int]) -> None:
        super().__init__()
        self.network, self.seen, self.config = network, seen, network.config

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        assert ids.shape == targets.shape
        self.seen.append(len(ids))
        return torch.zeros(())
