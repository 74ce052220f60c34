"""The table that a training run ends with."""

import math
import shlex
from pathlib import Path
from typing import Any

from gptlit.callbacks.checkpoints import RunCheckpoints
from gptlit.callbacks.curves import Curves
from gptlit.callbacks.tensorboard import tensorboard_command
from gptlit.cli.messages import duration
from gptlit.errors import UserError
from gptlit.tokenizer import Tokenizer


def closing_rows(
    trainer: Any, curves: Curves, checkpoints: RunCheckpoints | None, run_dir: Path | None
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
