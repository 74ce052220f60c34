"""What `gptlit fit` says about the runs that `model.teachers` names."""

import shlex
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from gptlit.checkpoint.files import read_checkpoint
from gptlit.cli.settings import stored_config
from gptlit.convert.source import Pretrained
from gptlit.errors import UserError, counted
from gptlit.training.distillation import Teachers

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
            place = source if Path(source).is_dir() else str(file.parent)
            yield (
                f"the teacher {source} has made {done:,} of {counted(wanted, 'step')}: finish it first with "
                f"gptlit fit --ckpt_path {shlex.quote(place)}"
            )
