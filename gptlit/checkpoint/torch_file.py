"""Files of `torch.save`: safe reading, and writing with the errors of the operating system."""

import pickle
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from gptlit.errors import UserError


class DamagedCheckpointError(UserError):
    """A file that is empty, cut short or changed, or that no program wrote as a checkpoint."""


def untrusted(place: object, setting: str) -> UserError:
    """Return the error for a file that `torch.load` refuses with `weights_only=True`."""
    return UserError(
        f"{place}: the file holds more than tensors and plain types; it is not trusted, and nothing in it was executed",
        setting,
    )


def write_torch_file(content: dict[str, Any], stream: IO[bytes]) -> None:
    """Write a dict with `torch.save`.

    Args:
        content: tensors and plain types.
        stream: opened by Python. A path would be opened by torch, which then does not say why writing failed.

    Raises:
        OSError: if writing fails, for example on a full disk.
    """
    try:
        torch.save(content, stream)
    except RuntimeError as error:  # torch.save hides a full disk behind a RuntimeError of its own
        reason = error.__context__
        if not isinstance(reason, OSError):
            raise
        raise OSError(*reason.args[:2]) from error


def read_torch_file(
    path: Path, map_location: Any = "cpu", mmap: bool = True, setting: str = "--ckpt_path"
) -> dict[str, Any]:
    """Read a dict of tensors and plain types. Nothing in the file is executed; every byte is checked by its CRC-32.

    Args:
        path: file in torch's zip format, the default since torch 1.6.
        map_location: device of the tensors, as for `torch.load`.
        mmap: map the tensors into memory instead of reading them. Only for `map_location` "cpu".
        setting: name of the setting that holds the path, for messages.

    Raises:
        DamagedCheckpointError: if the file is empty or damaged.
        UserError: if it is missing, not a dict, or holds anything but tensors and plain types.
    """
    try:
        if path.stat().st_size == 0:
            raise DamagedCheckpointError(f"{path}: the file is empty", setting)
        if not zipfile.is_zipfile(path):
            raise DamagedCheckpointError(
                f"{path}: the file is cut short or not a checkpoint written by torch.save; nothing in it was executed",
                setting,
            )
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not verify the checksums
        if damaged is not None:
            problem = f"{path}: the file is damaged: the checksum of {damaged} does not match"
            raise DamagedCheckpointError(problem, setting)
        content = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: the file cannot be read ({error.strerror or error})", setting) from error
    except pickle.UnpicklingError as error:
        raise untrusted(path, setting) from error
    except Exception as error:  # a damaged archive can raise any exception
        problem = f"{path}: the file is damaged or not a checkpoint ({type(error).__name__})"
        raise DamagedCheckpointError(problem, setting) from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a checkpoint (it holds a {type(content).__name__})", setting)
    return content
