"""The page of `gptlit play` in headless Chromium: first paint, time until a text is read, characters per second.

    python tests/benchmarks/bench_play.py

Prints a table for models of the sizes of `base.yaml` and `best.yaml`, without training. First paint and reading count
from the start of the navigation to the file; sampling counts characters that appear in the text field.
"""

import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent.parent)]
from browser import chromium, resize  # noqa: E402

from gptlit.model import GPT, GPTConfig  # noqa: E402
from gptlit.play import write_page  # noqa: E402
from gptlit.play.page_file import OPENING, Run  # noqa: E402
from gptlit.tokenizer import CharTokenizer  # noqa: E402

SYMBOLS = "\n !$&',-.3:;?" + "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
MODELS = {
    "base, 0.8 M": GPTConfig(vocab_size=65),
    "10.7 M, context 256": GPTConfig(vocab_size=65, block_size=256, n_layer=6, n_head=6, n_embd=384),
}
ROUNDS = 3
SECONDS = 5.0  # of sampling
LENGTH = "return gptlitPlay.state.text.length;"


def model(config: GPTConfig) -> Run:
    """A model with random weights."""
    torch.manual_seed(0)
    network = GPT(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return Run(network.eval(), CharTokenizer(SYMBOLS))


def measure(driver: Any, path: Path) -> tuple[float, float, float]:
    """Seconds until the first paint, seconds until the opening text is read, and characters sampled per second."""
    driver.get("about:blank")
    driver.get(path.as_uri())
    read = "return gptlitPlay.state.panels.every((panel) => panel.reading.length === panel.read.length);"
    while not driver.execute_script(read):
        time.sleep(0.01)
    ready = driver.execute_script("return performance.now();") / 1e3
    paint = driver.execute_script("return performance.getEntriesByName('first-contentful-paint')[0].startTime;") / 1e3
    driver.execute_script("document.getElementById('sample').click();")
    time.sleep(1)  # compiled by then
    before, start = driver.execute_script(LENGTH), time.perf_counter()
    time.sleep(SECONDS)
    rate = (driver.execute_script(LENGTH) - before) / (time.perf_counter() - start)
    driver.execute_script("document.getElementById('sample').click();")
    return paint, ready, rate


def main() -> None:
    """Print one row for each model: medians of the rounds, and the best rate."""
    with tempfile.TemporaryDirectory() as folder, chromium(Path(folder) / "profile", 300) as driver:
        resize(driver, 1400, 1000)
        print(f"| model | first paint, s | {len(OPENING)} characters read, s | characters/s, median | best |")
        print("|---|---:|---:|---:|---:|")
        for name, config in MODELS.items():
            path = Path(folder) / "play.html"
            write_page(path, {"model": model(config)})
            paints, reads, rates = zip(*(measure(driver, path) for _ in range(ROUNDS)), strict=True)
            print(f"| {name} | {median(paints):.2f} | {median(reads):.2f} | {median(rates):.0f} | {max(rates):.0f} |")


if __name__ == "__main__":
    main()
