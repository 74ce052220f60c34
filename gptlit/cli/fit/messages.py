"""The line that every training begins with: what a step reads, and how large the model is."""

import math
import shlex
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from gptlit.callbacks.checkpoints import RunCheckpoints
from gptlit.callbacks.metrics import MetricsLogger
from gptlit.callbacks.tensorboard import tensorboard_command
from gptlit.checkpoint.files import find_resume_point
from gptlit.cli.messages import duration
from gptlit.data import TextDataModule
from gptlit.errors import UserError
from gptlit.model.config import GPTConfig
from gptlit.model.gpt import GPT
from gptlit.optim import OptimizerConfig, parameter_groups
from gptlit.tokenizer import Tokenizer
from gptlit.training.module import LitGPT

STATES = {"matrix": 1, "decay": 2, "no_decay": 2}  # numbers of a weight that Muon and AdamW keep
UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def opening_line(module: LitGPT, data: TextDataModule, trainer: pl.Trainer) -> str:
    """`12 sequences × 1 accumulation × 1 device × 64 tokens = 768 tokens per step · 803,072 parameters · …`."""
    assert data.tokenizer is not None
    config = replace(module.gpt, vocab_size=data.tokenizer.vocab_size)
    sharded = isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy)
    size = 2 if str(trainer.precision).endswith("16-true") else 4  # bytes of a number
    parameters, numbers = count_numbers(config, module.optimizer_config)
    memory = numbers * size / (trainer.world_size if sharded else 1)
    devices = trainer.world_size
    return (
        f"{data.batch_size // (trainer.accumulate_grad_batches * devices)} sequences × "
        f"{trainer.accumulate_grad_batches} accumulation × {devices} device{'s' * (devices > 1)} × "
        f"{data.block_size} tokens = {data.batch_size * data.block_size:,} tokens per step · "
        f"{parameters:,} parameters · {in_bytes(memory)} for weights, gradients and optimizer"
        f"{' on each device' * (devices > 1)}"
    )


def count_numbers(config: GPTConfig, optimizer: OptimizerConfig) -> tuple[int, int]:
    """Parameters of a model, and with their gradients and the optimizer's state, all the numbers kept between steps.

    The model is built without memory; tables of angles, which are no parameters, are left out.
    """
    with torch.device("meta"):
        model = GPT(replace(config, position="none" if config.position == "rope" else config.position))
    groups: Sequence[dict[str, Any]] = parameter_groups(model, optimizer)
    sizes = {group["role"]: sum(p.numel() for p in group["params"]) for group in groups}
    return sum(sizes.values()), sum((2 + STATES[role]) * size for role, size in sizes.items())


def in_bytes(count: float) -> str:
    """`12.8 MB`."""
    for unit, name in UNITS:
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:.0f} bytes"


def closing_rows(
    trainer: Any, curves: MetricsLogger, checkpoints: RunCheckpoints | None, run_dir: Path | None
) -> list[tuple[str, str]]:
    """Best loss and when, training time and speed, where the run lies, and the commands that come next."""
    rows: list[tuple[str, str]] = []
    metrics, data = trainer.callback_metrics, trainer.datamodule
    if checkpoints is not None and checkpoints.best_score is not None:
        best = checkpoints.best_score
        bits = 1 / math.log(2)
        if metrics.get("val/loss"):
            bits = float(metrics["val/bpc"]) / float(metrics["val/loss"])  # tokens may be longer than characters
        rows.append(("best val loss", f"{best:.4f} nats per token, {best * bits:.4f} bits per character"))
        rows.append(("at step", f"{checkpoints.best_step:,} of {trainer.max_steps:,}"))
    seconds = curves.training_seconds
    characters = curves.steps_timed * data.batch_size * data.block_size * data.chars_per_train_token
    rows.append(("training time", f"{duration(seconds)} ({characters / max(seconds, 1e-9):,.0f} characters/s)"))
    if run_dir is not None:
        rows.append(("run folder", str(run_dir)))
        if checkpoints is not None:
            rows.append(("sample", sample_command(run_dir, trainer.lightning_module.tokenizer)))
        if command := tensorboard_command(trainer, run_dir):
            rows.append(("curves", command))
    return rows


def sample_command(run_dir: Path, tokenizer: Tokenizer) -> str:
    """Draws from the run; with a prompt, where its text has the characters."""
    command = f"gptlit predict --ckpt_path {shlex.quote(str(run_dir))}"
    try:
        tokenizer.encode("ROMEO:")
    except UserError:
        return command
    return f'{command} --prompt "ROMEO:"'


@dataclass(frozen=True)
class Ending:
    """What the command says and returns when training ended early, for a reason that is no fault of the program."""

    line: str
    exit_code: int
    collective: bool = True
    """Whether all processes of the run know of it and end by themselves."""
    slower: bool = False
    """Whether to go on with smaller steps."""


def ending_of(error: BaseException, received: signal.Signals | None, step: int, run_dir: Path | None) -> Ending | None:
    """What an exception that ended training means; None for those that must keep their traceback, or end otherwise.

    Args:
        error: raised by `Trainer.fit`.
        received: the signal that asked the run to stop, if any.
        step: optimizer steps made.
        run_dir: folder of the run.

    Raises:
        UserError: when it was the settings.
    """
    if received is not None and isinstance(error, SIGTERMException | SystemExit):
        line = f"stopped by {received.name} after step {step:,}"
        return Ending(line, 128 + int(received), collective=isinstance(error, SIGTERMException))
    if isinstance(error, MisconfigurationException) and step == 0:
        raise UserError(f"the Trainer does not take these trainer settings: {error}") from error
    if isinstance(error, FloatingPointError):
        return Ending(str(error), exit_code=1, slower=True)
    if isinstance(error, OSError) and error.strerror:
        return Ending(f"{error.filename or run_dir}: {error.strerror} (after step {step:,})", 1, collective=False)
    return None


def way_on(run_dir: Path | None, model: LitGPT, slower: bool) -> str:
    """The line that says how to go on from the newest checkpoint of a run, read once more to be sure of it."""
    if run_dir is None:
        return "nothing was saved: start again"
    try:
        start = find_resume_point(str(run_dir))
    except UserError:
        return f"nothing was saved yet, so there is nothing to go on from in {run_dir}: start again"
    command = ["gptlit", "fit", "--ckpt_path", str(run_dir)]
    if slower:
        command += ["--model.optimizer.lr", f"{model.optimizer_config.lr / 2:g}"]
        if model.optimizer_config.name == "muon":
            command += ["--model.optimizer.muon_lr", f"{model.optimizer_config.muon_lr / 2:g}"]
    return f"{start.path.name} of step {start.steps:,} is whole; go on with: {shlex.join(command)}"
