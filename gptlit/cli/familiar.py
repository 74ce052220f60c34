"""Names that users of nanoGPT and similar projects type, and what they are called here.

One table for the error messages and for the README ("Coming from nanoGPT"). Needs no torch.
"""

import re
from collections.abc import Collection
from pathlib import Path

from gptlit.errors import shell_option

VERBS = {
    "train": "gptlit fit --config base",
    "resume": "gptlit fit --ckpt_path RUN",
    "sample generate chat": 'gptlit predict --ckpt_path RUN --prompt "TEXT"',
    "eval evaluate": "gptlit validate --ckpt_path RUN",
}
FLAGS = {
    "max_iters lr_decay_iters epochs": "--trainer.max_steps",
    "learning_rate lr": "--model.optimizer.lr (AdamW) and --model.optimizer.muon_lr (Muon)",
    "min_lr": "--model.schedule.final_fraction, a fraction of the peak",
    "warmup_iters": "--model.schedule.warmup_steps",
    "decay_lr": "--model.schedule.shape constant",
    "beta1 beta2": "--model.optimizer.betas",
    "grad_clip": "--trainer.gradient_clip_val",
    "gradient_accumulation_steps": "--trainer.accumulate_grad_batches; --data.batch_size counts all of them",
    "eval_interval": "--trainer.val_check_interval",
    "eval_iters": "--data.estimate_batches; val/loss itself reads the whole validation part",
    "eval_only": "gptlit validate --ckpt_path RUN",
    "log_interval": "--trainer.log_every_n_steps",
    "device": "--trainer.accelerator",
    "dtype": "--trainer.precision",
    "dataset": "--data.corpus",
    "out_dir": "--run_dir to train, --ckpt_path to read a run",
    "init_from": "--model.init_from (weights), or --ckpt_path RUN to resume",
    "start": "gptlit predict --ckpt_path RUN --prompt",
    "wandb_log": "--trainer.logger WandbLogger",
}


def answer_to(name: str, table: dict[str, str]) -> str | None:
    """Return what a familiar name is called here; None if it is not in the table."""
    return next((answer for names, answer in table.items() if name in names.split()), None)


def flag_advice(flag: str) -> str | None:
    """Return `use --trainer.max_steps` for `--max_iters`; None for a flag that is not in the table."""
    answer = answer_to(flag.lstrip("-"), FLAGS)
    return None if answer is None else f"use {answer}"


def value_advice(value: str, known: Collection[str], configs: Collection[str]) -> str:
    """Return what to do about a value without an option, such as the file of `gptlit fit config/x.py`.

    Args:
        value: as typed.
        known: names of the verb's options, without dashes.
        configs: names of the packaged configurations.
    """
    path = Path(value)
    if value.endswith(".py"):
        return "configurations are YAML files, not Python: gptlit fit --config nanogpt_cpu"
    if "config" in known and (path.suffix in (".yaml", ".yml") or value in configs):
        return f"did you mean {shell_option('--config', value)}?"
    if "ckpt_path" in known and (path.is_dir() or path.suffix == ".ckpt"):
        return f"did you mean {shell_option('--ckpt_path', value)}?"
    return "options begin with -- and take one value"


def readme_table() -> str:
    """Return the table of the README, as Markdown: two pairs a row, since it is long."""
    pairs = [(f"gptlit {names.replace(' ', '|')}", answer) for names, answer in VERBS.items()]
    pairs += [(" ".join(f"--{name}" for name in names.split()), answer) for names, answer in FLAGS.items()]
    cells = [f"{as_code(names)} | {as_code(answer)}" for names, answer in pairs]
    half = -(-len(cells) // 2)
    rows = zip(cells[:half], [*cells[half:], " | "][:half], strict=True)
    lines = ["| elsewhere | gptlit | elsewhere | gptlit |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {left} | {right} |" for left, right in rows)]) + "\n"


def as_code(text: str) -> str:
    """Put commands and flags into backticks."""
    if text.startswith("gptlit "):
        return f"`{text}`".replace("|", "\\|")
    return re.sub(r"(?<!\S)--[\w.]+", r"`\g<0>`", text)
