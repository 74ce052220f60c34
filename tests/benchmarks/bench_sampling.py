"""Characters per second of sampling, next to nanoGPT's sampler on the same weights, and the memory limit.

    python tests/benchmarks/bench_sampling.py --threads 2 --peer PATH/TO/nanoGPT
    python tests/benchmarks/bench_sampling.py --threads 1 --sizes scaled --weights model bfloat16 int8
    python tests/benchmarks/bench_sampling.py --loss CHECKPOINT --text tinyshakespeare.txt
    python tests/benchmarks/bench_sampling.py --rounding CHECKPOINT --text tinyshakespeare.txt

The first prints one line per size, number of samples and length. The limit is the bytes that a step must read (every
weight once, and the keys and values of each row) over the bandwidth of a large copy, both directions counted, measured
in the same run. It is no limit on a GPU whose second-level cache holds all weights. What a text costs once, such as
capturing CUDA graphs, is part of its time; what a process costs once, such as loading kernels, is not. The second
compares types of the weights (`predict --weights_dtype`), in turn, by CPU time. The third measures what
`--context rolling` changes in the loss, the last what rounded weights change in log-probabilities and greedy text.
"""

import argparse
import importlib.util
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from gptlit.checkpoint.files import read_checkpoint
from gptlit.checkpoint.network import load_network
from gptlit.device.memory import keep_freed_memory
from gptlit.generation.engine.decoder import Decoder
from gptlit.generation.engine.small_weights import WeightsDtype
from gptlit.generation.generate import Sampling, generate
from gptlit.model.config import GPTConfig
from gptlit.model.gpt import GPT

DIALECT: dict[str, Any] = {
    "vocab_size": 65,
    "position": "learned",
    "norm": "layernorm",
    "activation": "gelu",
    "qk_norm": False,
    "tie_weights": True,
    "init": "scaled",
}
SIZES = {
    "base": GPTConfig(block_size=64, n_layer=4, n_head=4, n_embd=128, **DIALECT),
    "scaled": GPTConfig(block_size=256, n_layer=6, n_head=6, n_embd=384, **DIALECT),
}


@dataclass
class Line:
    """One line of the table. Rates are characters per second, all samples together."""

    size: str
    samples: int
    characters: int
    context: str
    ours: float
    peer: float | None
    ratio: float | None
    limit: float
    of_limit: float


def clock(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that `work` takes."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def copy_bandwidth(device: torch.device) -> float:
    """Return bytes per second, read and written, of a copy of 256 MB, which fits no cache."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    seconds = min(clock(lambda: target.copy_(source), device) for _ in range(8))
    return 2 * source.numel() * source.element_size() / seconds


def step_bytes(model: GPT, samples: int, mean_context: float) -> float:
    """Return the bytes that a step must read: every weight of a matmul once, and each row's keys and values."""
    config = model.config
    tables = model.transformer["wpe"].weight.numel() if "wpe" in model.transformer else 0
    weights = sum(parameter.numel() for parameter in model.parameters()) - tables
    return 4 * (weights + samples * 2 * config.n_layer * config.n_embd * mean_context)


def load_peer(folder: Path) -> ModuleType:
    """Import model.py of nanoGPT."""
    spec = importlib.util.spec_from_file_location("peer_model", folder / "model.py")
    if spec is None or spec.loader is None:
        raise SystemExit(f"--peer: no model.py in {folder}")
    module = sys.modules["peer_model"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def twin(module: ModuleType, model: GPT) -> torch.nn.Module:
    """Return nanoGPT's model with the weights of `model`; raise an error unless their logits are equal."""
    names = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    peer = module.GPT(module.GPTConfig(**{name: getattr(model.config, name) for name in names})).eval()
    peer.load_state_dict(model.state_dict())
    peer.to(next(model.parameters()).device)
    ids = torch.randint(65, (2, model.config.block_size), device=next(model.parameters()).device)
    with torch.no_grad():
        torch.testing.assert_close(model(ids)[:, -1:], peer(ids)[0], atol=1e-4, rtol=1e-4)
    return peer


def peer_seconds(peer: torch.nn.Module, block_size: int, samples: int, characters: int, budget: float) -> float:
    """Return the seconds that nanoGPT takes for `characters` after one character.

    Its cost of a character depends only on the length of the context. So a run longer than `budget` seconds is
    extrapolated from the cost at evenly spaced lengths, and at the full window beyond it.
    """
    device = next(peer.parameters()).device

    def seconds(context: int, new: int) -> float:
        prompt = torch.zeros(samples, context, dtype=torch.long, device=device)
        return clock(lambda: peer.generate(prompt, new), device)

    inside = min(characters, block_size)
    lengths = [max(1, round((i + 0.5) * inside / 8)) for i in range(8)]
    seconds(1, 1)
    full = min(seconds(block_size, 1), seconds(block_size, 1)) if characters > inside else 0.0
    total = statistics.fmean(seconds(length, 1) for length in lengths) * inside + full * (characters - inside)
    return seconds(1, characters) if total < budget else total


def our_seconds(model: GPT, samples: int, characters: int, context: str, budget: float) -> float:
    """Return the seconds that `generate` takes; a long run with `exact` is extrapolated as nanoGPT's is."""
    device, block = next(model.parameters()).device, model.config.block_size

    def seconds(prompt: int, new: int) -> float:
        steps = generate(model, [[0] * prompt], new, num_samples=samples, context=context)  # type: ignore[arg-type]
        return clock(lambda: [ids.tolist() for ids in steps], device)

    if characters > block and context == "exact":
        # The first id after a full window is read with the prompt; the difference is whole windows. On a GPU such a
        # text is captured, and so must these be.
        few, more = (1, 5) if device.type == "cpu" else (40, 80)
        step = (seconds(block, more) - seconds(block, few)) / (more - few)
        if step * characters > budget:
            return seconds(1, block) + step * (characters - block)
    return seconds(1, characters)


def measure(size: str, samples: int, characters: int, context: str, options: argparse.Namespace) -> Line:
    """Alternates nanoGPT and us, and compares the medians."""
    device = torch.device(options.device)
    torch.manual_seed(0)
    model = GPT(SIZES[size]).to(device).eval()
    peer = twin(load_peer(options.peer), model) if options.peer else None
    block = model.config.block_size
    warm_up = 16 if device.type == "cpu" else block + 40  # on a GPU, through every kernel of the text to come
    our_seconds(model, samples, min(characters, warm_up), context, math.inf)
    if peer is not None and device.type != "cpu":
        peer_seconds(peer, block, samples, characters, 0)
    mine, theirs = [], []
    for _ in range(options.repeats):
        if peer is not None:
            theirs.append(peer_seconds(peer, block, samples, characters, options.budget))
        mine.append(our_seconds(model, samples, characters, context, options.budget))
    ours = samples * characters / statistics.median(mine)
    rate = samples * characters / statistics.median(theirs) if theirs else None
    mean_context = characters / 2 if characters <= block else 0.75 * block
    limit = samples * copy_bandwidth(device) / step_bytes(model, samples, mean_context)
    return Line(size, samples, characters, context, ours, rate, ours / rate if rate else None, limit, ours / limit)


# ---------------------------------------------------------------- weights in bfloat16 and int8


def report_weights(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Print the speed of each type of the weights: medians of CPU time, and of the ratios to the first type.

    One round runs every type once, in turn, so that a ratio compares neighbours in time.
    """
    print("size    samples  characters  context   weights   characters/s of CPU time  ratio (least … greatest)")
    lines = []
    for size, samples, characters in product(options.sizes, options.samples, options.characters):
        torch.manual_seed(0)
        model = GPT(SIZES[size]).eval()
        for dtype in options.weights:
            cpu_seconds(model, samples, 16, options.contexts[-1], dtype)  # warms up
        rounds = [
            [cpu_seconds(model, samples, characters, options.contexts[-1], dtype) for dtype in options.weights]
            for _ in range(options.repeats)
        ]
        for number, dtype in enumerate(options.weights):
            rate = samples * characters / statistics.median(seconds[number] for seconds in rounds)
            ratios = sorted(seconds[0] / seconds[number] for seconds in rounds)
            print(
                f"{size:7s} {samples:7d}  {characters:10d}  {options.contexts[-1]:8s}  {dtype:8s}  {rate:24.0f}  "
                f"{statistics.median(ratios):5.2f} ({ratios[0]:.2f} … {ratios[-1]:.2f})",
                flush=True,
            )
            line = {"size": size, "samples": samples, "characters": characters, "weights": dtype}
            lines.append({**line, "rate": rate, "ratios": ratios})
    return lines


def cpu_seconds(model: GPT, samples: int, characters: int, context: str, weights: str) -> float:
    """Return the CPU time of this process for a text."""
    start = time.process_time()
    steps = generate(
        model,
        [[0]],
        characters,
        num_samples=samples,
        context=context,  # type: ignore[arg-type]
        weights_dtype=None if weights == "model" else weights,  # type: ignore[arg-type]
    )
    for ids in steps:
        ids.tolist()
    return time.process_time() - start


@torch.inference_mode()
def scores(model: GPT, tokens: Tensor, weights: WeightsDtype | None, rows: int) -> tuple[Tensor, Tensor]:
    """Read a text in windows of block_size, token by token in batches of `rows`, as sampling does.

    Returns:
        The log-probability of each token but the first of a window in nats, and the most probable token there.
    """
    decoder, block = Decoder(model, rows, weights), model.config.block_size
    kept, best = [], []
    for ids in tokens.unfold(0, block + 1, block).split(rows):  # (rows, block_size + 1)
        cache = decoder.new_cache(len(ids), block)
        logits = decoder(ids[:, :1], cache=cache)  # (rows, V)
        for t in range(1, block + 1):
            kept.append(logits.double().log_softmax(1).gather(1, ids[:, t : t + 1])[:, 0])
            best.append(logits.argmax(1))
            if t < block:
                logits = decoder.step(ids[:, t], cache)
    return torch.cat(kept), torch.cat(best)


def report_rounding(checkpoint: Path, text: Path, characters: int, greedy: int) -> dict[str, Any]:
    """Print what rounded weights change: log-probabilities of the last tenth of a text, and greedy text."""
    model, tokenizer = load_network(read_checkpoint(checkpoint))
    whole = text.read_text(encoding="utf-8")
    tokens = torch.tensor(tokenizer.encode(whole[int(0.9 * len(whole)) :][:characters]))
    result: dict[str, Any] = {}
    if characters > model.config.block_size:
        exact, most_probable = scores(model, tokens, None, 8)
        result["log_probability"] = float(exact.mean())
        print(f"{checkpoint}: {exact.mean():.5f} nats per token over {len(exact):,} tokens with the model's weights")
        for dtype in get_args(WeightsDtype):
            got, best = scores(model, tokens, dtype, 8)
            change, error = float((got - exact).mean()), float((got - exact).std()) / math.sqrt(len(got))
            rms, agree = float((got - exact).square().mean().sqrt()), float((best == most_probable).double().mean())
            result[dtype] = {"change": change, "standard_error": error, "rms": rms, "same_most_probable": agree}
            print(
                f"{dtype}: {change:+.6f} ± {error:.6f} nats per token (root mean square {rms:.4f}), "
                f"the most probable token is the same at {agree:.2%} of the positions",
                flush=True,
            )
    expected: list[int] = []
    for dtype in (None, *get_args(WeightsDtype)):
        steps = generate(model, [tokens[:1]], greedy, Sampling(temperature=0), weights_dtype=dtype)
        ids = [int(step) for step in steps]
        expected = expected or ids
        equal = next((i for i, (a, b) in enumerate(zip(ids, expected, strict=True)) if a != b), greedy)
        result[f"greedy, {dtype}"] = equal
        print(f"greedy text, weights {dtype or 'of the model'}: the first {equal:,} of {greedy:,} tokens are equal")
    return result


# ---------------------------------------------------------------- what rolling costs


@torch.inference_mode()
def loss_by_context(model: GPT, tokens: Tensor, stride: int) -> Tensor:
    """Return the mean loss (block_size,) in nats per token of targets with 1, 2, … block_size tokens of context.

    Windows of block_size tokens start at every `stride`-th token, so that each context length sees the whole text.
    """
    block = model.config.block_size
    windows = tokens.unfold(0, block + 1, stride)  # (N, block_size + 1)
    total = torch.zeros(block, dtype=torch.float64)
    for batch in windows.split(256):
        logits = model(batch[:, :-1]).transpose(1, 2)  # (n, V, block_size)
        total += F.cross_entropy(logits, batch[:, 1:], reduction="none").sum(0, dtype=torch.float64)
    return total / len(windows)


def report_loss(checkpoint: Path, text: Path, stride: int) -> dict[str, float]:
    """Print what `rolling` changes in the loss over the last tenth of a text.

    The context of `exact` is always block_size; that of `rolling` goes evenly from half of it to all of it.
    """
    model, tokenizer = load_network(read_checkpoint(checkpoint))
    characters = text.read_text(encoding="utf-8")
    tokens = torch.tensor(tokenizer.encode(characters[int(0.9 * len(characters)) :]))
    loss = loss_by_context(model, tokens, stride)
    block = model.config.block_size
    half = max(block // 2, 1)
    exact, rolling, worst = float(loss[-1]), float(loss[half - 1 :].mean()), float(loss[half - 1])
    print(
        f"{checkpoint}: exact {exact:.4f} nats per token, rolling {rolling:.4f} ({rolling - exact:+.4f}), "
        f"just after a roll {worst:.4f} ({worst - exact:+.4f})"
    )
    return {"exact": exact, "rolling": rolling, "worst": worst}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="folder of nanoGPT, to time it too")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--samples", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--characters", nargs="+", type=int, default=[500, 5000])
    parser.add_argument("--contexts", nargs="+", default=["exact", "rolling"], choices=["exact", "rolling"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--budget", type=float, default=10.0, help="seconds beyond which a run is extrapolated")
    parser.add_argument("--threads", type=int, help="torch threads; default: torch's own choice")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the table here too")
    parser.add_argument("--loss", type=Path, metavar="CHECKPOINT", help="measure what rolling costs this model")
    parser.add_argument("--text", type=Path, help="text whose last tenth --loss and --rounding read")
    parser.add_argument(
        "--weights", nargs="+", choices=["model", "bfloat16", "int8"], help="compare types of the weights on a CPU"
    )
    parser.add_argument("--rounding", type=Path, metavar="CHECKPOINT", help="measure what rounded weights change")
    parser.add_argument("--tokens", type=int, default=50_000, help="characters of the text that --rounding reads")
    parser.add_argument("--greedy", type=int, default=10_000, help="tokens of greedy text of --rounding")
    parser.add_argument("--stride", type=int, default=1, help="tokens between two windows of --loss")
    options = parser.parse_args()
    keep_freed_memory()  # as `gptlit predict` does
    if options.threads:
        torch.set_num_threads(options.threads)
    result: dict[str, Any] = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else options.device,
    }
    if options.loss:
        if not options.text:
            parser.error("--loss needs --text")
        result["loss"] = report_loss(options.loss, options.text, options.stride)
    elif options.rounding:
        if not options.text:
            parser.error("--rounding needs --text")
        result["rounding"] = report_rounding(options.rounding, options.text, options.tokens, options.greedy)
    elif options.weights:
        result["lines"] = report_weights(options)
    else:
        result["copy_bandwidth"] = copy_bandwidth(torch.device(options.device))
        print(f"{result['device']}, {result['threads']} threads, copy {result['copy_bandwidth'] / 1e9:.1f} GB/s")
        print("size    samples  characters  context   ours/s    nanoGPT/s  ratio   limit/s   of it")
        result["lines"] = []
        for size in options.sizes:
            for samples in options.samples:
                for characters in options.characters:
                    inside = characters <= SIZES[size].block_size
                    for context in ["exact"] if inside else options.contexts:
                        line = measure(size, samples, characters, context, options)
                        peer = f"{line.peer:9.1f}  {line.ratio:5.1f}" if line.peer and line.ratio else " " * 16
                        print(
                            f"{size:7s} {samples:7d}  {characters:10d}  {'inside' if inside else context:8s}"
                            f"{line.ours:8.0f}    {peer}  {line.limit:8.0f}   {line.of_limit:4.0%}",
                            flush=True,
                        )
                        result["lines"].append(asdict(line))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
