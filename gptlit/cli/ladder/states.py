"""Runs of `gptlit ladder`: how far each is, and what may be removed of it."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from gptlit.checkpoint.files import ResumePoint, find_resume_point, is_run_folder
from gptlit.checkpoint.run_dir import lock_folder
from gptlit.cli.fit.resume import is_finished
from gptlit.cli.ladder.rungs import Rung
from gptlit.cli.settings import flat, stored_config
from gptlit.data import TextSpec
from gptlit.errors import UserError
from gptlit.training.lightning_internals import training_ended

# Settings that must be equal for a run to be taken as one of this ladder.
COMPARED = ("model.", "data.", "seed_everything", "trainer.max_steps", "trainer.gradient_clip_val", "trainer.precision")

# Settings that a run on its fallback has its own values of.
OF_A_TEXT = {f"data.{field.name}" for field in fields(TextSpec)} - {"data.val_fraction"}
# What a run writes before its first checkpoint; a `*` also stands for folders.
BEFORE_A_CHECKPOINT = (
    "config.yaml",
    "curves.png",
    "*events.out.tfevents.*",
    "metrics.csv",
    "profile*",
    "samples/step-*.txt",
    ".*.partial",
)


@dataclass(frozen=True)
class Run:
    """A rung with one of its seeds; a rung is a configuration of the lecture."""

    rung: Rung
    seed: int
    folder: Path
    arguments: tuple[str, ...]
    """Flags for `gptlit fit`, in addition to the file of the rung."""
    wanted: Mapping[str, Any]
    """The settings that they give, by their full names."""
    as_in_lecture: bool
    """Whether they change nothing that the loss depends on, apart from the seed."""


def same(stored: Any, wanted: Any) -> bool:
    """Whether a setting of a run is the wanted one, which is as PyYAML reads it: 1e-3 is a string there."""
    if isinstance(stored, list) and isinstance(wanted, list):
        return len(stored) == len(wanted) and all(map(same, stored, wanted))
    try:
        return bool(stored == wanted) or float(str(stored)) == float(str(wanted))
    except ValueError:
        return str(stored) == str(wanted)


def state_of(run: Run) -> Literal["new", "begun", "finished"]:
    """Return how far a run is.

    Raises:
        UserError: if its folder holds a run with other settings, or something else than a run.
    """
    if not any(run.folder.glob("*.ckpt")):
        check_clear(run.folder)
        return "new"
    start = find_resume_point(str(run.folder))
    stored, wanted = flat(stored_config(start.checkpoint)), run.wanted
    on_fallback = is_of_fallback(stored, wanted)
    for key, value in wanted.items():
        if key == "trainer.precision" and value == "auto":
            continue  # a run holds what auto meant at its start
        if on_fallback and (key in OF_A_TEXT or (key == "trainer.max_steps" and stored[key] <= value)):
            continue
        if key.startswith(COMPARED) and key in stored and not same(stored[key], value):
            raise UserError(f"{run.folder} holds a run with {key} {stored[key]}, not {value}: choose another --run_dir")
    steps = stored["trainer.max_steps"] if on_fallback else wanted["trainer.max_steps"]
    return "finished" if is_finished(start, steps) or was_stopped(start, wanted) else "begun"


def is_of_fallback(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether the text of a run was replaced by `data.fallback`, which its settings name as its text."""
    fallback = wanted.get("data.fallback")
    return fallback is not None and stored.get("data.corpus") == fallback != wanted["data.corpus"]


def was_stopped(start: ResumePoint, wanted: Mapping[str, Any]) -> bool:
    """Whether a callback of the user, such as EarlyStopping, ended a run, and was given again.

    A time limit ends training too, but belongs to one start.
    """
    timed = "Timer" in start.checkpoint["callbacks"]
    ended = training_ended(start.checkpoint) and is_finished(start, start.steps)
    return ended and not timed and bool(wanted.get("trainer.callbacks"))


def check_text(first: Path, folder: Path) -> None:
    """Check that two runs were trained on the same text: one of them may have had to use its fallback.

    Raises:
        UserError: names both texts.
    """
    before, now = (find_resume_point(str(run)).checkpoint["gptlit"]["corpus"] for run in (first, folder))
    if before["sha256"] != now["sha256"]:
        raise UserError(
            f"{folder} was trained on {now['name']}, but {first} on {before['name']} of other content: their losses "
            "cannot be compared; choose another --run_dir"
        )


def clear(folder: Path) -> None:
    """Empty the folder of a run that was killed before it saved anything.

    Raises:
        UserError: if another process is training that run, or the folder holds something else.
    """
    check_clear(folder)
    lock = lock_folder(folder)
    if lock is None:
        raise UserError(f"{folder} is being trained by another process: stop it first, or choose another --run_dir")
    os.close(lock)
    shutil.rmtree(folder)


def check_clear(folder: Path) -> None:
    """Check that a folder holds nothing but what a run writes before its first checkpoint.

    Raises:
        UserError: names what else it holds.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    names = [path.relative_to(folder) for path in files]
    of_a_run = is_run_folder(folder)
    for name in names:
        if not (of_a_run and any(fnmatch(str(name), pattern) for pattern in BEFORE_A_CHECKPOINT)):
            raise UserError(f"{folder} holds {name}, which no run of the ladder wrote: choose another --run_dir")
