"""CPU time and peak memory of reading and encoding corpora, against another checkout of gptlit.

    python tests/benchmarks/bench_corpora.py --against ../older-checkout

Every measurement is a process of its own with an empty cache. Memory is the highest resident set of the process,
imports of torch and Lightning included.
"""

import argparse
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import zstandard

ROOT = Path(__file__).parent.parent.parent
PROGRAM = """
import sys
from gptlit import TextDataModule
data = TextDataModule(sys.argv[1])
data.setup()
print(data.corpus.sha256)
"""


def verses(megabytes: float, seed: int = 1) -> list[str]:
    """Return rows of two lines, about 500 characters of invented words, together about so many megabytes."""
    generator = random.Random(seed)
    words = ["".join(generator.choices("etaoinshrdlu", k=generator.randint(2, 9))) for _ in range(20_000)]
    line = lambda: " ".join(generator.choices(words, k=40))  # noqa: E731
    return [f"{line()}\n{line()}" for _ in range(int(megabytes * 1e6 / 520))]


def as_parquet(folder: Path) -> Path:
    """200 MB of text and 200 MB of an unused column in one row group."""
    rows = verses(200)
    table = pyarrow.table({"text": rows, "unused": rows[::-1]})
    pyarrow.parquet.write_table(table, folder / "one-group.parquet", row_group_size=len(rows))
    return folder / "one-group.parquet"


def as_zstandard(folder: Path) -> Path:
    """309 MB of text in about 14 MB: of every megabyte only a twelfth is new."""
    path = folder / "compressible.txt.zst"
    block, fresh = "\n".join(verses(0.45)), verses(27, seed=2)
    share = len(fresh) // 309
    with path.open("wb") as file, zstandard.ZstdCompressor(3).stream_writer(file) as out:
        for number in range(309):
            out.write("\n".join((block, block, *fresh[number * share : (number + 1) * share], "")).encode())
    return path


def as_array(folder: Path) -> Path:
    """A JSON array of 98 MB."""
    path = folder / "array.json"
    path.write_text(json.dumps([{"n": i, "text": text} for i, text in enumerate(verses(94))]))
    return path


def as_lines(folder: Path) -> Path:
    """JSON Lines of 40 MB."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"n": i, "text": text}) + "\n" for i, text in enumerate(verses(39))))
    return path


FILES: list[Callable[[Path], Path]] = [as_parquet, as_zstandard, as_array, as_lines]


def measure(checkout: Path, path: Path) -> tuple[float, float, str]:
    """Return CPU seconds, peak MiB and the checksum of the text."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "PYTHONPATH": str(checkout), "XDG_CACHE_HOME": cache, "HF_HOME": cache}
        child = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(path)],
            cwd=cache,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert child.stdout is not None
        checksum = child.stdout.read().strip()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = status
        if status:
            raise RuntimeError(f"{checkout} ended with status {status} on {path.name}")
        return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, checksum


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, required=True, help="The other checkout.")
    parser.add_argument("--only", nargs="*", default=[], help="Names of the functions that write the files.")
    options = parser.parse_args()
    print("| file | MB | peak MiB, before | now | ratio | CPU seconds, before | now | ratio | same text |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---|")
    with tempfile.TemporaryDirectory() as folder:
        for make in FILES:
            if options.only and make.__name__ not in options.only:
                continue
            with multiprocessing.get_context("spawn").Pool(1) as pool:  # a child starts with the peak of its parent
                path = pool.apply(make, (Path(folder),))
            before, now = (measure(checkout.resolve(), path) for checkout in (options.against, ROOT))
            cells = (
                path.name,
                f"{path.stat().st_size / 1e6:.0f}",
                f"{before[1]:,.0f}",
                f"{now[1]:,.0f}",
                f"{now[1] / before[1]:.2f}",
                f"{before[0]:.1f}",
                f"{now[0]:.1f}",
                f"{now[0] / before[0]:.2f}",
                "yes" if before[2] == now[2] else "no",
            )
            print(f"| {' | '.join(cells)} |", flush=True)
            path.unlink()


if __name__ == "__main__":
    main()
