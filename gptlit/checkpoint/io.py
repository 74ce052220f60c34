"""Lightning's checkpoint plugin: atomic writes, safe reads, and no second read of a file that is in memory."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.utils import _pytree as pytree

from gptlit.checkpoint.atomic import atomic_write
from gptlit.checkpoint.files import ResumePoint
from gptlit.checkpoint.torch_file import read_torch_file, write_torch_file

LARGE = ("state_dict", "optimizer_states", "current_model_state")  # parts of a checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically and reads tensors and plain types only.

    Args:
        start: checkpoint that was read already, if any. The first `load_checkpoint` of its path returns that content
            and takes the tensors out of it, so that the file is read once and its disk space can be freed.
    """

    def __init__(self, start: ResumePoint | None = None) -> None:
        super().__init__()
        self._start = start

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint with `torch.save`; it replaces the target only when it is complete and on the disk.

        Raises:
            OSError: with the name of the target, whose old content is unchanged.
        """
        with atomic_write(path) as file:
            write_torch_file(checkpoint, file)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Return the content of a checkpoint on `map_location` (default: CPU). Nothing in the file is executed.

        Raises:
            UserError: as `read_torch_file`.
        """
        start = self._start
        if start is None or start.path != Path(path) or map_location not in (None, "cpu"):
            return read_torch_file(Path(path), map_location or "cpu", mmap=False)
        self._start = None
        content = dict(start.checkpoint)
        for part in LARGE:
            start.checkpoint.pop(part, None)
        # The tensors are mapped from a file that training will replace. The model copies its weights by itself.
        weights = content.pop("state_dict", {})
        return {"state_dict": weights, **pytree.tree_map_only(torch.Tensor, torch.clone, content)}
