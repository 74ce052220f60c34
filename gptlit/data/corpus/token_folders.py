"""Texts that other projects have already turned into token ids: nanoGPT's files are decoded, litdata's refused."""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptlit.errors import UserError

IDS = 2**20  # ids decoded at a time


def nanogpt_files(folder: Path) -> tuple[Path, ...]:
    """Return `train.bin` and `val.bin` of a data folder of nanoGPT, as many as there are."""
    found = tuple(folder / name for name in ("train.bin", "val.bin") if (folder / name).is_file())
    return found if (folder / "meta.pkl").is_file() or (found and not any(folder.glob("*.txt"))) else ()


def nanogpt_text(path: Path, where: str) -> Iterator[str]:
    """Yield the text of a token file of nanoGPT, decoded with the `meta.pkl` next to it.

    Raises:
        UserError: no `meta.pkl`, or one that is not nanoGPT's, or ids that it does not know.
    """
    import numpy as np

    characters = np.array(nanogpt_characters(path.with_name("meta.pkl"), where))
    with path.open("rb") as stream:
        while len(ids := np.frombuffer(stream.read(2 * IDS), "<u2")):
            if ids.max() >= len(characters):
                raise UserError(f"{where} holds the id {ids.max()}, and its meta.pkl has {len(characters)} characters")
            yield "".join(characters[ids].tolist())


def nanogpt_characters(path: Path, where: str) -> list[str]:
    """Return the characters of a `meta.pkl` in the order of their ids.

    The file is read as plain numbers, texts, lists and dicts; nothing that it names is imported or called.

    Raises:
        UserError: the file is missing, or something else.
    """
    if not path.is_file():
        raise UserError(
            f"{where} holds token ids, and there is no meta.pkl next to it: give the text that they were made from "
            "(nanoGPT's input.txt)"
        )
    try:
        with path.open("rb") as stream:
            table = PlainUnpickler(stream).load()["itos"]
        characters = [table[i] for i in range(len(table))]
    except Exception as error:  # whatever a file that is something else leads to
        raise UserError(f"{path} is not a meta.pkl of nanoGPT: {error}") from error
    if not all(isinstance(character, str) and len(character) == 1 for character in characters):
        raise UserError(f"{path} is not a meta.pkl of nanoGPT: its tokens are not single characters")
    return characters


class PlainUnpickler(pickle.Unpickler):
    """Reads numbers, texts and containers, and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it would import {module}.{name}")


def is_litdata(folder: Path) -> bool:
    """Return whether a folder holds chunks of litdata."""
    try:
        return "chunks" in json.loads((folder / "index.json").read_bytes())
    except (OSError, ValueError):
        return False
