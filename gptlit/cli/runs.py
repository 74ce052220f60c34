"""Run folders and the checkpoints in them: finding, claiming, reading."""

import os
import pickle
import zipfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.utilities import rank_zero_only

from gptlit.errors import UserError
from gptlit.module import LitGPT

RUNS = Path("checkpoints")
CLAIMED = "GPTLIT_RUN_DIR"  # how the first process tells its folder to the processes that it starts


def find_config(name: str) -> str:
    """A path as it stands, or the packaged configuration of that name (`base`, `lecture/1_bigram`).

    Raises:
        UserError: when there is neither.
    """
    if Path(name).is_file():
        return name
    packaged = packaged_configs()
    stem = name.removesuffix(".yaml").removeprefix("configs/")
    candidate = packaged / f"{stem}.yaml"
    if candidate.is_file():
        return str(candidate)
    if Path(name).is_dir():
        raise UserError(f"--config {name} is a folder: name a YAML file in it")
    names = ", ".join(sorted(str(path.relative_to(packaged).with_suffix("")) for path in packaged.rglob("*.yaml")))
    raise UserError(f"--config {name}: there is no such file, and no packaged configuration of that name ({names})")


def packaged_configs() -> Path:
    """Folder of the YAML files: inside the installed package, or beside it in a checkout."""
    inside = Path(str(files("gptlit"))) / "configs"
    return inside if inside.is_dir() else inside.parent.parent / "configs"


def claim_run_dir(wanted: str | None, config_names: list[str]) -> Path:
    """A folder of our own: `wanted`, or `checkpoints/<name of the last config>`; `-2`, `-3`, … when it is taken.

    Only the first process makes it; the others are told.
    """
    if CLAIMED in os.environ and rank_zero_only.rank != 0:
        return Path(os.environ[CLAIMED])
    stem = Path(config_names[-1]).with_suffix("").name if config_names else "run"
    base = Path(wanted) if wanted else RUNS / stem
    if rank_zero_only.rank != 0:
        return base
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        for number in range(1, 10_000):
            folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
            try:
                folder.mkdir()
            except FileExistsError:
                if folder.is_dir() and not any(folder.iterdir()):
                    break
                continue
            break
    except OSError as error:
        raise UserError(f"--run_dir {base}: the folder cannot be made ({error.strerror}): choose another") from error
    os.environ[CLAIMED] = str(folder)
    return folder


def find_checkpoint(path: str, prefer: str) -> Path:
    """The checkpoint file meant by a path: itself, or `best.ckpt` / `last.ckpt` of a run folder.

    Raises:
        UserError: when there is no such file or folder, or the folder holds no checkpoint.
    """
    place = Path(path)
    if place.is_file():
        return place
    if place.is_dir():
        for name in (f"{prefer}.ckpt", "best.ckpt", "last.ckpt"):
            if (place / name).is_file():
                return place / name
        raise UserError(
            f"--ckpt_path {path}: the folder holds neither best.ckpt nor last.ckpt: nothing was saved there"
        )
    runs = sorted(str(run) for run in RUNS.glob("*") if any(run.glob("*.ckpt"))) if RUNS.is_dir() else []
    known = f" (runs here: {', '.join(runs)})" if runs else ""
    raise UserError(f"--ckpt_path {path}: there is no such file or run folder{known}")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint as plain types and tensors; nothing in it is executed.

    Raises:
        UserError: when it is not a whole gptlit checkpoint, or carries anything but plain types.
    """
    try:
        # Memory-mapped: the optimizer's state is not read from the disk unless somebody looks at it.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        reason = "it carries more than tensors and plain types" if "weights_only" in str(error).lower() else "damaged"
        raise UserError(f"--ckpt_path {path}: this file is not trusted, and nothing in it was run: {reason}") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
        why = "empty" if path.stat().st_size == 0 else "damaged, cut short, or no checkpoint at all"
        raise UserError(f"--ckpt_path {path}: the file cannot be read: it is {why}") from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "hyper_parameters"} <= checkpoint.keys():
        keys = ", ".join(map(str, list(checkpoint)[:4])) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise UserError(f"--ckpt_path {path}: this is no checkpoint of gptlit (it holds {keys})")
    if not {"gpt", "tokenizer"} <= checkpoint["hyper_parameters"].keys():
        raise UserError(f"--ckpt_path {path}: this is a Lightning checkpoint, but not of a gptlit model")
    return checkpoint


def load_model(checkpoint: dict[str, Any]) -> LitGPT:
    """The model of a checkpoint, with its weights, ready to draw from; needs no corpus."""
    model = LitGPT(**checkpoint["hyper_parameters"])
    model.configure_model()
    try:
        model.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        raise UserError(f"the checkpoint does not fit its own settings: {error}") from error
    return model.eval()


def stored_config(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The configuration that a checkpoint was trained with; only the model's part when it was trained from Python."""
    text = checkpoint.get("gptlit", {}).get("config")
    if text:
        return yaml.safe_load(text)
    hyper = checkpoint["hyper_parameters"]
    return {"model": {key: hyper[key] for key in ("gpt", "optimizer", "schedule") if key in hyper}}
