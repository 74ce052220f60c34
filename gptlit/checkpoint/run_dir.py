"""Run folders: made, claimed and locked by one process."""

import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

from gptlit.errors import UserError

RUNS = Path("checkpoints")
CLAIMED = "GPTLIT_RUN_DIR"  # how the first process tells its folder to the processes that it starts


def process_rank() -> int:
    """Return the rank of this process; 0 before the processes are connected."""
    return int(getattr(rank_zero_only, "rank", 0))


def first_process() -> bool:
    """Whether this is the process that makes folders and speaks for all, as far as known before they are connected."""
    node = int(os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0")))
    return process_rank() == 0 and ("RANK" in os.environ or node == 0)


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
