"""What `gptlit fit` prints at the start and at the end of training, and why training ended early."""

import math
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from gptlit.callbacks.checkpoints import RunCheckpoints
from gptlit.callbacks.metrics import MetricsLogger
from gptlit.callbacks.tensorboard import ADDRESS, tensorboard_command
from gptlit.checkpoint.files import find_resume_point
from gptlit.cli.fit.other_runs import teacher_rows
from gptlit.cli.fit.plan import Plan
from gptlit.cli.fit.threads import Threads
from gptlit.cli.messages import duration
from gptlit.data import TextDataModule
from gptlit.data.chunks import take
from gptlit.errors import UserError, counted, shell_option
from gptlit.model.config import GPTConfig
from gptlit.model.gpt import meta_model
from gptlit.optim import OptimizerConfig, learning_rate_factor, parameter_groups
from gptlit.tokenizer import Tokenizer
from gptlit.training.lightning_internals import datamodule_of
from gptlit.training.module import LitGPT

STATES = {"matrix": 1, "head": 2, "decay": 2, "no_decay": 2}  # numbers per weight that Muon and AdamW keep
UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
LONGEST_PROMPT = 33  # tokens of a suggested prompt and its newline
OVERFITTED = 1.05  # last validation loss over the best one, from which on the closing table says so
Rows = list[tuple[str, str]]


def opening_rows(
    module: LitGPT, data: TextDataModule, trainer: pl.Trainer, plan: Plan, threads: Threads, run_dir: Path | None
) -> Rows:
    """Return what a run reads and writes, the size of its model and what was chosen for this machine.

    Names and values take at most 80 columns.
    """
    assert data.tokenizer is not None
    assert data.corpus is not None
    characters = data.corpus.train_characters + data.corpus.val_characters
    rows = [("config", str(path)) for path in plan.config_files]
    sizes = f"{counted(characters, 'character')}, {counted(data.tokenizer.vocab_size, 'token')}"
    rows += [("text", f"{data.corpus.source}: {sizes}")]
    rows += [("model", model_size(module, data.tokenizer, trainer)), ("step", step_size(data, trainer))]
    if module.teachers is not None:
        rows += teacher_rows(module.teachers, module.teacher_weight)
    rows.append(("length", counted(trainer.max_steps, "step")))
    rows.append(("precision", f"{trainer.precision}{' (auto)' if plan.precision_chosen else ''}"))
    if threads.number is not None:
        rows.append(("threads", str(threads)))
    if run_dir is not None:
        rows += [("run folder", str(run_dir)), *tensorboard_rows(trainer, run_dir)]
    return rows


def tensorboard_rows(trainer: pl.Trainer, run_dir: Path) -> Rows:
    """Return the command that shows the curves and the address to open; nothing without a TensorBoardLogger."""
    command = tensorboard_command(trainer, run_dir)
    return [] if command is None else [("curves", command), ("", ADDRESS)]


def model_size(module: LitGPT, tokenizer: Tokenizer, trainer: pl.Trainer) -> str:
    """Return `803,072 parameters, 9.8 MB with gradients and optimizer state`."""
    config = module.gpt_for(tokenizer.vocab_size)
    sharded = isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy)
    precision = str(trainer.precision)
    size = 2 if precision.endswith("16-true") else 8 if precision == "64-true" else 4  # bytes of a number
    parameters, numbers = count_numbers(config, module.optimizer_config)
    memory = numbers * size / (trainer.world_size if sharded else 1)
    devices = " on each device" if trainer.world_size > 1 else ""
    return f"{parameters:,} parameters, {in_bytes(memory)} with gradients and optimizer state{devices}"


def step_size(data: TextDataModule, trainer: pl.Trainer) -> str:
    """Return `6 sequences × 2 accumulation × 4 devices × 64 tokens = 3,072 tokens per step`, without factors of 1."""
    devices, accumulation = trainer.world_size, trainer.accumulate_grad_batches
    factors = [counted(data.batch_size // (accumulation * devices), "sequence")]
    factors += [f"{accumulation} accumulation"] * (accumulation > 1) + [f"{devices} devices"] * (devices > 1)
    product = data.batch_size * data.block_size
    return f"{' × '.join([*factors, counted(data.block_size, 'token')])} = {counted(product, 'token')} per step"


def count_numbers(config: GPTConfig, optimizer: OptimizerConfig) -> tuple[int, int]:
    """Count the parameters of a model, and all numbers kept between steps: with gradients and optimizer state.

    Nothing is allocated.
    """
    groups: Sequence[dict[str, Any]] = parameter_groups(meta_model(config), optimizer)
    sizes = {group["role"]: sum(p.numel() for p in group["params"]) for group in groups}
    return sum(sizes.values()), sum((2 + STATES[role]) * size for role, size in sizes.items())


def in_bytes(count: float) -> str:
    """Return `12.8 MB`."""
    for unit, name in UNITS:
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:.0f} bytes"


def rate_note(module: LitGPT, steps: int, changes: Mapping[str, tuple[Any, Any]]) -> str | None:
    """Return what a new `trainer.max_steps` does to the learning rate of a resumed run; None if nothing."""
    before, after = changes.get("trainer.max_steps", (0, 0))
    schedule = module.schedule
    if before == after or schedule.shape == "constant":
        return None
    group = "model.schedule."
    given = {key.removeprefix(group): old for key, (old, _) in changes.items() if key.startswith(group)}
    earlier = replace(schedule, **given)
    old, new = learning_rate_factor(steps, before, earlier), learning_rate_factor(steps, after, schedule)
    one = "that" if earlier.shape == schedule.shape else f"the {earlier.shape} one"
    return (
        f"learning rate: the {schedule.shape} schedule of {after:,} steps is at {new:.0%} of its peak at step {steps:,}"
        f" ({one} of {before:,} steps: at {old:.0%})"
    )


def interval_note(optimizer: OptimizerConfig, steps: int) -> str | None:
    """Return a line if a run of so many steps ends before Muon's first update; else None."""
    interval = optimizer.muon_interval
    if optimizer.name != "muon" or interval <= steps:
        return None
    return (
        f"the matrices never change: model.optimizer.muon_interval is {interval:,}, more than trainer.max_steps "
        f"({steps:,}): set a smaller interval"
    )


# ---------------------------------------------------------------- the end


def closing_rows(
    trainer: Any, curves: MetricsLogger, checkpoints: RunCheckpoints | None, run_dir: Path | None, picture: Path | None
) -> Rows:
    """Return best loss, training time, run folder and the commands that come next.

    Args:
        trainer: after training.
        curves: has the training time.
        checkpoints: has the best loss; None if nothing is saved.
        run_dir: the run folder, if there is one.
        picture: the curves as a picture, if they were drawn.
    """
    rows: Rows = []
    metrics, data = trainer.callback_metrics, datamodule_of(trainer)
    if checkpoints is not None and checkpoints.best_score is not None:
        best, step = checkpoints.best_score, checkpoints.best_step or 0
        bits = best * bits_per_nat(data, metrics)
        rows.append(("best val loss", f"{best:.4f} nats per token, {bits:.4f} bits per character"))
        rows.append(("at step", f"{step:,} of {trainer.max_steps:,}"))
        rows += overfitting_rows(best, step, float(metrics.get("val/loss", best)))
    steps, seconds = curves.of_this_start
    characters = steps * data.batch_size * data.block_size * data.chars_per_train_token
    since = " since it was resumed" if steps < curves.steps_timed else ""
    speed = f" ({characters / max(seconds, 1e-9):,.0f} characters/s{since})" if steps else ""
    rows.append(("training time", f"{duration(curves.training_seconds)}{speed}"))
    if run_dir is not None:
        rows.append(("run folder", str(run_dir)))
        if checkpoints is not None:
            rows.append(("sample", sample_command(run_dir, first_line(data))))
        if picture is not None:
            rows.append(("picture", str(picture)))
        rows += tensorboard_rows(trainer, run_dir)
    return rows


def bits_per_nat(data: TextDataModule, metrics: Mapping[str, Any]) -> float:
    """Return bits per character of the validation for a loss of one nat per token.

    Without a validation in this start, those of the whole validation part. The first token is not predicted; tokens may
    be longer than characters.
    """
    loss, bits = float(metrics.get("val/loss", 0)), float(metrics.get("val/bpc", 0))
    if loss > 0 and bits > 0:  # of the same batches
        return bits / loss
    assert data.corpus is not None
    assert data.tokenizer is not None
    tokens, first = len(data.corpus.val), take(data.corpus.val, np.zeros(1, int), 1)
    characters = data.corpus.val_characters - data.tokenizer.chars_per_token()[int(first)]
    return (tokens - 1) / max(characters, 1) / math.log(2)


def overfitting_rows(best: float, step: int, last: float) -> Rows:
    """Return what happened and what helps if the validation loss has risen far above its best; else nothing."""
    if last < OVERFITTED * best or f"{last:.4f}" == f"{best:.4f}":
        return []
    return [
        ("overfitting", f"val loss is {last:.4f}, but was {best:.4f} at step {step:,} (best.ckpt)"),
        ("", f"what helps: fewer steps (--trainer.max_steps {max(step, 1)}), a longer text,"),
        ("", "--model.gpt.dropout 0.2, --model.gpt.token_noise 0.1"),
    ]


def sample_command(run_dir: Path, prompt: str | None) -> str:
    """Return the command that samples from the run, with a prompt if there is one."""
    command = f"gptlit predict {shell_option('--ckpt_path', run_dir)}"
    return command if prompt is None else f"{command} {shell_option('--prompt', prompt)}"


def first_line(data: TextDataModule) -> str | None:
    """Return the first line of the training part, for a prompt; None if it is long, empty or one of many documents."""
    if data.tokenizer is None or data.train_tokens is None or data.text.documents is not None:
        return None
    ids = take(data.train_tokens, np.zeros(1, int), min(LONGEST_PROMPT, len(data.train_tokens)))
    line, end, _ = data.tokenizer.decode(ids[0].tolist()).partition("\n")
    fits = end and line.strip() and line.isprintable() and not line.startswith(("-", "FILE:"))  # other meanings there
    return line if fits else None


@dataclass(frozen=True)
class Ending:
    """What the command says and returns if training ended early for a reason that is not an error of the program."""

    line: str
    exit_code: int
    collective: bool = True
    """Whether all processes of the run know of it and end by themselves."""
    slower: bool = False
    """Whether to resume at a lower learning rate."""


def ending_of(
    error: BaseException, received: signal.Signals | None, before: int, step: int, run_dir: Path | None
) -> Ending | None:
    """Return what an exception that ended training means; None if it must keep its traceback or end otherwise.

    Args:
        error: raised by `Trainer.fit`.
        received: the signal that asked the run to stop, if any.
        before: optimizer steps that were made before this start.
        step: optimizer steps made.
        run_dir: folder of the run.

    Raises:
        UserError: if the settings are wrong.
    """
    if received is not None and isinstance(error, SIGTERMException | SystemExit):
        line = f"stopped by {received.name} after step {step:,}"
        return Ending(line, 128 + int(received), collective=isinstance(error, SIGTERMException))
    if isinstance(error, MisconfigurationException) and step in (0, before):
        raise UserError(f"the Trainer does not take these trainer settings: {error}") from error
    if isinstance(error, FloatingPointError):
        return Ending(str(error), exit_code=1, slower=True)
    if isinstance(error, OSError) and error.strerror:
        return Ending(f"{error.filename or run_dir}: {error.strerror} (after step {step:,})", 1, collective=False)
    return None


def resume_lines(
    run_dir: Path | None, model: LitGPT, slower: bool, checkpoints: RunCheckpoints, losses: Mapping[str, Any]
) -> list[str]:
    """Return which checkpoints a run has, with their losses, and the command that resumes it.

    The newest file is read again to be sure that it is intact.

    Args:
        run_dir: the run folder.
        model: has the learning rates.
        slower: whether to resume at half of them.
        checkpoints: has the lowest validation loss and its step.
        losses: latest `train/loss`, if known.
    """
    if run_dir is None:
        return ["nothing was saved: start again"]
    try:
        start = find_resume_point(str(run_dir))
    except UserError:
        return [f"nothing was saved yet in {run_dir}: start again"]
    command = f"gptlit fit {shell_option('--ckpt_path', run_dir)}"
    if slower:
        config = model.optimizer_config
        muon_lr = config.muon_lr if config.name == "muon" else None
        rates = {"lr": config.lr, "head_lr": config.head_lr, "muon_lr": muon_lr}
        command += "".join(f" --model.optimizer.{name} {rate / 2:g}" for name, rate in rates.items() if rate)
    best, step = checkpoints.best_score, checkpoints.best_step or 0
    lines = [] if best is None else [f"best.ckpt (step {step:,}): val loss {best:.4f}"]
    loss = f", train loss {float(losses['train/loss']):.4f}" if "train/loss" in losses else ""
    lines.append(f"{start.path.name} (step {start.steps:,}) is intact{loss}")
    return [*lines, f"resume with: {command}"]
