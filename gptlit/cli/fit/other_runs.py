"""What the command says about the runs that a run learns from: teachers, initial weights, its own checkpoint."""

import shlex
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from gptlit.checkpoint.files import is_run_folder, read_checkpoint
from gptlit.cli.settings import stored_config
from gptlit.convert.source import SETTING as INIT_FROM
from gptlit.convert.source import Pretrained
from gptlit.data import TextDataModule
from gptlit.errors import UserError, counted
from gptlit.training.distillation import SETTING as TEACHERS
from gptlit.training.distillation import Teachers
from gptlit.training.module import LitGPT

Rows = list[tuple[str, str]]


def teacher_rows(teachers: Teachers, weight: float) -> Rows:
    """Return a row for each teacher, with the step and the validation loss of its weights, and one for their weight."""
    lines = [
        " ".join(filter(None, [source, state_of(pretrained)]))
        for source, pretrained in zip(teachers.sources, teachers.pretrained, strict=True)
    ]
    lines.append(f"weight {weight:g}: {weight:.0%} of the training loss is their prediction")
    return [("teachers" if number == 0 else "", line) for number, line in enumerate(lines)]


def state_of(pretrained: Pretrained) -> str:
    """Return `(step 5,200, val loss 1.4090)` of the weights that are read; empty for a model of another project."""
    checkpoint = pretrained.checkpoint
    if checkpoint is None:
        return ""
    step = checkpoint["global_step"]
    best = checkpoint.get("callbacks", {}).get("RunCheckpoints") or {}
    if best.get("best_score") is None or best.get("best_step") != step:
        return f"(step {step:,})"
    return f"(step {step:,}, val loss {best['best_score']:.4f})"


def unfinished(teachers: Teachers) -> Iterator[str]:
    """Yield a line for each teacher that has made fewer steps than its settings ask for, with how to finish it."""
    for source, pretrained in zip(teachers.sources, teachers.pretrained, strict=True):
        if pretrained.checkpoint is None:
            continue
        done, file = pretrained.checkpoint["global_step"], Path(pretrained.source)
        if file.name == "best.ckpt":
            with suppress(UserError):  # without an intact last.ckpt, best.ckpt is the newest
                done = max(done, read_checkpoint(file.with_name("last.ckpt"))["global_step"])
        wanted = (stored_config(dict(pretrained.checkpoint)).get("trainer") or {}).get("max_steps") or 0
        if done < wanted:
            place = str(file.parent if is_run_folder(file.parent) else file)
            yield (
                f"the teacher {source} has made {done:,} of {counted(wanted, 'step')}: finish it first with "
                f"gptlit fit --ckpt_path {shlex.quote(place)}"
            )


def leaks(model: LitGPT, data: TextDataModule) -> Iterator[str]:
    """Yield a line for each run that this one learns from and that has seen its validation part, or may have."""
    others = [] if model.initial is None else [(INIT_FROM, model.initial.pretrained)]
    if model.teachers is not None:
        others += [(TEACHERS, pretrained) for pretrained in model.teachers.pretrained]
    for setting, pretrained in others:
        if line := leak(f"--{setting} {pretrained.source}", pretrained.checkpoint or {}, data):
            yield line


def leak(name: str, checkpoint: Mapping[str, Any], data: TextDataModule) -> str | None:
    """Return a line if a checkpoint was trained on characters that this validation part holds, or may hold; else None.

    Another text of the same name is a new version of it or another split, so that it may.

    Args:
        name: of the checkpoint, for the message.
        checkpoint: content of the file; of another project it tells nothing.
        data: after `prepare_data`.
    """
    before, now = checkpoint.get("gptlit", {}).get("corpus") or {}, data.fingerprint()
    if before.get("sha256") == now["sha256"]:
        seen = int(before["train_characters"]) - int(now["train_characters"] or 0)
        if seen <= 0:
            return None
        return (
            f"{name} was trained on the first {counted(seen, 'character')} of this validation part, so that its loss "
            "is too low: set data.val_fraction as it was there"
        )
    if before.get("name") != now["name"]:
        return None
    return (
        f"{name} was trained on another version or split of {now['name']}: if it has seen this validation part, its "
        "loss is too low"
    )
