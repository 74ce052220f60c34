"""Subjects of the benchmarks: packaged configurations in a plain training loop, and nanoGPT's own step."""

import contextlib
import io
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from torch import Tensor

from gptlit import GPT, GPTConfig, LitGPT, OptimizerConfig, RandomChunks, ScheduleConfig, TextDataModule
from gptlit.cli.fit.precision import fastest_precision
from gptlit.cli.packaged import packaged_configs
from gptlit.optim import build_optimizer
from gptlit.training.compiling import Mode, compile_training

Step = Callable[[], None]
Compiled = Literal["no", "parts", "whole"]


def read_config(name: str, gpt: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return a packaged configuration; `gpt` overrides settings of the model. Precision auto is resolved."""
    config: dict[str, Any] = yaml.safe_load((packaged_configs() / f"{name}.yaml").read_text(encoding="utf-8"))
    config["model"]["gpt"] |= gpt or {}
    if config["trainer"].get("precision") == "auto":
        config["trainer"]["precision"] = fastest_precision({"accelerator": "auto"})
    return config


def build(config: Mapping[str, Any], text: Path, device: str = "cpu") -> tuple[LitGPT, TextDataModule]:
    """Return the model, on its device, and the data of a configuration."""
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
    return module.to(device), data


def plain_step(
    config: Mapping[str, Any],
    module: LitGPT,
    data: TextDataModule,
    compiled: Compiled = "no",
    mode: Mode = "default",
) -> Step:
    """Return one step of a plain PyTorch loop over the same model, data, optimizer and precision."""
    assert isinstance(data.train_tokens, Tensor)
    chunks = RandomChunks(data.train_tokens.to(module.device), data.block_size, data.batch_size, 1)
    with matmul_precision_as(module.matmul_precision):
        return step_of(module.network, chunks, module.optimizer_config, config["trainer"], compiled, mode)


def step_of(
    network: GPT,
    chunks: RandomChunks,
    optimizer_config: OptimizerConfig,
    trainer: Mapping[str, Any],
    compiled: Compiled = "no",
    mode: Mode = "default",
) -> Step:
    """Return one step: forward, backward, clipping and update.

    Args:
        network: on its device.
        chunks: batches.
        optimizer_config: the optimizer.
        trainer: settings of the Trainer; precision and gradient_clip_val are used.
        compiled: not, in parts as the command does, or as one graph.
        mode: of torch.compile.
    """
    device = next(network.parameters()).device
    optimizer = build_optimizer(network, optimizer_config, fused=True)
    clip, bf16 = trainer.get("gradient_clip_val"), trainer.get("precision") == "bf16-mixed"
    step = 0

    def loss_fn(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return network(inputs, targets=targets)

    network.train()
    if compiled == "parts":
        print(compile_training(network, lambda: loss_fn(*chunks[0]), mode), file=sys.stderr)
    run = torch.compile(loss_fn, mode=mode) if compiled == "whole" else loss_fn

    def one() -> None:
        nonlocal step
        torch.compiler.cudagraph_mark_step_begin()
        loss = run(*chunks[step])
        step += 1
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(network.parameters(), clip)
        optimizer.step()

    return one


def peer_step(
    peer: Path,
    tokens: np.ndarray,
    vocab_size: int,
    config: Mapping[str, Any],
    device: str = "cpu",
    compiled: bool = False,
) -> Step:
    """Return one step of nanoGPT at the sizes of a configuration, with its own model, optimizer and batch function.

    bfloat16 on a GPU, float32 on a CPU, as in its train.py.
    """
    gpt, settings = config["model"]["gpt"], config["model"]["optimizer"]
    block, batch = gpt["block_size"], config["data"]["batch_size"]
    names = ("block_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    sizes = {"dropout": 0.0, "bias": False, **{name: gpt[name] for name in names if name in gpt}}
    sys.path.insert(0, str(peer))
    with contextlib.redirect_stdout(io.StringIO()):
        import model as peer_module

        model = peer_module.GPT(peer_module.GPTConfig(vocab_size=vocab_size, **sizes)).to(device)
        optimizer = model.configure_optimizers(
            settings["weight_decay"], settings["lr"], tuple(settings["betas"]), device
        )
    sys.path.remove(str(peer))
    running = torch.compile(model) if compiled else model

    def batch_of() -> tuple[Tensor, ...]:
        starts = torch.randint(len(tokens) - block, (batch,)).tolist()
        inputs = torch.stack([torch.from_numpy(tokens[i : i + block].astype(np.int64)) for i in starts])
        targets = torch.stack([torch.from_numpy(tokens[i + 1 : i + 1 + block].astype(np.int64)) for i in starts])
        if device == "cpu":
            return inputs, targets
        return tuple(part.pin_memory().to(device, non_blocking=True) for part in (inputs, targets))

    batch_ahead = batch_of()

    def one() -> None:
        nonlocal batch_ahead
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            _, loss = running(*batch_ahead)
        batch_ahead = batch_of()  # as in train.py, while a GPU computes the forward pass
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return one


def encode(text: Path) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """Return both parts of a text as nanoGPT's `prepare.py` does, uint16, and the id of each character."""
    characters = text.read_text(encoding="utf-8")
    numbers = {character: number for number, character in enumerate(sorted(set(characters)))}
    tokens = np.array([numbers[character] for character in characters], dtype=np.uint16)
    cut = int(0.9 * len(tokens))
    return tokens[:cut], tokens[cut:], numbers


def matmul_peak(device: str = "cpu", dtype: torch.dtype = torch.float32, size: int = 2048, tries: int = 10) -> float:
    """Return the speed of the fastest of several square matmuls, in FLOP/s, at the current precision."""
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(tries):
        best = min(best, timed(lambda: a @ b, device))
    return 2.0 * size**3 / best


def timed(action: Callable[[], Any], device: str, calls: int = 1) -> float:
    """Return the mean seconds of `calls` calls, with the device synchronised."""
    wait(device)
    started = time.perf_counter()
    for _ in range(calls):
        action()
    wait(device)
    return (time.perf_counter() - started) / calls


def wait(device: str) -> None:
    """Synchronise the device."""
    if device == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def matmul_precision_as(precision: str) -> Any:
    """Set the precision of float32 matrix multiplications inside the context."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
