"""Which checkpoint file a path means, and what it holds."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptlit.checkpoint.run_dir import RUNS, is_locked
from gptlit.checkpoint.torch_file import DamagedCheckpointError, read_torch_file
from gptlit.errors import UserError, shell_option, some_of
from gptlit.model.config import GPTConfig

SETTING = "--ckpt_path"  # for messages
SHOWN = 5  # names in a message, at most
TRACES = ("last.ckpt", "best.ckpt", "metrics.csv", "events.*")  # files of a run; any may be missing
OTHER = {"best.ckpt": "last.ckpt", "last.ckpt": "best.ckpt"}
TRAIN_AGAIN = "train again"


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint that training resumes from. Each file of the run was read at most once to find it."""

    path: Path
    checkpoint: dict[str, Any]
    """Its content; tensors are memory-mapped."""
    run_dir: Path | None
    """Run folder to continue in; None if the file is not in a run folder or that folder holds later steps."""

    @property
    def steps(self) -> int:
        """Optimizer steps made."""
        return self.checkpoint["global_step"]


def find_resume_point(path: str) -> ResumePoint:
    """Return the checkpoint that `fit --ckpt_path` resumes from: a file, or the newest file of a run folder.

    Raises:
        UserError: as `find_checkpoint` and `read_checkpoint`. Of a run folder, the message names each damaged file, and
            the intact one if there is one.
    """
    place = find_place(path)
    if place.is_file():
        checkpoint = read_checkpoint(place)
        return ResumePoint(place, checkpoint, own_folder(place, checkpoint["global_step"]))
    files = [place / name for name in ("last.ckpt", "best.ckpt") if (place / name).is_file()]
    if not files:
        raise nothing_saved(path)
    intact: list[tuple[Path, dict[str, Any]]] = []
    refused: list[UserError] = []
    for file in files:
        try:
            intact.append((file, read_and_check(file, SETTING)))
        except UserError as error:
            refused.append(error)
    newest = max(intact, key=lambda pair: pair[1]["global_step"], default=None)  # on a tie the first: last.ckpt
    if refused:
        refused[0].message = "; ".join(error.message for error in refused)
        if newest is not None:
            refused[0].message += f"; {newest[0].name} is intact: resume from {newest[0]}"
        elif any(isinstance(error, DamagedCheckpointError) for error in refused):
            refused[0].message += f"; {TRAIN_AGAIN}"
        raise refused[0]
    assert newest is not None
    return ResumePoint(*newest, run_dir=place if is_run_folder(place) else None)


def own_folder(path: Path, steps: int) -> Path | None:
    """Return the run folder of a checkpoint of `steps` steps; None if there is none or it holds later steps.

    Training continues in its own folder only where that overwrites nothing learned later.
    """
    if not is_run_folder(path.parent):
        return None
    for name in ("last.ckpt", "best.ckpt"):
        other = path.with_name(name)
        if other.name != path.name and other.is_file():
            with suppress(UserError):  # a damaged file holds nothing to lose
                if read_checkpoint(other)["global_step"] > steps:
                    return None
    return path.parent


def is_run_folder(folder: Path) -> bool:
    """Whether `gptlit fit` trained in this folder."""
    return (folder / "config.yaml").is_file()


def is_config_of_a_run(file: Path) -> bool:
    """Whether a file is the `config.yaml` that `gptlit fit` wrote, even if the run has saved no checkpoint."""
    return file.name == "config.yaml" and file.is_file() and any(any(file.parent.glob(name)) for name in TRACES)


def find_checkpoint(path: str, prefer: str) -> Path:
    """Return the checkpoint file that a path means: itself, or `best.ckpt` or `last.ckpt` of a run folder.

    Args:
        path: file or run folder.
        prefer: "best" or "last"; the other one is taken if this one is missing.

    Raises:
        UserError: if there is no such file or folder, or the folder holds no checkpoint.
    """
    place = find_place(path)
    if place.is_file():
        return place
    for name in (f"{prefer}.ckpt", "best.ckpt", "last.ckpt"):
        if (place / name).is_file():
            return place / name
    raise nothing_saved(path)


def nothing_saved(path: str) -> UserError:
    """Return the error for a folder that is not a run; it names the checkpoints below."""
    others = sorted(str(file) for file in Path(path).rglob("*.ckpt"))
    named = f"name {'one of ' * (len(others) > 1)}{some_of(others, SHOWN)}"
    found = named if others else reason_for_nothing(Path(path))
    return UserError(f"{path}: the folder holds neither best.ckpt nor last.ckpt: {found}", SETTING)


def reason_for_nothing(folder: Path) -> str:
    """Return why a folder holds no checkpoint."""
    if is_run_folder(folder) and is_locked(folder):
        return "the run that trains there has not saved its first checkpoint yet"
    if is_config_of_a_run(folder / "config.yaml"):
        return "the run ended before its first checkpoint: start it again"
    return "nothing was saved there"


def runs_in(folder: Path) -> list[Path]:
    """Return the run folders below a folder, sorted."""
    return sorted({file.parent for name in OTHER for file in folder.rglob(name)})


def find_place(path: str) -> Path:
    """Return an existing file or folder.

    Raises:
        UserError: if it does not exist; names the runs in `checkpoints`.
    """
    place = Path(path)
    try:
        if place.is_file() or place.is_dir():
            return place
    except OSError as error:  # for example a name that is too long
        raise UserError(f"{path}: {error.strerror}", SETTING) from error
    raise UserError(f"{path}: no such file or run folder{runs_here()}", SETTING)


def runs_here() -> str:
    """Return the runs in `checkpoints`, in brackets, for the end of a message; empty if there are none."""
    runs = sorted(str(run) for run in RUNS.glob("*") if any(run.glob("*.ckpt"))) if RUNS.is_dir() else []
    return f" (runs here: {some_of(runs, SHOWN)})" if runs else ""


def read_checkpoint(path: Path, setting: str = SETTING) -> dict[str, Any]:
    """Read a gptlit checkpoint as plain types and memory-mapped tensors. Nothing in it is executed.

    Args:
        path: of the file.
        setting: name of the setting that holds the path, for messages.

    Raises:
        UserError: as `read_torch_file`, with what to do about a damaged file; and if the file is not a checkpoint of
            this version of gptlit or an older one.
    """
    try:
        return read_and_check(path, setting)
    except DamagedCheckpointError as error:
        error.message += f"; {way_out(path, setting)}"
        raise


def read_and_check(path: Path, setting: str) -> dict[str, Any]:
    """Read a gptlit checkpoint; a message about a damaged file ends without advice."""
    checkpoint = read_torch_file(path, setting=setting)
    check_is_gptlit(checkpoint, path, setting)
    return checkpoint


def way_out(damaged: Path, setting: str = "") -> str:
    """Return what to do about a damaged checkpoint: name the other one of its run if that is intact, or train again."""
    other = damaged.with_name(OTHER.get(damaged.name, damaged.name))
    if other == damaged or not other.is_file():
        return f"name an intact checkpoint, or {TRAIN_AGAIN}"
    try:
        read_and_check(other, SETTING)
    except UserError:
        return f"{other} is not intact either; {TRAIN_AGAIN}"
    return f"{other.name} is intact: give {shell_option(setting, other) if setting else other}"


def check_is_gptlit(checkpoint: dict[str, Any], path: Path, setting: str) -> None:
    """Raise `UserError` unless this is the content of a gptlit checkpoint that this version can read."""
    if not {"state_dict", "hyper_parameters", "global_step"} <= checkpoint.keys():
        keys = ", ".join(map(str, list(checkpoint)[:4]))
        raise UserError(f"{path}: not a gptlit checkpoint (it holds {keys})", setting)
    if not {"gpt", "tokenizer"} <= checkpoint["hyper_parameters"].keys():
        raise UserError(f"{path}: a Lightning checkpoint, but not of a gptlit model", setting)
    try:
        GPTConfig(**checkpoint["hyper_parameters"]["gpt"])
    except TypeError as error:
        raise UserError(f"{path}: written by a newer version of gptlit: update gptlit", setting) from error
