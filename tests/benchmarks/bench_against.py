"""A training step of packaged configurations, in this checkout and in an older one, in turn.

    python tests/benchmarks/bench_against.py --text input.txt --against ../older-checkout [--only base minute]
                                             [--set model.optimizer.muon_interval=1] [--peer path/to/nanoGPT]
                                             [--set-older trainer.precision=32-true]

Every configuration is read from its own checkout. --set adds a third side: this checkout with some settings changed.
--set-older changes settings of the older one, for CPUs without bfloat16, which it did not look for.
--peer adds nanoGPT's step at the same sizes. Each side is a process of its own that makes some steps when it is asked
to, so that all see the same machine.
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from measuring import REPOSITORY, begin, finish, in_turn, parser, spread, table

HEADER = ("step", "median, ms", "min", "max", "older build's time / this")
# What `gptlit fit` sets: freed memory is kept for the next step.
MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 4097)}


class Side:
    """A process that makes steps of one configuration.

    Args:
        checkout: whose gptlit and configuration are used.
        name: of the configuration.
        options: of the benchmark.
        changes: settings of the configuration, as in `model.gpt.dropout=0.1`.
        peer: a checkout of nanoGPT, whose step is made instead.
    """

    def __init__(
        self, checkout: Path, name: str, options: argparse.Namespace, changes: list[str], peer: Path | None = None
    ) -> None:
        arguments = [checkout, name, options.text.resolve(), options.each, peer or "-", *changes]
        self.each = options.each
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--side", *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **MEMORY, "PYTHONPATH": str(checkout)},
        )
        self.answer()  # ready

    def answer(self) -> float:
        """Wait for a number.

        Raises:
            RuntimeError: the process has ended.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args} has ended")
        return float(line)

    def seconds(self) -> float:
        """Let it make its steps; return the mean time of one."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.answer()


def serve(checkout: str, name: str, text: str, each: str, peer: str, *changes: str) -> None:
    """Make steps whenever a line arrives, and answer with the mean seconds of one. Runs in each side's process."""
    import yaml

    sys.path.insert(0, str(Path(__file__).parent))
    config = yaml.safe_load((Path(checkout) / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))
    for change in changes:
        key, _, value = change.partition("=")
        *groups, leaf = key.split(".")
        part: dict[str, Any] = config
        for group in groups:
            part = part[group]
        part[leaf] = yaml.safe_load(value)
    step = peer_step_of(config, Path(text), Path(peer)) if peer != "-" else step_of(config, text)
    from time import perf_counter

    for _ in range(5):
        step()
    print(0.0, flush=True)
    for _ in sys.stdin:
        started = perf_counter()
        for _ in range(int(each)):
            step()
        print((perf_counter() - started) / int(each), flush=True)


def peer_step_of(config: dict[str, Any], text: Path, peer: Path) -> Any:
    """Return nanoGPT's step at the sizes of a configuration."""
    from subjects import encode, peer_step

    tokens, _, numbers = encode(text)
    return peer_step(peer, tokens, len(numbers), config)


def step_of(config: dict[str, Any], text: str) -> Any:
    """Return a training step, made with the names that every version of gptlit has."""
    import torch

    from gptlit import GPTConfig, LitGPT, OptimizerConfig, RandomChunks, ScheduleConfig, TextDataModule
    from gptlit.optim import build_optimizer

    model, trainer = config["model"], config["trainer"]
    precision = model.get("matmul_precision", "highest")
    torch.set_float32_matmul_precision(precision)
    data = TextDataModule(text, block_size=model["gpt"]["block_size"], batch_size=config["data"]["batch_size"])
    data.setup()
    parts = GPTConfig(**model["gpt"]), OptimizerConfig(**model["optimizer"]), ScheduleConfig(**model["schedule"])
    module = LitGPT(*parts, tokenizer=data.tokenizer.to_json(), matmul_precision=precision)
    module.configure_model()
    network = module.network.train()
    optimizer = build_optimizer(network, module.optimizer_config, fused=True)
    chunks = RandomChunks(data.train_tokens, data.block_size, data.batch_size, 1)
    bfloat16 = trainer.get("precision") == "bf16-mixed" or (trainer.get("precision") == "auto" and fast_bfloat16())
    teach = teaching(model, module)
    count = 0

    def loss_of(number: int) -> Any:
        inputs, targets = chunks[number]
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            return network(inputs, targets=targets) if teach is None else teach(network(inputs), inputs, targets)

    def step() -> None:
        nonlocal count
        loss = loss_of(count)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if trainer.get("gradient_clip_val"):
            torch.nn.utils.clip_grad_norm_(network.parameters(), trainer["gradient_clip_val"])
        optimizer.step()
        count += 1

    if model.get("compile") is True:
        compile_parts(network, lambda: loss_of(0))
    return step


def teaching(model: dict[str, Any], module: Any) -> Any:
    """Return the loss with the teachers of a configuration; None without teachers, which older versions lack."""
    if not model.get("teachers"):
        return None
    from gptlit.training.distillation import TEACHER_WEIGHT, distillation_loss, make_teachers

    weight = model.get("teacher_weight", TEACHER_WEIGHT)
    teachers = make_teachers(model["teachers"], weight)
    assert teachers is not None
    teachers.load(module.gpt, module.tokenizer)
    return lambda logits, inputs, targets: distillation_loss(logits, targets, teachers.probabilities(inputs), weight)[0]


def fast_bfloat16() -> bool:
    """Return what `trainer.precision auto` asks for."""
    from gptlit.cli.fit.precision import fastest_precision

    return fastest_precision({"accelerator": "cpu"}) == "bf16-mixed"


def compile_parts(network: Any, forward: Any) -> None:
    """Compile as the command does; the function has moved between versions."""
    try:
        from gptlit.training.compiling import compile_training
    except ImportError:
        from gptlit.compiling import compile_training  # type: ignore[import-not-found,no-redef]
    print(compile_training(network, forward), file=sys.stderr)


def main() -> None:
    """Print the table."""
    options_of = parser(__doc__, rounds=5)
    options_of.add_argument("--against", type=Path, required=True, help="the older checkout")
    options_of.add_argument("--peer", type=Path, help="a checkout of nanoGPT")
    options_of.add_argument("--only", nargs="*", default=["base", "minute", "nanogpt_cpu"], help="configurations")
    options_of.add_argument("--each", type=int, default=10, help="steps per measurement")
    options_of.add_argument("--set", nargs="*", default=[], help="settings of a third side")
    options_of.add_argument("--set-older", nargs="*", default=[], help="settings of the older checkout")
    options = options_of.parse_args()
    begin(options)
    rows, numbers = [], {}
    for name in options.only:
        sides = {
            f"`{name}`, older build": Side(options.against.resolve(), name, options, options.set_older),
            f"`{name}`": Side(REPOSITORY, name, options, []),
        }
        if options.set:
            sides[f"`{name}`, {', '.join(options.set)}"] = Side(REPOSITORY, name, options, options.set)
        if options.peer:
            peer = options.peer.resolve()
            sides[f"nanoGPT at the size of `{name}`"] = Side(REPOSITORY, name, options, [], peer)
        times = in_turn({label: side.seconds for label, side in sides.items()}, options.rounds)
        for side in sides.values():
            side.process.kill()
        older = next(iter(times.values()))
        for label, seconds in times.items():
            ratio = statistics.median(before / now for before, now in zip(older, seconds, strict=True))
            rows.append((label, *spread(seconds, 1e3), f"{ratio:.2f}"))
        numbers |= times
    print(table(HEADER, rows))
    finish(options, seconds=numbers)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        serve(*sys.argv[2:])
    else:
        main()
