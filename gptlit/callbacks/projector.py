"""The token embedding as TensorBoard's PROJECTOR tab reads it: three small files in the run folder."""

import unicodedata
from pathlib import Path
from typing import Any

from torch import Tensor

PROJECTOR_ROWS = 2_000  # points that the browser still turns smoothly


def write_projector(run_dir: Path, table: Tensor, tokenizer: Any, step: int) -> None:
    """Embedding (V, C) of the first PROJECTOR_ROWS symbols, for the PROJECTOR tab, in place of the one before.

    SummaryWriter.add_embedding would add a folder at every call, and cannot label a newline.
    """
    rows = table[:PROJECTOR_ROWS].detach().float().tolist()
    symbols = [tokenizer.decode([i]) for i in range(len(rows))]
    folder = run_dir / "projector"
    folder.mkdir(parents=True, exist_ok=True)
    lines = "\n".join("\t".join([f"{value:.4g}" for value in row]) for row in rows)
    (folder / "tensors.tsv").write_text(lines + "\n", encoding="utf-8")
    labels = "\n".join(f"{visible(symbol)}\t{kind_of(symbol)}" for symbol in symbols)
    (folder / "metadata.tsv").write_text(f"symbol\tkind\n{labels}\n", encoding="utf-8")
    (run_dir / "projector_config.pbtxt").write_text(
        f'embeddings {{\n  tensor_name: "token embedding after step {step}"\n'
        '  tensor_path: "projector/tensors.tsv"\n  metadata_path: "projector/metadata.tsv"\n}\n',
        encoding="utf-8",
    )


def visible(symbol: str) -> str:
    """A symbol as a label: white space by its sign, other characters without a shape by their escape."""
    signs = {" ": "␣", "\n": "↵", "\t": "⇥"}
    shown = (signs.get(c, c if c.isprintable() else c.encode("unicode_escape").decode()) for c in symbol)
    return "".join(shown) or "(nothing)"


def kind_of(symbol: str) -> str:
    """To colour by: vowel, consonant, capital, letter, digit, punctuation, space, several (characters), or other."""
    if len(symbol) != 1:
        return "several" if symbol else "other"
    base = unicodedata.normalize("NFD", symbol)[0]
    if base in "aeiou":
        return "vowel"
    if "a" <= base <= "z":
        return "consonant"
    kinds = {"Lu": "capital", "L": "letter", "N": "digit", "P": "punctuation", "S": "punctuation", "Z": "space"}
    category = "Z" if symbol.isspace() else unicodedata.category(symbol)
    return kinds.get(category) or kinds.get(category[0], "other")
