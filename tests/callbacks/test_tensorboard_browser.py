"""TensorBoard in a headless Chromium: `gptlit fit`, the command and the address that it prints, and the pages.

Slow, and skipped without Chromium, its driver and selenium (`apt-get install chromium chromium-driver`,
`pip install selenium`). Two variables of the environment:

- GPTLIT_TENSORBOARD_RUNS: a folder of runs to look at instead of the two small ones trained here.
- GPTLIT_SCREENSHOTS: a folder for the pictures, such as `tests/screenshots`, which the README shows.
"""

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import REPOSITORY

from gptlit.callbacks.tensorboard import FIRST_COLUMNS

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.chrome.service import Service  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
SCREENSHOTS = os.environ.get("GPTLIT_SCREENSHOTS")
PATIENCE = 180.0  # seconds; a busy machine draws a page in 30

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver"),
]

RUNS = {
    "bigram": ["--model.gpt.n_layer", "0", "--model.gpt.position", "none"],
    "transformer": ["--model.gpt.n_layer", "2", "--trainer.gradient_clip_val", "1.0"],
}
SETTINGS = """
model: {gpt: {block_size: 32, n_head: 2, n_embd: 32}, schedule: {shape: linear}}
data: {corpus: sample, batch_size: 16, estimate_batches: 4}
trainer: {max_steps: 200, val_check_interval: 20, log_every_n_steps: 5}
sample_text: {show: 0}
"""

GROUP = "return element.textContent.trim()"

# Visible text and elements, through shadow roots and frames.
SCRIPT = """
function* nodes(root) {
  for (const node of root.childNodes) {
    if (node.nodeType === 3) { yield node; continue; }
    if (node.nodeType !== 1 || ['STYLE', 'SCRIPT', 'NOSCRIPT', 'TEMPLATE'].includes(node.tagName)) continue;
    const style = getComputedStyle(node);
    if (style.display === 'none' || style.visibility === 'hidden') continue;
    yield node;
    if (node.shadowRoot) yield* nodes(node.shadowRoot);
    if (node.tagName === 'IFRAME' && node.contentDocument) yield* nodes(node.contentDocument);
    yield* nodes(node);
  }
}
"""
TEXT = SCRIPT + "return [...nodes(document)].filter(n => n.nodeType === 3).map(n => n.textContent).join(' ');"
ON_ELEMENTS = (
    SCRIPT
    + "const found = [...nodes(document)].filter(n => n.nodeType === 1 && n.matches(arguments[0]));"
    + "return found.map(new Function('element', 'number', arguments[1]));"
)


def run_dirs(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in folder.glob("*/config.yaml"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder of runs, and the command that `gptlit fit` printed for it."""
    given = os.environ.get("GPTLIT_TENSORBOARD_RUNS")
    if given:
        folder = Path(given).resolve()
        return folder, shlex.join([sys.executable, "-m", "tensorboard.main", "--logdir", folder.name])
    place = tmp_path_factory.mktemp("board")
    (place / "settings.yaml").write_text(SETTINGS, encoding="utf-8")
    command = ""
    for name, flags in RUNS.items():
        fit = [sys.executable, "-m", "gptlit", "fit", "--config", "settings.yaml", *flags]
        path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
        said = subprocess.run(
            [*fit, "--run_dir", f"checkpoints/{name}"],
            cwd=place,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=True,
        ).stderr
        (command,) = set(re.findall(r"^curves +(.*)$", said, flags=re.MULTILINE))
    return place / "checkpoints", command


@pytest.fixture(scope="module")
def address(runs: tuple[Path, str]) -> Iterator[str]:
    """Address of the server that the command starts; only a free port is added to it."""
    folder, command = runs
    process = subprocess.Popen(
        [*shlex.split(command), "--host", "127.0.0.1", "--port", "0"],
        cwd=folder.parent,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if found := re.search(r"at (http://127\.0\.0\.1:\d+/)", line):
                threading.Thread(target=process.stderr.read, daemon=True).start()  # a full pipe would stop it
                yield found.group(1)
                break
        else:
            pytest.fail(f"no address was printed by {command}")
    finally:
        process.terminate()
        process.wait(timeout=30)


class Board:
    """TensorBoard in a browser."""

    def __init__(self, driver: Any, address: str) -> None:
        self.driver, self.address = driver, address

    def open(self, tab: str, *texts: str) -> str:
        """Go to a tab, and wait until every text is visible."""
        if not self.driver.current_url.startswith(self.address):
            self.driver.get(f"{self.address}#{tab}")
        self.driver.execute_script("location.hash = arguments[0]", tab)
        return self.wait(*texts)

    def wait(self, *texts: str) -> str:
        """Return the visible text, as soon as it contains all of the texts."""
        seen = ""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            seen = " ".join(self.driver.execute_script(TEXT).split())
            if all(text in seen for text in texts):
                return seen
            time.sleep(1)
        missing = [text for text in texts if text not in seen]
        raise AssertionError(f"after {PATIENCE:.0f} s the page lacks {missing}; it says: {seen[:3000]}")

    def on_elements(self, selector: str, script: str) -> list[Any]:
        """Run a script for each `element` that a CSS selector finds, with its `number`; return the results."""
        return self.driver.execute_script(ON_ELEMENTS, selector, script)

    def click(self, selector: str) -> None:
        """Click every element that a CSS selector finds."""
        assert self.on_elements(selector, "element.click()"), f"nothing to click: {selector}"

    def picture(self, name: str, height: int = 640, settle: float = 3.0) -> None:
        """Save a small screenshot, if a folder is given for it."""
        from PIL import Image

        time.sleep(settle)  # lines are drawn after the text is there
        image = Image.open(io.BytesIO(self.driver.get_screenshot_as_png())).convert("RGB")
        if SCREENSHOTS:
            image = image.crop((0, 0, image.width, min(height, image.height)))
            small = image.resize((1000, round(1000 * image.height / image.width)), Image.Resampling.LANCZOS)
            Path(SCREENSHOTS).mkdir(parents=True, exist_ok=True)
            small.quantize(128, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
                Path(SCREENSHOTS) / f"{name}.png", optimize=True
            )


@pytest.fixture(scope="module")
def board(address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    """The browser of all tests."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "enable-unsafe-swiftshader",  # charts are drawn with WebGL
        "disable-dev-shm-usage",  # which is small in containers; the renderer dies when it is full
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "window-size=1500,1000",  # if narrower, TensorBoard's menus overlap
        f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.set_page_load_timeout(PATIENCE)
    driver.set_script_timeout(PATIENCE)
    try:
        yield Board(driver, address)
    finally:
        driver.quit()


def test_the_first_view_is_the_loss_of_train_and_val_on_one_chart(board: Board, runs: tuple[Path, str]) -> None:
    """The page opens without a tab in its address; the first card is `loss`, with two colours a run and a legend."""
    board.driver.get(f"{board.address}?smoothing=0")
    text = board.wait("loss", "perf")
    groups = [group for group in board.on_elements(".group-title", GROUP) if group != "Pinned"]
    assert groups[0] == "loss"
    assert "timeseries" in board.driver.current_url.partition("#")[2] or "TIME SERIES" in text
    names = [f"{name}/{part}" for name in run_dirs(runs[0]) for part in ("train", "val")]
    legend = board.wait(*names)
    assert all(name in legend for name in names)
    slider = board.on_elements("mat-slider input, input[type=number]", "return element.value")
    assert any(float(value) == 0 for value in slider if value), "the address turns smoothing off"
    board.click("button[aria-label='Toggle settings side pane']")
    board.on_elements("scalar-card button", "if (number === 2) element.click()")  # full width
    board.picture("tensorboard-curves", height=640, settle=8)


def test_groups_of_scalars_have_names_that_explain_themselves(board: Board) -> None:
    board.open("timeseries", "lr")
    board.click("button[data-value='scalars']")
    board.wait("perf", "train", "val")
    groups = [group for group in board.on_elements(".group-title", GROUP) if group != "Pinned"]
    assert groups == ["loss", "lr", "perf", "train", "val"]


def test_charts_by_topic_have_curves(board: Board) -> None:
    """Guards against a layout whose expressions match no tag: its charts would be there, and empty."""
    board.open("custom_scalars", "loss: train and val", "bits per character", "gradient norm")
    assert "Matches (0)" not in board.wait("Matches (")


def test_samples_come_first_and_the_configuration_is_readable(board: Board) -> None:
    """Guards against text that TensorBoard shows as one paragraph."""
    text = board.open("text", "sample/text_summary", "settings/text_summary", "seed_everything", "max_steps")
    assert text.index("sample/text_summary") < text.index("settings/text_summary")
    board.open("text&tagFilter=sample", "sample/text_summary")
    blocks = board.on_elements("pre code", "return element.textContent")
    assert any(text.count("\n") > 3 and "seed_everything" not in text for text in blocks)
    board.on_elements("tf-text-loader", "element.scrollIntoView()")  # the last run
    board.picture("tensorboard-samples")


def test_attention_maps_are_shown(board: Board) -> None:
    """Guards against pictures in a format that the tab cannot show."""
    board.open("images", "pictures/attention", "pictures/layer_1")
    deadline = time.monotonic() + PATIENCE
    widths: list[int] = []
    while not any(widths) and time.monotonic() < deadline:
        widths = board.on_elements("img", "return element.naturalWidth")
        time.sleep(1)
    assert any(width > 200 for width in widths)
    board.on_elements(
        "paper-checkbox",
        "if (element.textContent.trim() === 'Show actual image size' && !element.checked) element.click()",
    )
    board.picture("tensorboard-attention", height=900)


def test_every_run_is_one_row_with_its_losses(board: Board, runs: tuple[Path, str]) -> None:
    """Guards against hp_metric -1, and against rows for the sub-runs of the losses."""
    names = run_dirs(runs[0])
    text = board.open("hparams", "Trial ID", "val/best_loss", "optimizer.muon_lr", "data.corpus", *names)
    assert "hp_metric" not in text
    rows = board.on_elements("vaadin-grid", "return element.items ? element.items.map(row => row.name) : []")
    assert sorted(rows[0]) == names
    ticked = board.on_elements(
        "paper-checkbox.hparam-checkbox", "return element.checked ? element.textContent.trim() : ''"
    )
    assert set(filter(None, ticked)) == set(FIRST_COLUMNS)
    board.picture("tensorboard-comparison", height=420)


def test_histograms_show_weights_and_updates(board: Board) -> None:
    """Guards against histograms in a format that the tab cannot draw."""
    board.open("histograms", "updates_log10", "h.0.attn.c_attn")
    assert board.on_elements("path.outline, g.histogram path", "return 1")
    board.picture("tensorboard-updates")
