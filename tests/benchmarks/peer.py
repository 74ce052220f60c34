"""nanoGPT's own train.py as a process in a temporary folder, with the settings of a configuration."""

import contextlib
import pickle
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from subjects import encode

PROGRAM = ("train.py", "model.py", "configurator.py")
STEP_LINE = re.compile(r"^iter (\d+): loss ([\d.]+), time ([\d.]+)ms", re.MULTILINE)
EVAL_LINE = re.compile(r"^step (\d+): train loss ([\d.]+), val loss ([\d.]+)", re.MULTILINE)


@contextlib.contextmanager
def workplace(peer: Path, text: Path) -> Iterator[Path]:
    """Yield a temporary folder with nanoGPT's program and the text, encoded as its prepare.py does."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for program in PROGRAM:
            shutil.copy(peer / program, folder)
        data = folder / "data" / "text"
        data.mkdir(parents=True)
        train, val, numbers = encode(text)
        train.tofile(data / "train.bin")
        val.tofile(data / "val.bin")
        letters = {number: character for character, number in numbers.items()}
        (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(numbers), "itos": letters, "stoi": numbers}))
        yield folder


def train_command(config: Mapping[str, Any], device: str = "cpu", **settings: Any) -> list[str]:
    """Return the command of train.py for a configuration with nanoGPT's architecture; `settings` are its options."""
    gpt, optimizer, schedule = (config["model"][part] for part in ("gpt", "optimizer", "schedule"))
    trainer = config["trainer"]
    steps = trainer["max_steps"]
    own = {
        "out_dir": "out",
        "dataset": "text",
        "device": device,
        "compile": False,
        "dtype": "bfloat16" if device == "cuda" else "float32",
        "gradient_accumulation_steps": 1,
        "batch_size": config["data"]["batch_size"],
        **{name: gpt[name] for name in ("block_size", "n_layer", "n_head", "n_embd")},
        "dropout": gpt.get("dropout", 0.0),
        "learning_rate": optimizer["lr"],
        "min_lr": optimizer["lr"] * schedule["final_fraction"],
        "beta2": optimizer["betas"][1],
        "weight_decay": optimizer["weight_decay"],
        "grad_clip": trainer["gradient_clip_val"],
        "warmup_iters": schedule["warmup_steps"],
        "lr_decay_iters": steps,
        "max_iters": steps,
        "eval_interval": trainer["val_check_interval"],
        "eval_iters": 20 if device == "cpu" else 200,
        "log_interval": 1,
        **settings,
    }
    return [sys.executable, "train.py", *(f"--{name}={value}" for name, value in own.items())]


@dataclass(frozen=True)
class PeerRun:
    """The output of train.py."""

    step_seconds: dict[int, float]
    """Seconds of every step without evaluation; steps with an evaluation get the median of the others."""
    other_seconds: float
    """Seconds of evaluation and checkpoints."""
    val_losses: dict[int, float]
    """Its own estimates over random batches, by step."""


def read_output(out: str) -> PeerRun:
    """Separate training from evaluation: the line of a step includes the evaluation before it."""
    evaluations = {int(step): float(val) for step, _, val in EVAL_LINE.findall(out)}
    times = {int(step): float(milliseconds) / 1e3 for step, _, milliseconds in STEP_LINE.findall(out)}
    plain = sorted(seconds for step, seconds in times.items() if step not in evaluations)
    usual = plain[len(plain) // 2]
    steps = {step: usual if step in evaluations else seconds for step, seconds in times.items()}
    return PeerRun(steps, sum(times.values()) - sum(steps.values()), evaluations)
