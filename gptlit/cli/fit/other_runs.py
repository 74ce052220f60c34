"""What the command says about the runs that a run learns from: teachers, initial weights, its own checkpoint."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from gptlit.checkpoint.files import is_run_folder, read_checkpoint
from gptlit.checkpoint.validations import validations_of
from gptlit.cli.settings import stored_config
from gptlit.convert.source import SETTING as INIT_FROM
from gptlit.convert.source import Pretrained
from gptlit.data import TextDataModule
from gptlit.errors import UserError, counted, shell_option
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
    lines.append(f"weight {weight:g}: {weight:.0%} of the training loss is the distillation loss")
    return [("teachers" if number == 0 else "", line) for number, line in enumerate(lines)]


def state_of(pretrained: Pretrained) -> str:
    """Return `(step 5,200, val loss 1.4090)` of the weights that are read; empty if the file does not say."""
    checkpoint = pretrained.checkpoint or {}
    step = checkpoint.get("global_step")
    if step is None:
        return ""
    found = validations_of(checkpoint)
    if found.best_loss is None or found.best_step != step:
        return f"(step {step:,})"
    return f"(step {step:,}, val loss {found.best_loss:.4f})"


def unfinished(teachers: Teachers) -> Iterator[str]:
    """Yield a line for each teacher whose run was stopped early, with the command that continues that run."""
    for source, pretrained in zip(teachers.sources, teachers.pretrained, strict=True):
        checkpoint, file = pretrained.checkpoint or {}, Path(pretrained.source)
        done, wanted = checkpoint.get("global_step"), steps_wanted(checkpoint)
        if done is None or done >= wanted:
            continue
        in_a_run, last = is_run_folder(file.parent), file.with_name("last.ckpt")
        if in_a_run and last.is_file() and last != file:
            with suppress(UserError):  # a damaged one tells nothing
                done = max(done, read_checkpoint(last)["global_step"])
        if done < wanted:
            place = shell_option("--ckpt_path", file.parent if in_a_run else file)
            yield (
                f"the teacher {source} was stopped after {done:,} of {counted(wanted, 'step')}: "
                f"gptlit fit {place} continues its training"
            )


def steps_wanted(checkpoint: Mapping[str, Any]) -> int:
    """Return `trainer.max_steps` of the run of a checkpoint; 0 if it is unknown."""
    if "hyper_parameters" not in checkpoint:
        return 0
    return (stored_config(dict(checkpoint)).get("trainer") or {}).get("max_steps") or 0


def leaks(model: LitGPT, data: TextDataModule) -> Iterator[str]:
    """Yield a line for each run that this one learns from and that was trained on its validation part, as `leak`."""
    others = [] if model.initial is None else [(INIT_FROM, model.initial.pretrained)]
    if model.teachers is not None:
        others += [(TEACHERS, pretrained) for pretrained in model.teachers.pretrained]
    for setting, pretrained in others:
        if line := leak(f"--{setting} {pretrained.source}", pretrained.checkpoint or {}, data):
            yield line


def leak(name: str, checkpoint: Mapping[str, Any], data: TextDataModule) -> str | None:
    """Return a line if a checkpoint was trained on characters of this validation part, or may have been; else None.

    That is known for the same text with a longer training part. It may be so for a text that begins in the same way,
    and for documents of a text of the same name that are held out at random. Other texts are not compared.

    Args:
        name: of the checkpoint, for the message.
        checkpoint: content of the file; that of another project says nothing about its text.
        data: after `prepare_data`.
    """
    before, now = (checkpoint.get("gptlit") or {}).get("corpus") or {}, data.fingerprint()
    if not before:
        return None
    if before.get("sha256") == now["sha256"]:
        shared = int(before["train_characters"]) - int(now["train_characters"] or 0)
        if shared <= 0:
            return None
        fraction = settings_of_data(checkpoint).get("val_fraction")
        return (
            f"{name} was trained on the first {counted(shared, 'character')} of this validation part: val/loss is too "
            f"low; set --data.val_fraction {'as in that run' if fraction is None else fraction}"
        )
    same_name = before.get("name") == now["name"]
    at_random = "documents" in (settings_of_data(checkpoint).get("split"), data.text.split)
    if (same_name and at_random) or before.get("beginning") == now["beginning"]:
        return (
            f"{name} was trained on another version or split of this text ({before.get('name')}): if it holds parts of "
            "this validation part, val/loss is too low"
        )
    return None


def settings_of_data(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings under `data` of the run of a checkpoint; empty if they are unknown."""
    return stored_config(dict(checkpoint)).get("data") or {} if "hyper_parameters" in checkpoint else {}
