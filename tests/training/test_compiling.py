"""When the blocks are compiled, what is called then, and what happens where compiling fails."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from command import gptlit, write_config
from torch.utils.data import DataLoader, TensorDataset

from gptlit import CharTokenizer, LitGPT, OptimizerConfig
from gptlit.model.block import Block
from gptlit.model.config import GPTConfig
from gptlit.model.gpt import GPT
from gptlit.training.compiling import compile_training, compiling_pays, flops_per_token

BASE = GPTConfig(vocab_size=65, block_size=64, n_layer=4, n_head=4, n_embd=128)
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for torch.compile, which takes its time; says how often something compiled was called."""
    calls: list[str] = []

    def stand_in(self: Block, mode: str) -> None:
        def run(*arguments: Any, **named: Any) -> Any:
            calls.append("compiled")
            return self._call_impl(*arguments, **named)

        self._compiled_call_impl = run

    monkeypatch.setattr(Block, "compile", stand_in)
    return calls


def test_compiling_pays_in_long_runs_on_a_gpu_alone() -> None:
    """Guards against minutes of waiting for a run of minutes, and for a run that would not be faster."""
    assert not compiling_pays(300_000, CPU)
    assert not compiling_pays(100, GPU)
    assert compiling_pays(2000, GPU)


def test_operations_count_the_products_alone() -> None:
    """6 for each weight that multiplies; tables that are looked up multiply nothing, unless the head shares them."""
    blocks, attention = 12 * 128 * 128, 12 * 128 * 64
    assert flops_per_token(GPT(BASE)) == 6 * (4 * blocks + 65 * 128) + 4 * attention
    tied = GPTConfig(65, 64, 4, 4, 128, position="learned", norm="layernorm", tie_weights=True, init="scaled")
    assert flops_per_token(GPT(tied)) == 6 * (4 * blocks + 65 * 128) + 4 * attention


def test_what_is_compiled_serves_training_alone(compiled: list[str]) -> None:
    """Guards against a compilation for every shape that validation and sampling come with."""
    network = GPT(GPTConfig(vocab_size=5, block_size=4, n_layer=2, n_head=1, n_embd=4))
    ids = torch.zeros(1, 4, dtype=torch.int64)
    assert compile_training(network, lambda: network(ids).square().sum()).startswith("compiled in")
    assert len(compiled) == 2
    network.eval()(ids)
    assert len(compiled) == 2
    network.train()(ids)
    assert len(compiled) == 4


def test_where_compiling_fails_the_run_goes_on_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says why; nothing else changes."""

    def stand_in(self: Block, mode: str) -> None:
        def run(*arguments: Any, **named: Any) -> Any:
            raise RuntimeError("there is no\ncompiler")

        self._compiled_call_impl = run

    monkeypatch.setattr(Block, "compile", stand_in)
    config = write_config(tmp_path, trainer__max_steps=2)
    answer = gptlit("fit", "--config", config, "--run_dir", tmp_path / "run", "--model.compile", "true")
    assert answer.code == 0
    line = "not compiled (slower, same result): RuntimeError: there is no compiler\n"
    assert answer.err.count(line) == 1


def test_auto_leaves_a_short_run_as_it_is(tmp_path: Path, compiled: list[str]) -> None:
    """No line, no waiting."""
    config = write_config(tmp_path, trainer__max_steps=2)
    answer = gptlit("fit", "--config", config, "--run_dir", tmp_path / "run", "--model.compile", "auto")
    assert answer.code == 0
    assert "compiled" not in answer.err
    assert not compiled


def test_batches_of_a_dataloader_are_compiled_for(
    tmp_path: Path, compiled: list[str], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A DataLoader has no block_size: the shape is that of its first batch, and the trial draws no random numbers."""
    monkeypatch.setattr(torch, "compile", lambda function, mode: function)
    ids = torch.arange(40).reshape(4, 10) % 3
    weights = []
    for wanted in (True, False):
        gpt = GPTConfig(block_size=9, n_layer=1, n_head=1, n_embd=8, dropout=0.5, init="normal")
        module = LitGPT(gpt, OptimizerConfig("adamw"), tokenizer=CharTokenizer.train("abc").to_json(), compile=wanted)
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        trainer = pl.Trainer(accelerator="cpu", max_steps=3, max_epochs=-1, default_root_dir=tmp_path, **quiet)
        trainer.fit(module, DataLoader(TensorDataset(ids[:, :-1], ids[:, 1:]), batch_size=2))
        weights.append([weight.detach().clone() for weight in module.parameters()])
    assert capsys.readouterr().err.count("compiled in") == 1
    assert compiled == ["compiled"] * 4, "the trial and three steps"
    assert all(map(torch.equal, *weights))


@pytest.mark.slow
def test_a_compiled_run_learns_the_same_within_rounding(tmp_path: Path) -> None:
    """Through torch.compile itself, with dropout and Muon."""
    config = write_config(tmp_path)
    for name, value in (("plain", "false"), ("fast", "true")):
        answer = gptlit("fit", "--config", config, "--run_dir", tmp_path / name, "--model.compile", value)
        assert answer.code == 0
    assert "compiled in" in answer.err
    losses = [gptlit("validate", "--ckpt_path", tmp_path / name).out.split()[1] for name in ("plain", "fast")]
    assert float(losses[0]) == pytest.approx(float(losses[1]), abs=2e-3)
