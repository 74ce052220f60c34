"""Run folders: created, claimed and locked by one process."""

import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from gptlit.errors import UserError

RUNS = Path("checkpoints")
CLAIMED = "GPTLIT_RUN_DIR"  # how the first process passes its folder to the processes that it starts


def process_rank() -> int:
    """Return the rank of this process; 0 before the processes are connected. Does not import Lightning."""
    if "lightning.pytorch" in sys.modules:  # whose strategies may have set it
        from lightning.pytorch.utilities import rank_zero_only

        return int(getattr(rank_zero_only, "rank", 0))
    variables = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # in Lightning's order
    return next((int(os.environ[name]) for name in variables if name in os.environ), 0)


def first_process() -> bool:
    """Whether this process creates folders and prints messages. Valid before the process group is initialised."""
    node = int(os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0")))
    return process_rank() == 0 and ("RANK" in os.environ or node == 0)


def started_by_first_process() -> bool:
    """Whether Lightning started this process from the first one, which reports errors and the exit code for all.

    torchrun, which starts all of them, sets RANK as well.
    """
    return os.environ.get("LOCAL_RANK", "0") != "0" and "RANK" not in os.environ


class RunDir:
    """A run folder, locked by this process until it ends, so that no two processes train the same run.

    Args:
        path: the folder.
        fresh: whether it is new to this run: created, or empty when it was claimed.
        created: whether this process created it; an empty folder of the user stays if the run is given up.
        lock: descriptor that holds the lock; None in other processes of the run.
        parents: parent folders created with it, innermost first.

    Raises:
        UserError: if the folder cannot be created or written to, or another process holds it.
    """

    def __init__(
        self,
        path: Path,
        fresh: bool,
        lock: int | None = None,
        parents: Sequence[Path] = (),
        created: bool = False,
    ) -> None:
        self.path = path
        self.fresh = fresh
        self._lock = lock
        self._parents = parents
        self._created = created

    @classmethod
    def make(cls, wanted: str | None, name: str) -> "RunDir":
        """Create a new folder: `wanted` or `checkpoints/<name>`, with `-2`, `-3`, … appended if it is taken.

        Only the first process creates it; the other processes read its name from the environment.
        """
        base = Path(wanted) if wanted else RUNS / name
        if base.name in ("", ".."):  # `.` has no name to append a number to
            base = base.resolve()
        if not base.name:
            raise UserError(f"{wanted}: give the folder a name of its own", "--run_dir")
        if not first_process():
            return cls(Path(os.environ.get(CLAIMED, base)), fresh=False)
        try:
            parents = [parent for parent in base.parents if not parent.exists()]
            for number in range(1, 10_000):
                folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
                created = not folder.is_dir()
                folder.mkdir(parents=True, exist_ok=True)
                if any(folder.iterdir()):
                    continue
                lock = lock_folder(folder)
                if lock is None or any(folder.iterdir()):  # another process was faster
                    continue
                os.environ[CLAIMED] = str(folder)
                return cls(folder, fresh=True, lock=lock, parents=parents, created=created)
        except OSError as error:
            raise UserError(f"{base}: cannot be used ({error.strerror}): choose another folder", "--run_dir") from error
        raise UserError(f"{base}: there are 10,000 runs of that name: choose another", "--run_dir")

    @classmethod
    def reopen(cls, folder: Path) -> "RunDir":
        """Lock the folder of a run that is resumed."""
        if not first_process():
            return cls(folder, fresh=False)
        advice = "or continue in a new folder with --run_dir"
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass  # the folder is writable
            lock = lock_folder(folder)
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be written to ({error.strerror}): change that, {advice}",
                "--ckpt_path",
            ) from error
        if lock is None:
            raise UserError(f"{folder}: another process is training this run: stop it first, {advice}", "--ckpt_path")
        os.environ[CLAIMED] = str(folder)
        return cls(folder, fresh=False, lock=lock)

    def give_back(self) -> None:
        """Remove what a run without a checkpoint wrote, and the folder and its parents if this process created them."""
        if self.fresh and self.path.is_dir() and not any(self.path.glob("*.ckpt")):
            for path in sorted(self.path.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            if not self._created:
                return
            self.path.rmdir()
            with suppress(OSError):  # a parent holds another run by now
                for parent in self._parents:
                    parent.rmdir()

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        if not started_by_first_process():
            os.environ.pop(CLAIMED, None)


def is_locked(folder: Path) -> bool:
    """Whether another process holds the lock of a folder."""
    lock = lock_folder(folder)
    if lock is not None:
        os.close(lock)
    return lock is None


def lock_folder(folder: Path) -> int | None:
    """Lock a folder until the process ends.

    Systems and file systems without locks behave as if the folder were free.

    Returns:
        A descriptor to close, or None if another process holds the lock.
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
