"""Atomic writing of checkpoints."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames, so that a file under its own name is whole at every moment."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes, waits for the disk, renames; leaves nothing behind when it cannot.

        Raises:
            OSError: with the name of the target; what the target held before is untouched.
        """
        target = Path(path)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, target)
            wait_for_disk(target.parent)  # the new name, too, survives a power cut
        except (OSError, RuntimeError) as error:
            # torch.save hides a full disk behind a RuntimeError of its own.
            reason = error if isinstance(error, OSError) else error.__context__
            if not isinstance(reason, OSError):
                raise
            raise OSError(reason.errno, reason.strerror, str(target)) from error
        finally:
            with suppress(OSError):
                partial.unlink()

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads tensors and plain types only; nothing in the file is executed."""
        return torch.load(path, map_location=map_location or "cpu", weights_only=True)


def wait_for_disk(folder: Path) -> None:
    """Waits until the names in a folder have reached the disk, where the system can tell."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
