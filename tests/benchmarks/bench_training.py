"""Training beside nanoGPT: the same machine, the same threads, in turn; medians and ratios.

    python tests/benchmarks/bench_training.py --text input.txt --peer path/to/nanoGPT [--threads 2] [--json FILE]

Measures the step of `configs/nanogpt_cpu.yaml` against nanoGPT's own model, optimizer and batch function at the same
settings; the step of `configs/base.yaml`; the machine's matrix-multiply peak; and what the Trainer adds to a bare loop.
Without --peer, ours alone. Nothing of the peer is kept.
"""

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import yaml
from torch.nn import functional as F

from gptlit import GPTConfig, LitGPT, OptimizerConfig, ScheduleConfig, TextDataModule
from gptlit.callbacks.curves import Curves
from gptlit.cli.settings import packaged_configs
from gptlit.cli.training import keep_freed_memory
from gptlit.data import RandomChunks
from gptlit.optim import build_optimizer


def matmul_peak(size: int = 1024) -> float:
    """Best of 20 square float32 products, in GFLOP/s, at the precision that is set."""
    a, b = torch.randn(2, size, size)
    best = min(seconds_of(lambda: a @ b) for _ in range(20))
    return 2 * size**3 / best / 1e9


def seconds_of(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def load(name: str, text: Path) -> tuple[LitGPT, TextDataModule, dict[str, Any]]:
    """Model and data of a packaged configuration, built."""
    config = yaml.safe_load((packaged_configs() / f"{name}.yaml").read_text())
    model = config["model"]
    module = LitGPT(
        GPTConfig(**model["gpt"]),
        OptimizerConfig(**model["optimizer"]),
        ScheduleConfig(**model["schedule"]),
        matmul_precision=model.get("matmul_precision", "highest"),
    )
    data = TextDataModule(str(text), block_size=module.gpt.block_size, batch_size=config["data"]["batch_size"])
    data.setup()
    module.tokenizer = data.tokenizer
    module.configure_model()
    return module, data, config


def bare_step(module: LitGPT, data: TextDataModule, clip: float | None) -> Callable[[], None]:
    """One step of a plain PyTorch loop over the same model, data and optimizer."""
    chunks = RandomChunks(data.train_tokens, data.block_size, data.batch_size, 1)
    optimizer = build_optimizer(module.network, module.optimizer_config, fused=True)
    step = 0

    def one() -> None:
        nonlocal step
        inputs, targets = chunks[step]
        step += 1
        loss = F.cross_entropy(module.network(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(module.network.parameters(), clip)
        optimizer.step()

    return one


def peer_step(peer: Path, text: Path) -> Callable[[], None]:
    """One step of nanoGPT at its settings for a CPU, with its own model, optimizer and way of cutting batches."""
    sys.path.insert(0, str(peer))
    with contextlib.redirect_stdout(io.StringIO()):
        import model as theirs

        settings = theirs.GPTConfig(
            block_size=64, vocab_size=65, n_layer=4, n_head=4, n_embd=128, dropout=0.0, bias=False
        )
        model = theirs.GPT(settings)
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    characters = text.read_text(encoding="utf-8")
    numbers = {character: number for number, character in enumerate(sorted(set(characters)))}
    tokens = np.array([numbers[c] for c in characters[: int(0.9 * len(characters))]], dtype=np.uint16)

    def one() -> None:
        starts = torch.randint(len(tokens) - 64, (12,)).tolist()
        inputs = torch.stack([torch.from_numpy(tokens[i : i + 64].astype(np.int64)) for i in starts])
        targets = torch.stack([torch.from_numpy(tokens[i + 1 : i + 65].astype(np.int64)) for i in starts])
        _, loss = model(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return one


def in_turn(steps: dict[str, tuple[Callable[[], None], str]], rounds: int, each: int) -> dict[str, list[float]]:
    """Seconds per step of each, measured in turn: A B C A B C …; every one at its own precision of products."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, (one, precision) in steps.items():
            torch.set_float32_matmul_precision(precision)
            took = seconds_of(lambda one=one: [one() for _ in range(each)]) / each
            if number:  # the first round warms up
                times[name].append(took)
    torch.set_float32_matmul_precision("highest")
    return times


def trainer_seconds(name: str, text: Path, steps: int) -> float:
    """Seconds per step inside the Trainer, with curves logged every ten steps, as the clock of `Curves` counts."""
    module, data, config = load(name, text)
    data = TextDataModule(str(text), block_size=module.gpt.block_size, batch_size=config["data"]["batch_size"])
    curves = Curves()
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=steps,
            callbacks=[curves],
            logger=False,
            log_every_n_steps=10,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            gradient_clip_val=config["trainer"].get("gradient_clip_val"),
            default_root_dir=folder,
        )
        trainer.fit(module, datamodule=data)
    return curves.training_seconds / steps


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--each", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()

    steps: dict[str, tuple[Callable[[], None], str]] = {}
    flops: dict[str, float] = {}
    for name in ("nanogpt_cpu", "base"):
        module, data, config = load(name, options.text)
        clip = config["trainer"].get("gradient_clip_val")
        steps[f"gptlit {name}"] = (bare_step(module, data, clip), module.matmul_precision)
        parameters = sum(p.numel() for p in module.network.parameters())
        flops[f"gptlit {name}"] = 6 * parameters * data.batch_size * data.block_size
        if name == "nanogpt_cpu":
            steps["gptlit nanogpt_cpu, medium"] = (bare_step(load(name, options.text)[0], data, clip), "medium")
            flops["gptlit nanogpt_cpu, medium"] = flops[f"gptlit {name}"]
    if options.peer:
        steps["nanoGPT"] = (peer_step(options.peer, options.text), "highest")
        flops["nanoGPT"] = flops["gptlit nanogpt_cpu"]
    times = in_turn(steps, options.rounds, options.each)
    peaks = {}
    for precision in ("highest", "medium"):
        torch.set_float32_matmul_precision(precision)
        peaks[precision] = matmul_peak()
    torch.set_float32_matmul_precision("highest")
    reference = statistics.median(times["nanoGPT"]) if options.peer else None
    print(f"{options.threads} threads; products {peaks['highest']:.0f} GFLOP/s, medium {peaks['medium']:.0f} GFLOP/s")
    print("| step of 12 × 64 characters | median, ms | min | max | characters/s | of peak | nanoGPT's time / this |")
    print("|---|---|---|---|---|---|---|")
    for name, seconds in times.items():
        median = statistics.median(seconds)
        share = flops[name] / median / 1e9 / peaks[steps[name][1]]
        ratio = f"{reference / median:.2f}" if reference else ""
        row = (f"{median * 1e3:.1f}", f"{min(seconds) * 1e3:.1f}", f"{max(seconds) * 1e3:.1f}", f"{768 / median:,.0f}")
        print(f"| {name} | {' | '.join(row)} | {share:.0%} | {ratio} |")
    overhead = trainer_seconds("base", options.text, 200) / statistics.median(times["gptlit base"]) - 1
    print(f"the Trainer adds {overhead:.1%} to the bare loop at base size")
    if options.json:
        result = SimpleNamespace(threads=options.threads, peaks=peaks, seconds=times, overhead=overhead)
        options.json.write_text(json.dumps(vars(result), indent=1))


if __name__ == "__main__":
    main()
