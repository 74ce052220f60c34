"""The page as a user meets it, in a headless Chromium: numbers, sampling, keyboard, scripts, sizes, TensorBoard's tab.

Slow, and skipped without Chromium, its driver and selenium (`apt-get install chromium chromium-driver`,
`pip install selenium`). Two variables of the environment:

- GPTLIT_PLAY_RUNS: run folders, separated by `:`, for the pictures, instead of models without training.
- GPTLIT_SCREENSHOTS: a folder for the pictures, such as `tests/screenshots`.
"""

import math
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import chromium, keep_screenshot, needs_chromium, resize
from command import REPOSITORY, gptlit, write_config
from conftest import random_gpt
from node import CLOSE, DESCRIBE, POSITIONS, SWITCHES, assert_equals_pytorch, random_ids, random_model
from test_play_tensorboard import tensorboard

from gptlit.generation import Sampling, generate
from gptlit.model import GPTConfig
from gptlit.play import read_runs, write_page
from gptlit.play.page_file import Run
from gptlit.tokenizer import CharTokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), needs_chromium]
PATIENCE = 180.0  # seconds; a busy machine needs 30
SYMBOLS = "\n !',.:;?" + "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz" + "0123"  # 65
SIZES = {"wide": (1400, 1000), "tablet": (820, 1180), "phone": (390, 844)}
TEXT = "First Citizen:\nBefore we proceed any further, hear me speak."
MIXED = "春天来了，花开了。\nجاء الربيع وتفتحت الأزهار.\nSpring is here."
READ_ALL = "return gptlitPlay.state.panels.every((panel) => panel.reading.length === panel.read.length);"


class Page:
    """The page in the browser."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def run(self, script: str, *values: Any) -> Any:
        """Run a script, and return what it returns."""
        return self.driver.execute_script(script, *values)

    def wait(self, script: str, *values: Any) -> None:
        """Wait until a script returns true."""
        deadline = time.monotonic() + PATIENCE
        while not self.run(script, *values):
            assert time.monotonic() < deadline, f"not true after {PATIENCE:.0f} s: {script}"
            time.sleep(0.1)

    def open(self, path: Path, width: int = 1400, height: int = 1000, dark: bool = False) -> None:
        """Open a page from its file, and wait until the models have read its text."""
        resize(self.driver, width, height, dark)
        self.driver.get(path.as_uri())
        self.settle()

    def settle(self) -> None:
        """Wait until the page has loaded and rendered."""
        self.wait(READ_ALL)
        self.driver.execute_async_script("const done = arguments[0]; requestAnimationFrame(() => setTimeout(done));")

    def type(self, text: str) -> None:
        """Type a text in the place of what is there."""
        self.run(
            "const box = document.getElementById('text'); box.value = arguments[0];"
            "box.dispatchEvent(new Event('input'));",
            text,
        )
        self.settle()

    def set(self, name: str, value: float) -> None:
        """Set a slider or the seed."""
        self.run(
            "const box = document.getElementById(arguments[0]); box.value = arguments[1];"
            "box.dispatchEvent(new Event('input'));",
            name,
            value,
        )
        self.settle()

    def click(self, selector: str) -> None:
        """Click an element."""
        self.driver.find_element("css selector", selector).click()

    def text(self, selector: str) -> str:
        """What an element shows."""
        return " ".join(self.driver.find_element("css selector", selector).text.split())

    def samples(self, count: int) -> str:
        """Click on Sample until there are `count` more characters; returns the first `count` of them."""
        before = self.run("return gptlitPlay.state.text;")
        self.click("#sample")
        self.wait("return gptlitPlay.state.text.length >= arguments[0];", len(before) + count)
        self.click("#sample")
        self.settle()
        assert self.text("#sample") == "Sample"
        return self.run("return gptlitPlay.state.text;")[len(before) : len(before) + count]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """One browser for all tests; its console must stay empty."""
    with chromium(tmp_path_factory.mktemp("profile"), PATIENCE) as driver:
        yield Page(driver)


@pytest.fixture(autouse=True)
def no_errors(page: Page) -> Iterator[None]:
    """Nothing that the page refuses, requests or fails at stays unseen."""
    yield
    messages = (entry["message"] for entry in page.driver.get_log("browser"))
    ours = [message for message in messages if not message.startswith("http") or "/gptlit_play/" in message]
    assert ours == []  # TensorBoard's own pages have warnings


def run_of(symbols: str = SYMBOLS, **settings: Any) -> Run:
    """A model of characters without training, whose distributions are far from flat."""
    sizes = {"block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 32, **settings}
    return Run(random_gpt(GPTConfig(vocab_size=len(symbols), **sizes)).float(), CharTokenizer(symbols))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """A page of one model."""
    path, run = tmp_path_factory.mktemp("one") / "play.html", run_of()
    write_page(path, {"one": run})
    return path, run


# ---------------------------------------------------------------- numbers


def test_every_dialect_computes_what_pytorch_computes(page: Page, tmp_path: Path) -> None:
    """Logits, surprise, rank and attention at 200 positions, each dialect alone on one page of all."""
    models = {name: random_model(GPTConfig(**switches)) for name, switches in SWITCHES.items()}
    symbols = [(SYMBOLS + "Éé")[: model.config.vocab_size] for model in models.values()]
    runs = {
        name: Run(model.float(), CharTokenizer(s)) for (name, model), s in zip(models.items(), symbols, strict=True)
    }
    write_page(tmp_path / "play.html", runs)
    page.open(tmp_path / "play.html")
    for number, (name, model) in enumerate(models.items()):
        page.run(
            "const boxes = [...document.querySelectorAll('#models input')];"
            "boxes.forEach((box, i) => (box.checked = i === arguments[0]));"
            "boxes[arguments[0]].dispatchEvent(new Event('change', { bubbles: true }));",
            number,
        )
        ids = random_ids(model, POSITIONS)
        page.type(runs[name].tokenizer.decode(ids))
        read = page.run(f"{DESCRIBE} return describe(gptlitPlay.state.panels[0].reading);")
        assert page.text(".panel h2") == name
        assert len(read) == POSITIONS
        assert_equals_pytorch(model.double(), ids, read)


def test_what_is_shown_are_the_models_numbers(page: Page, one: tuple[Path, Run]) -> None:
    """Bars, typed character, surprise, rank and bits per character."""
    path, run = one
    page.open(path)
    page.type("Hello, Juliet")
    ids = run.tokenizer.encode("Hello, Juliet")
    with torch.no_grad():
        logs = run.network(torch.tensor([ids]))[0].log_softmax(1)  # (T, V)
    bits = [-float(logs[i, ids[i + 1]]) / math.log(2) for i in range(len(ids) - 1)]
    assert page.text(".score") == f"{sum(bits) / 12:.2f} bits per character ({sum(bits):.0f} bits, 12 characters)"
    shown = page.run(
        "return [...document.querySelectorAll('.bars tbody tr')].map((row) => row.innerText.split(/\\s+/));"
    )
    for rank, ((p, i), cells) in enumerate(zip(zip(*logs[-1].exp().topk(10), strict=True), shown, strict=True), 1):
        label = run.tokenizer.decode([int(i)]).replace(" ", "␣").replace("\n", "↵")
        assert cells[:2] == [str(rank), label]
        assert float(cells[2]) == pytest.approx(100 * float(p), rel=0.06, abs=1e-4)
    page.click("#token-0-7")  # the J of Juliet, predicted from "Hello, "
    page.settle()
    before = logs[6].exp()
    rank = 1 + int((before > before[ids[7]]).sum())
    assert page.text(".next h3") == "Prediction of “J”"
    assert page.text(".selected").startswith(f"{bits[6]:.2f} bits, probability ")
    assert page.text(".selected").endswith(f"rank {rank} of 65")
    assert page.text(".bars .typed").startswith(f"{rank} J typed")


def test_sliders_reshape_the_bars(page: Page, one: tuple[Path, Run]) -> None:
    """The probability used for sampling, with the model's own in brackets."""
    path, _ = one
    page.open(path)
    page.set("top-k", 3)
    rows = page.run("return [...document.querySelectorAll('.bars .value')].map((cell) => cell.innerText);")
    assert sum(float(row.split()[0]) for row in rows) == pytest.approx(100, abs=0.2)
    assert rows[3].startswith("0 % (")
    page.click("#reset")
    page.settle()
    assert page.text("output[for=top-k]") == "off"


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=0), Sampling(temperature=0.8), Sampling(top_k=5, top_p=0.9, min_p=0.05)], ids=str
)
def test_sampled_text_equals_that_of_generate(page: Page, one: tuple[Path, Run], sampling: Sampling) -> None:
    """Character for character for the same seed, beyond the context too; step by step continues the same text."""
    path, run = one
    page.open(path)
    page.type("ROMEO:")
    page.set("seed", 7)
    page.set("temperature", sampling.temperature)
    for name in ("top_k", "top_p", "min_p"):
        value = getattr(sampling, name)
        if value is not None:
            page.set(name.replace("_", "-"), value)
    for _ in range(3):
        page.click("#step")
        page.settle()
    sampled = page.run("return gptlitPlay.state.text;")[6:] + page.samples(100)
    assert len(sampled) == 103
    ids = generate(run.network, [run.tokenizer.encode("ROMEO:")], 103, sampling, seed=7, context="rolling")
    assert sampled == run.tokenizer.decode(int(i) for i in ids)
    page.click("#undo")
    page.settle()
    assert page.run("return document.getElementById('text').value;") == "ROMEO:"


def test_samples_after_a_text_longer_than_the_context_are_those_of_predict(page: Page, one: tuple[Path, Run]) -> None:
    """The sampler begins with the last block_size tokens; a later text is read as if there had been no samples."""
    path, run = one
    page.open(path)
    page.type(TEXT)
    page.set("seed", 7)
    sampled = page.samples(60)
    prompt = run.tokenizer.encode(TEXT)
    assert len(prompt) > run.network.config.block_size
    ids = generate(run.network, [prompt], 60, Sampling(), seed=7, context="rolling")
    assert sampled == run.tokenizer.decode(int(i) for i in ids)
    longer = page.run("return gptlitPlay.state.text;") + "!"
    score = "return gptlitPlay.state.panels[0].score.textContent;"
    page.type(longer)
    kept = page.run(score)
    page.open(path)
    page.type(longer)
    assert page.run(score) == kept


def test_an_empty_text_begins_with_a_new_line(page: Page, one: tuple[Path, Run]) -> None:
    """As `gptlit predict` does without a prompt."""
    path, run = one
    page.open(path)
    page.type("")
    page.click("#step")
    page.settle()
    ids = generate(run.network, [run.tokenizer.encode("\n")], 1, seed=1337)
    assert page.run("return gptlitPlay.state.text;") == "\n" + run.tokenizer.decode(int(i) for i in ids)


def test_a_long_text_is_read_from_its_end(page: Page, one: tuple[Path, Run]) -> None:
    """And the page says so."""
    path, _ = one
    page.open(path)
    page.type("x" * 2000 + "y" * 5000)
    assert page.run("return gptlitPlay.state.panels[0].read.length;") == 5000
    assert "the first 2,000 are left out" in page.text("#text-status")


# ---------------------------------------------------------------- several models, other scripts


def test_models_stand_side_by_side_on_the_same_text(page: Page, tmp_path: Path) -> None:
    """A bigram model shows its table; a character that one vocabulary lacks is skipped there alone."""
    runs = {"bigram": run_of(n_layer=0, position="none"), "capitals": run_of(SYMBOLS[:35])}
    write_page(tmp_path / "play.html", runs, "Hi YOU")
    page.open(tmp_path / "play.html")
    left, right = page.run("return [...document.querySelectorAll('.panel')].map((p) => p.getBoundingClientRect().x);")
    assert left < right
    assert "capitals skips 1 that its vocabulary lacks: i" in page.text("#text-status")
    assert page.run("return document.querySelectorAll('.table canvas').length;") == 1
    assert page.run("return [...document.querySelectorAll('.unknown')].map((span) => span.innerText);") == ["i"]
    table = run_of(n_layer=0, position="none").network(torch.arange(65)[:, None])[:, 0].softmax(1).detach()
    shown = page.run("return gptlitPlay.state.panels[0].inside.table.map((row) => Array.from(row));")
    assert float((torch.tensor(shown) - table).abs().max()) < CLOSE
    assert page.text(".table + p").startswith("after “U”: ")


def test_chinese_and_arabic_are_shown_in_their_own_direction_and_joined(page: Page, tmp_path: Path) -> None:
    """Each paragraph by its own letters; colours do not tear the letters of a word apart."""
    run = run_of("".join(sorted(set(MIXED))))
    write_page(tmp_path / "play.html", {"scripts": run}, MIXED)
    page.open(tmp_path / "play.html")
    x = "return document.getElementById(`token-0-${arguments[0]}`).getBoundingClientRect().x;"
    chinese, arabic, english = MIXED.index("天"), MIXED.index("ا"), MIXED.index("p")
    assert page.run(x, chinese) < page.run(x, chinese + 1)
    assert page.run(x, arabic) > page.run(x, arabic + 1)
    assert page.run(x, english) < page.run(x, english + 1)
    widths = page.run(
        """
        const word = arguments[0], start = arguments[1], box = document.querySelector('.reading .tokens');
        const spans = [...word].map((_, i) => document.getElementById(`token-0-${start + i}`).getBoundingClientRect());
        const plain = document.createElement('span');
        plain.textContent = word;
        box.append(plain);
        const width = plain.getBoundingClientRect().width;
        plain.remove();
        return [Math.max(...spans.map((s) => s.right)) - Math.min(...spans.map((s) => s.left)), width];
        """,
        "الربيع",
        MIXED.index("الربيع"),
    )
    assert widths[0] == pytest.approx(widths[1], abs=1)
    page.click(f"#token-0-{arabic}")
    page.settle()
    page.driver.switch_to.active_element.send_keys("\ue012")  # left: on, in a text that runs to the left
    page.settle()
    assert page.run("return gptlitPlay.state.chosen;") == arabic + 1
    assert page.run("return getComputedStyle(document.getElementById('text')).unicodeBidi;") == "plaintext"


# ---------------------------------------------------------------- access and looks


def test_keyboard_and_screen_reader_reach_everything(page: Page, one: tuple[Path, Run]) -> None:
    """Arrow keys choose a character, which is announced; every control has a name."""
    path, _ = one
    page.open(path)
    page.type("Hello")
    page.run("document.querySelector('[role=listbox]').focus();")
    box = page.driver.switch_to.active_element
    box.send_keys("\ue012", "\ue012")  # left, twice: the second l
    page.settle()
    active = page.run("return document.activeElement.getAttribute('aria-activedescendant');")
    label = page.run("return document.getElementById(arguments[0]).getAttribute('aria-label');", active)
    assert active == "token-0-3"
    assert re.fullmatch(r"l: [\d.]+ bits, probability [\d.]+ %, rank \d+ of 65", label)
    box.send_keys("\ue00c")  # escape
    page.settle()
    assert page.run("return document.activeElement.getAttribute('aria-activedescendant');") == "token-0-end"
    tree = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = {"button", "checkbox", "combobox", "listbox", "slider", "spinbutton", "textbox", "DisclosureTriangle"}
    controls = [node for node in tree if node.get("role", {}).get("value") in roles]
    assert len(controls) >= 14
    assert [node["role"]["value"] for node in controls if not node.get("name", {}).get("value")] == []


CONTRAST = """
const luminance = (color) => {
  const [r, g, b] = color.map((c) => (c / 255 <= 0.03928 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const rgb = (color) => {
  const canvas = document.createElement('canvas').getContext('2d');
  canvas.fillStyle = color;
  canvas.fillRect(0, 0, 1, 1);
  return Array.from(canvas.getImageData(0, 0, 1, 1).data).slice(0, 3);
};
const style = (selector, name) => rgb(getComputedStyle(document.querySelector(selector))[name]);
const span = document.querySelector('.reading .tokens span');
span.style.setProperty('--share', '100%');
const pairs = [
  [style('.reading .tokens span', 'color'), style('.reading .tokens span', 'backgroundColor')],
  [style('.quiet', 'color'), style('.card', 'backgroundColor')],
  [style('#sample', 'color'), style('#sample', 'backgroundColor')],
];
return pairs.map((pair) => pair.map(luminance).sort()).map(([dark, light]) => (light + 0.05) / (dark + 0.05));
"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_the_page_fits_every_size_and_can_be_read(page: Page, tmp_path: Path, size: str, dark: bool) -> None:
    """Nothing runs out at the side, with one model and with three; text has a contrast of 4.5 or more."""
    given = os.environ.get("GPTLIT_PLAY_RUNS")
    runs: Any = (
        read_runs(given.split(":")) if given else {"bigram": run_of(n_layer=0, position="none"), "base": run_of()}
    )
    write_page(tmp_path / "play.html", runs, TEXT)
    page.open(tmp_path / "play.html", *SIZES[size], dark=dark)
    page.run("document.querySelectorAll('details').forEach((details) => (details.open = true));")
    page.run("document.getElementById('token-0-33').click();")
    page.set("temperature", 0.7)
    assert page.run("return document.documentElement.scrollWidth <= innerWidth;")
    assert min(page.run(CONTRAST)) >= 4.5
    page.run("document.querySelector('.reading .tokens span').style.setProperty('--share', '0%');")
    keep_screenshot(page.driver, f"play-{size}-{'dark' if dark else 'light'}")


def test_other_scripts_as_a_picture(page: Page, tmp_path: Path) -> None:
    """For the reader of the documents; of a trained run where one is given."""
    given = os.environ.get("GPTLIT_PLAY_SCRIPTS_RUN")
    runs: Any = read_runs([given]) if given else {"scripts": run_of("".join(sorted(set(MIXED))))}
    write_page(tmp_path / "play.html", runs, MIXED)
    page.open(tmp_path / "play.html", 1000, 620)
    page.run("document.getElementById(`token-0-${arguments[0]}`).click();", MIXED.index("وت"))
    page.settle()
    keep_screenshot(page.driver, "play-scripts")


# ---------------------------------------------------------------- TensorBoard

FRAMES = """
function* nodes(root) {
  for (const node of root.querySelectorAll('*')) {
    yield node;
    if (node.shadowRoot) yield* nodes(node.shadowRoot);
  }
}
return [...nodes(document)].find((node) => node.tagName === 'IFRAME' && node.offsetParent !== null);
"""


def enter_frame(page: Page) -> None:
    """Wait for a visible frame, and go into it."""
    deadline = time.monotonic() + PATIENCE
    while (frame := page.run(FRAMES)) is None:
        assert time.monotonic() < deadline, "no frame"
        time.sleep(0.5)
    page.driver.switch_to.frame(frame)


def test_the_tab_of_tensorboard_shows_the_page_of_the_run_that_is_chosen(page: Page, tmp_path: Path) -> None:
    """Opened, a run chosen, the same numbers."""
    config = write_config(tmp_path, trainer__max_steps=3)
    for name in ("first", "second"):
        assert gptlit("fit", "--config", config, "--run_dir", tmp_path / "runs" / name).code == 0
    site = tmp_path / "site"
    shutil.copytree(REPOSITORY / "gptlit", site / "gptlit", ignore=shutil.ignore_patterns("__pycache__"))
    with tensorboard(site, tmp_path / "runs") as address:
        resize(page.driver, 1400, 1000)
        page.driver.get(f"{address}#gptlit_play")
        enter_frame(page)
        page.wait("return document.querySelectorAll('input[name=run]').length === 2;")
        for name, wanted in (("first", True), ("second", False)):  # the newest is chosen at first
            box = page.driver.find_element("css selector", f"input[value={name}]")
            if box.is_selected() != wanted:
                box.click()
        page.wait("return document.querySelector('iframe').src.includes('run=first');")
        time.sleep(1)  # the page of the run chosen before may still be there
        enter_frame(page)
        page.wait("return 'gptlitPlay' in window;")
        page.wait("return document.querySelector('.panel h2')?.textContent === 'first';")
        page.type("First voice")
        read = page.run(f"{DESCRIBE} return describe(gptlitPlay.state.panels[0].reading);")
        (run,) = read_runs([tmp_path / "runs" / "first"]).values()
        assert_equals_pytorch(run.network.double(), run.tokenizer.encode("First voice"), read)
        page.driver.switch_to.default_content()
        keep_screenshot(page.driver, "tensorboard-play")
    page.driver.get("about:blank")
