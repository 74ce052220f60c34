"""Run folders and the checkpoints in them: finding, claiming, reading."""

import os
import pickle
import tempfile
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only

from gptlit.config import GPTConfig
from gptlit.errors import UserError
from gptlit.module import LitGPT

RUNS = Path("checkpoints")
CLAIMED = "GPTLIT_RUN_DIR"  # how the first process tells its folder to the processes that it starts


def first_process() -> bool:
    """Whether this is the process that makes folders and speaks for all, as far as known before they are connected."""
    node = int(os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0")))
    return rank_zero_only.rank == 0 and ("RANK" in os.environ or node == 0)


def started_by_first_process() -> bool:
    """Whether Lightning started this process from the first one, which then answers for all."""
    return CLAIMED in os.environ and not first_process()


class RunDir:
    """The folder of a run, held by this process until it ends, so that no two processes train the same run.

    Raises:
        UserError: when the folder cannot be made or written to, or another process holds it.
    """

    def __init__(self, path: Path, fresh: bool, lock: int | None = None, parents: Sequence[Path] = ()) -> None:
        self.path = path
        self.fresh = fresh  # made by this process
        self._lock = lock
        self._parents = parents  # made with it, the innermost first

    @classmethod
    def make(cls, wanted: str | None, name: str) -> "RunDir":
        """A new folder: `wanted`, or `checkpoints/<name>`; `-2`, `-3`, … when it is taken.

        Only the first process makes it; the others are told.
        """
        base = Path(wanted) if wanted else RUNS / name
        if base.name in ("", ".."):  # `.` has no name to put a number behind
            base = base.resolve()
        if not base.name:
            raise UserError(f"--run_dir {wanted}: give the folder a name of its own")
        if not first_process():
            return cls(Path(os.environ.get(CLAIMED, base)), fresh=False)
        try:
            parents = [parent for parent in base.parents if not parent.exists()]
            for number in range(1, 10_000):
                folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
                folder.mkdir(parents=True, exist_ok=True)
                if any(folder.iterdir()):
                    continue
                lock = lock_folder(folder)
                if lock is None or any(folder.iterdir()):  # another process was faster
                    continue
                os.environ[CLAIMED] = str(folder)
                return cls(folder, fresh=True, lock=lock, parents=parents)
        except OSError as error:
            raise UserError(
                f"--run_dir {base}: the folder cannot be used ({error.strerror}): choose another"
            ) from error
        raise UserError(f"--run_dir {base}: there are 10,000 runs of that name: choose another")

    @classmethod
    def reopen(cls, folder: Path) -> "RunDir":
        """The folder of a run that goes on."""
        if not first_process():
            return cls(folder, fresh=False)
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass  # a file can be made there
            lock = lock_folder(folder)
        except OSError as error:
            raise UserError(
                f"--ckpt_path {folder}: the run folder cannot be written to ({error.strerror}): "
                "change that, or go on in a new folder with --run_dir"
            ) from error
        if lock is None:
            raise UserError(
                f"--ckpt_path {folder}: another process is training this run: stop it first, or go on in a new folder "
                "with --run_dir"
            )
        os.environ[CLAIMED] = str(folder)
        return cls(folder, fresh=False, lock=lock)

    def give_back(self) -> None:
        """Removes a folder of our own that holds no checkpoint, and those around it that were made for it."""
        if self.fresh and self.path.is_dir() and not any(self.path.glob("*.ckpt")):
            for path in sorted(self.path.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            self.path.rmdir()
            with suppress(OSError):  # another run has come to lie there
                for parent in self._parents:
                    parent.rmdir()

    def close(self) -> None:
        """Lets other processes have it."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        if not started_by_first_process():
            os.environ.pop(CLAIMED, None)


def lock_folder(folder: Path) -> int | None:
    """Locks a folder until the process ends: a descriptor to close, or None when another process has the lock.

    Where the system or the file system knows no locks, it is as if nobody had it.
    """
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, PermissionError):  # Windows
        return os.open(os.devnull, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        pass
    return descriptor


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


def read_checkpoint(path: Path) -> dict[str, Any]:
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


def load_model(checkpoint: dict[str, Any]) -> LitGPT:
    """The model of a checkpoint, with its weights, ready to draw from; needs no corpus.

    Raises:
        UserError: when the checkpoint contradicts itself.
    """
    try:
        model = LitGPT(**checkpoint["hyper_parameters"] | {"init_from": None})  # a checkpoint names no other
        model.configure_model()
        model.load_state_dict(checkpoint["state_dict"])
    except UserError:
        raise
    except RuntimeError as error:
        raise UserError(f"the checkpoint does not fit its own settings: {error}") from error
    return model.eval()
