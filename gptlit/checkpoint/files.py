"""Run folders and the checkpoints in them: finding, claiming, reading."""

import pickle
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from gptlit.checkpoint.run_dir import RUNS
from gptlit.errors import UserError
from gptlit.model.config import GPTConfig


def find_start(path: str) -> tuple[Path, dict[str, Any]]:
    """What `fit --ckpt_path` goes on from: a file, or the newest of a run folder; with what it holds.

    Raises:
        UserError: as `find_checkpoint` and `read_checkpoint`; when only one file of a run is damaged, names the other.
    """
    folder = find_place(path)
    files = [folder / name for name in ("last.ckpt", "best.ckpt") if (folder / name).is_file()]
    if not files:
        file = find_checkpoint(path, "last")
        return file, read_checkpoint(file)
    whole: list[tuple[Path, dict[str, Any]]] = []
    damaged: UserError | None = None
    for file in files:
        try:
            whole.append((file, read_checkpoint(file)))
        except UserError as error:
            damaged = error
    newest = max(whole, key=lambda start: start[1]["global_step"], default=None)  # the first of equals: last.ckpt
    if damaged is not None:
        way_out = "" if newest is None else f"; {newest[0].name} is whole: go on with --ckpt_path {newest[0]}"
        raise UserError(f"{damaged}{way_out}")
    assert newest is not None
    return newest


def home_of(path: Path, steps: int) -> Path | None:
    """The run folder that a checkpoint of so many steps goes on in: its own, unless that holds later steps.

    None asks for a new folder, so that nothing that was learned is overwritten.
    """
    if not (path.parent / "config.yaml").is_file():
        return None
    for name in ("last.ckpt", "best.ckpt"):
        other = path.with_name(name)
        if other.name != path.name and other.is_file():
            with suppress(UserError):  # a damaged file has nothing to lose
                if read_checkpoint(other)["global_step"] > steps:
                    return None
    return path.parent


def find_checkpoint(path: str, prefer: str) -> Path:
    """The checkpoint file meant by a path: itself, or `best.ckpt` / `last.ckpt` of a run folder.

    Raises:
        UserError: when there is no such file or folder, or the folder holds no checkpoint.
    """
    place = find_place(path)
    if place.is_file():
        return place
    for name in (f"{prefer}.ckpt", "best.ckpt", "last.ckpt"):
        if (place / name).is_file():
            return place / name
    raise UserError(f"--ckpt_path {path}: the folder holds neither best.ckpt nor last.ckpt: nothing was saved there")


def find_place(path: str) -> Path:
    """A file or a folder that is there.

    Raises:
        UserError: when it is not; names the runs in `checkpoints` that are.
    """
    place = Path(path)
    try:
        if place.is_file() or place.is_dir():
            return place
    except OSError as error:  # a name that is too long
        raise UserError(f"--ckpt_path {path}: {error.strerror}") from error
    runs = sorted(str(run) for run in RUNS.glob("*") if any(run.glob("*.ckpt"))) if RUNS.is_dir() else []
    known = f" (runs here: {', '.join(runs)})" if runs else ""
    raise UserError(f"--ckpt_path {path}: there is no such file or run folder{known}")


def read_checkpoint(path: Path) -> dict[str, Any]:  # noqa: C901
    """The checkpoint as plain types and tensors; nothing in it is executed, and every byte of it is checked.

    Raises:
        UserError: when it is not a whole gptlit checkpoint, or carries anything but plain types.
    """
    where = f"--ckpt_path {path}"
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{where}: the file is empty")
        if not zipfile.is_zipfile(path):
            raise UserError(f"{where}: the file is cut short, or no checkpoint at all")
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()  # torch does not look at the checksums it writes
        if broken is not None:
            raise UserError(f"{where}: the file is damaged: the checksum of {broken} does not match")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{where}: the file cannot be read ({error.strerror or error})") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{where}: the file is not trusted, and nothing in it was run: it holds more than tensors and plain types"
        ) from error
    except Exception as error:  # the reader of a damaged archive may raise anything
        raise UserError(f"{where}: the file is damaged, or no checkpoint ({type(error).__name__})") from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "hyper_parameters", "global_step"} <= checkpoint.keys():
        keys = ", ".join(map(str, list(checkpoint)[:4])) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise UserError(f"{where}: this is no checkpoint of gptlit (it holds {keys})")
    if not {"gpt", "tokenizer"} <= checkpoint["hyper_parameters"].keys():
        raise UserError(f"{where}: this is a Lightning checkpoint, but not of a gptlit model")
    try:
        GPTConfig(**checkpoint["hyper_parameters"]["gpt"])
    except TypeError as error:
        raise UserError(f"{where}: this is a checkpoint of another version of gptlit: use a newer one") from error
    return checkpoint
