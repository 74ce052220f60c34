"""Write a sixth of the training part of a text, and all of its validation part, for trials of small models.

    python tests/benchmarks/small_corpus.py input.txt small.txt

Parts of about 6,000 characters that end at a blank line are counted, and the third of every six is kept. Prints the
`data.val_fraction` that makes the validation part equal to that of the original.
"""

import argparse
from pathlib import Path

PART, EVERY, KEPT = 6000, 6, 2


def sixth(text: str) -> str:
    """Return every sixth part of a text, in order."""
    parts: list[list[str]] = [[]]
    size = 0
    for paragraph in text.split("\n\n"):
        parts[-1].append(paragraph)
        size += len(paragraph) + 2
        if size >= PART:
            parts.append([])
            size = 0
    complete = parts[:-1]  # the last one is shorter
    return "\n\n".join("\n\n".join(part) for part in complete[KEPT::EVERY]) + "\n\n"


def main() -> None:
    """Write the file."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--val_fraction", type=float, default=0.1, help="of the original")
    options = parser.parse_args()
    text = options.text.read_text(encoding="utf-8")
    held_out = text[int(len(text) * (1 - options.val_fraction)) :]
    kept = sixth(text[: len(text) - len(held_out)])
    options.output.write_text(kept + held_out, encoding="utf-8")
    print(f"{len(kept):,} characters to train on: --data.val_fraction {len(held_out) / len(kept + held_out):.5f}")


if __name__ == "__main__":
    main()
