"""GPT-2's size: the published parameter count, training at reduced depth, and memory with and without recomputation."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from command import PLAY, gptlit, load, start, tensors, write_config
from torch.nn import functional as F

from gptlit import GPT, GPTConfig, OptimizerConfig
from gptlit.cli.fit.messages import count_numbers, in_bytes
from gptlit.cli.packaged import packaged_configs
from gptlit.optim import build_optimizer

CONFIG = yaml.safe_load((packaged_configs() / "gpt2.yaml").read_text())
REDUCED = (
    *("--model.gpt.n_layer", 2, "--model.gpt.n_embd", 48, "--model.gpt.block_size", 64, "--model.compile", "false"),
    *("--data.corpus", PLAY, "--data.val_fraction", 0.1, "--data.vocab_size", 300, "--data.batch_size", 80),
    *("--trainer.max_steps", 2, "--trainer.val_check_interval", 2, "--trainer.accelerator", "cpu"),
    *("--trainer.log_every_n_steps", 1, "--model.schedule.warmup_steps", 0, "--sample_text.max_new_tokens", 5),
    *("--pictures.when", "never"),
)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set the working directory and the cache to empty folders."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_the_config_is_the_published_model() -> None:
    """124,439,808 parameters, as `transformers` counts GPT-2, and nanoGPT's half million tokens a step."""
    config = GPTConfig(**CONFIG["model"]["gpt"], vocab_size=50257)
    assert count_numbers(config, OptimizerConfig(name="adamw"))[0] == 124_439_808
    micro = CONFIG["data"]["batch_size"] / CONFIG["trainer"]["accumulate_grad_batches"]
    assert micro == 12
    assert CONFIG["data"]["batch_size"] * config.block_size == 491_520


def test_it_trains_at_reduced_depth(here: Path) -> None:
    """The configuration file with the command: BPE, accumulation, bfloat16, clipping, a checkpoint at the end."""
    run = gptlit("fit", "--config", "gpt2", *REDUCED, "--trainer.accumulate_grad_batches", 4, "--data.batch_size", 8)
    assert run.code == 0, run.err
    losses = [float(line.split(",")[1]) for line in metric(here / "checkpoints" / "gpt2-play", "train/loss")]
    assert len(losses) == 2
    assert all(4 < loss < 7 for loss in losses)  # near ln 300 = 5.7
    checkpoint = load(here / "checkpoints" / "gpt2-play" / "last.ckpt")
    assert checkpoint["global_step"] == 2
    assert checkpoint["hyper_parameters"]["gpt"]["vocab_size"] == 300
    assert checkpoint["state_dict"]["net.transformer.h.0.attn.c_attn.bias"].abs().max() > 0  # GPT-2's qkv bias learns


def metric(run: Path, name: str) -> list[str]:
    """Return `step,value` of a metric, for the steps that have it."""
    header, *rows = (line.split(",") for line in (run / "metrics.csv").read_text().splitlines())
    column = header.index(name)
    return [f"{row[0]},{row[column]}" for row in rows if row[column]]


def test_fit_prints_the_size_of_a_step_and_of_the_model(here: Path) -> None:
    """With the numbers of this run, not the defaults."""
    run = gptlit("fit", "--config", "gpt2", *REDUCED, "--trainer.fast_dev_run", "true")
    lines = dict(re.findall(r"^(\w[\w ]*?)  +(.*)$", run.err, flags=re.MULTILINE))
    assert lines["step"] == "2 sequences × 40 accumulation × 64 tokens = 5,120 tokens per step"
    config = GPTConfig(**{**CONFIG["model"]["gpt"], "n_layer": 2, "n_embd": 48, "block_size": 64}, vocab_size=300)
    parameters = sum(p.numel() for p in GPT(config).parameters())
    size = in_bytes(16 * parameters)
    assert lines["model"] == f"{parameters:,} parameters, {size} with gradients and optimizer state"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_printed_memory_is_the_memory_in_use(optimizer: str) -> None:
    """Counted in tensors after a real step: weights, gradients and optimizer state."""
    config = GPTConfig(vocab_size=30, block_size=16, n_layer=2, n_head=2, n_embd=32, bias=True)
    settings = OptimizerConfig(name=optimizer)  # type: ignore[arg-type]
    model = GPT(config)
    made = build_optimizer(model, settings, fused=False)
    model(torch.zeros(1, 16, dtype=torch.int64)).sum().backward()
    made.step()
    state = sum(t.numel() for _, t in tensors(made.state_dict()["state"]) if t.dim())
    parameters = sum(p.numel() for p in model.parameters())
    gradients = sum(p.grad.numel() for p in model.parameters() if p.grad is not None)
    assert count_numbers(config, settings) == (parameters, parameters + gradients + state)


@pytest.mark.parametrize(("count", "text"), [(999, "999 bytes"), (12_849_152, "12.8 MB"), (1.99e9, "2.0 GB")])
def test_memory_is_printed_in_readable_units(count: float, text: str) -> None:
    """Units are powers of ten."""
    assert in_bytes(count) == text


# ---------------------------------------------------------------- activation checkpointing


def gradients(config: GPTConfig, recompute: bool) -> tuple[dict[str, torch.Tensor], int]:
    """Return the gradients of a step with dropout, and the bytes saved for the backward pass."""
    torch.manual_seed(5)
    model = GPT(config).double().train()
    with torch.no_grad():  # away from the zeros that the modern dialect starts with
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.checkpoint_activations = recompute
    ids = torch.randint(config.vocab_size, (3, config.block_size + 1))
    kept = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    torch.manual_seed(6)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, kept


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_recomputed_activations_give_the_same_gradients(dialect: GPTConfig, dropout: float) -> None:
    """In every dialect, with the same dropout masks in the recomputation, bit-exactly."""
    config = replace(dialect, dropout=dropout, attention_dropout=dropout, embedding_dropout=dropout)
    plain, recomputed = gradients(config, False)[0], gradients(config, True)[0]
    assert plain.keys() == recomputed.keys()
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_recomputation_saves_memory() -> None:
    """Guards against a switch without effect: only the input of each of six layers is saved."""
    config = GPTConfig(vocab_size=30, block_size=64, n_layer=6, n_head=4, n_embd=64)
    assert gradients(config, True)[1] < gradients(config, False)[1] / 3


def test_the_switch_reaches_the_blocks_from_the_command(monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    """With the same losses and weights in the checkpoint."""
    calls: list[object] = []
    real = torch.utils.checkpoint.checkpoint

    def counted(block: object, *arguments: object, **options: object) -> object:
        calls.append(block)
        return real(block, *arguments, **options)

    monkeypatch.setattr("gptlit.model.gpt.checkpoint", counted)
    config = write_config(here, trainer__max_steps=2)
    for name, switch in (("off", "false"), ("on", "true")):
        assert not calls
        run = gptlit("fit", "--config", config, "--run_dir", name, "--model.checkpoint_activations", switch)
        assert run.code == 0, run.err
    assert len(calls) == 2  # one block, two steps; not while validating
    off, on = (load(here / name / "last.ckpt")["state_dict"] for name in ("off", "on"))
    assert all(torch.equal(off[name], on[name]) for name in off)


# ---------------------------------------------------------------- several devices


@pytest.mark.slow
def test_sharded_training_takes_the_same_steps(here: Path) -> None:
    """FSDP2 over two processes on a CPU, as in configs/fsdp.yaml: one file, equal weights, and it can be resumed."""
    config = write_config(
        here, model__gpt__dropout=0.0, model__optimizer__name="adamw", model__schedule={"shape": "constant"}
    )
    overlay = yaml.safe_load((packaged_configs() / "fsdp.yaml").read_text())
    overlay["trainer"] |= {"accelerator": "cpu", "devices": 2}
    overlay["trainer"]["strategy"]["init_args"]["data_parallel_size"] = 2
    (here / "fsdp.yaml").write_text(yaml.safe_dump(overlay))
    assert gptlit("fit", "--config", config, "--run_dir", "single", "--trainer.max_steps", 6).code == 0
    sharded = ("--config", "fsdp.yaml")
    for arguments in (
        ("--config", config, *sharded, "--run_dir", "sharded", "--trainer.max_steps", 4),
        ("--ckpt_path", "sharded", *sharded, "--trainer.max_steps", 6),
    ):
        process = start("fit", *arguments, cwd=here)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    assert "× 2 devices ×" in err
    assert " on each device" in err
    single, parts = (load(here / name / "last.ckpt") for name in ("single", "sharded"))
    for (name, ours), (_, theirs) in zip(tensors(parts["state_dict"]), tensors(single["state_dict"]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)
