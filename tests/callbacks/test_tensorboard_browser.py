"""TensorBoard as a person sees it: `gptlit fit`, the command that it prints, and its pages in a headless Chromium.

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

# Text that can be seen, and elements, through shadow roots and frames.
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
    """A folder of runs, and the command that fit printed for it."""
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
    """Where the command serves its pages; a free port is the only thing added to it."""
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
        """Goes to a tab, and waits until every text can be read there."""
        if not self.driver.current_url.startswith(self.address):
            self.driver.get(f"{self.address}#{tab}")
        self.driver.execute_script("location.hash = arguments[0]", tab)
        return self.wait(*texts)

    def wait(self, *texts: str) -> str:
        """All that can be read, as soon as it has every one of the texts."""
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
        """What the script returns for each `element` that a CSS selector finds, and its `number`."""
        return self.driver.execute_script(ON_ELEMENTS, selector, script)

    def click(self, selector: str) -> None:
        """Clicks every element that a CSS selector finds."""
        assert self.on_elements(selector, "element.click()"), f"nothing to click: {selector}"

    def picture(self, name: str, height: int = 640, settle: float = 3.0) -> None:
        """Keeps a small screenshot, when a folder is given for it."""
        from PIL import Image

        time.sleep(settle)  # lines are drawn, and animations end, after the text is there
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
    """One browser for all tests."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "enable-unsafe-swiftshader",  # the projector draws with WebGL
        "disable-dev-shm-usage",  # which is small in containers; the renderer dies when it is full
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "window-size=1500,1000",  # narrower, and TensorBoard lays its menus over each other
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


def test_time_series_come_in_clear_groups(board: Board) -> None:
    """Guards against names without a group, or in one group too many."""
    board.open("timeseries", "lr 2 cards")
    board.click("button[aria-label='Toggle settings side pane']")
    board.click("button[data-value='scalars']")
    board.wait("perf 2 cards", "train 3 cards", "val 5 cards")
    groups = board.on_elements(".group-title", "return element.textContent.trim()")
    assert [group for group in groups if group != "Pinned"] == ["lr", "perf", "train", "val"]


def test_train_and_val_share_one_chart(board: Board, runs: tuple[Path, str]) -> None:
    """Guards against a layout whose expressions match no tag: its charts would be there, and empty."""
    board.open("custom_scalars", "loss: train and val", "bits per character", "gradient norm")
    expected = 3 * len(run_dirs(runs[0]))
    text = board.wait(f"Matches ({expected})")
    assert re.search(rf"loss: train and val \(nats per token\).*?Matches \({expected}\)", text)
    assert "Matches (0)" not in text
    board.on_elements("paper-icon-button[icon=fullscreen]", "if (number === 0) element.click()")  # wide
    board.picture("tensorboard-curves", height=560)


def test_samples_through_training_and_the_config_can_be_read(board: Board) -> None:
    """Guards against text that TensorBoard would flow into one paragraph, or that never arrived."""
    board.open("text", "config/text_summary", "seed_everything", "max_steps")
    board.open("text&tagFilter=sample", "sample/text_summary")
    blocks = board.on_elements("pre code", "return element.textContent")
    assert any(text.count("\n") > 3 and "seed_everything" not in text for text in blocks)
    board.on_elements("tf-text-loader", "element.scrollIntoView()")  # the last run
    board.picture("tensorboard-samples")


def test_attention_maps_are_shown(board: Board) -> None:
    """Guards against pictures in a form that the tab cannot show."""
    board.open("images", "attention/layer_1")
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
    """Guards against hp_metric -1, and against a sub-run of its own for the hyper-parameters."""
    names = run_dirs(runs[0])
    text = board.open("hparams", "Trial ID", "best val loss", "last val loss", *names)
    assert "hp_metric" not in text
    rows = board.on_elements("vaadin-grid", "return element.items ? element.items.map(row => row.name) : []")
    assert sorted(rows[0]) == names
    board.on_elements(
        "paper-checkbox.hparam-checkbox",
        "if (['data.batch_size', 'optimizer.lr', 'trainer.max_steps'].includes(element.textContent.trim()))"
        " element.click()",
    )
    board.picture("tensorboard-comparison", height=420)


def test_histograms_show_weights_and_updates(board: Board) -> None:
    """Guards against histograms that were written in a form that the tab cannot draw."""
    board.open("histograms", "updates_log10", "h.0.attn.c_attn")
    assert board.on_elements("path.outline, g.histogram path", "return 1")
    board.picture("tensorboard-updates")


def test_the_projector_labels_every_point_by_its_character(board: Board, runs: tuple[Path, str]) -> None:
    """Guards against a newline in the labels, which would shift them all, and against an embedding without labels."""
    run = runs[0] / run_dirs(runs[0])[-1]
    labels = [line.split("\t")[0] for line in (run / "projector" / "metadata.tsv").read_text("utf-8").splitlines()[1:]]
    channels = len((run / "projector" / "tensors.tsv").read_text().splitlines()[0].split("\t"))
    board.open("projector", "Points: ", "token embedding after step", "symbol")
    board.on_elements("vz-projector-data-panel", f"element.selectedRun = '{run.name}'")
    board.wait(f"Points: {len(labels)}", f"Dimension: {channels}")
    board.on_elements("#z-checkbox", "if (element.checked) element.click()")
    board.on_elements("vz-projector-data-panel", "element.selectedColorOptionName = 'kind'")
    board.on_elements(
        "vz-projector-input", "element.inRegexMode = true; element.paperInput.value = '.'; element.onTextChanged()"
    )
    board.wait(f"Selected {len(labels)} points", "vowel", "capital")
    shown = board.on_elements(".matches-list .row, .matches-list a", "return element.textContent.trim()")
    assert set(shown) <= set(labels)
    assert shown
    board.on_elements("vz-projector-inspector-panel .clear-selection", "element.click()")
    board.on_elements("#labels3DMode", "element.click()")  # the characters themselves, in the colours of their kinds
    board.picture("tensorboard-embedding", height=1000)
