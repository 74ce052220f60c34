"""The page as a file, and `gptlit play`."""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from command import gptlit, load, write_config
from conftest import random_gpt

from gptlit.errors import UserError
from gptlit.model import GPT, GPTConfig
from gptlit.play import page, read_runs, write_page
from gptlit.play.pack import LARGEST_MODEL
from gptlit.play.page_file import OPENING, Run
from gptlit.tokenizer import BPETokenizer, CharTokenizer

SYMBOLS = "".join(sorted(set(OPENING + "abcdefghijklmnopqrstuvwxyz")))


class Document(HTMLParser):
    """Scripts, attributes of all elements, and the title of a document."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.title = ""
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open = tag
        self.attributes.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        if self._open == "title":
            self.title += data

    @property
    def content(self) -> dict[str, Any]:
        """What the page is made of."""
        return json.loads(next(text for attributes, text in self.scripts if attributes.get("id") == "content"))

    @property
    def program(self) -> str:
        """The one script that is executed."""
        (text,) = [text for attributes, text in self.scripts if not attributes]
        return text


def small(symbols: str = SYMBOLS, **settings: Any) -> Run:
    """A model without training."""
    sizes = {"block_size": 8, "n_layer": 1, "n_head": 2, "n_embd": 8, **settings}
    return Run(random_gpt(GPTConfig(vocab_size=len(symbols), **sizes)).float(), CharTokenizer(symbols))


def test_the_page_needs_no_network_and_its_policy_allows_its_own_script_alone() -> None:
    """The page loads no address, and its policy forbids the browser to load any."""
    document = Document(page({"one": small()}))
    loading = [(tag, found) for tag, found in document.attributes if {"src", "href", "action"} & found.keys()]
    assert loading == []
    (policy,) = [found["content"] for _, found in document.attributes if "http-equiv" in found]
    digest = base64.b64encode(hashlib.sha256(document.program.encode()).digest()).decode()
    assert policy == f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'"
    assert not re.search(r"\bfetch\(|XMLHttpRequest|import\(|WebSocket|localStorage", document.program)


def test_names_and_texts_of_any_kind_stay_data() -> None:
    """Guards against a run folder or a text that closes a script, opens a comment, or means a part of the template."""
    name, text = "</script><b>&amp;{{script}}", "</script><!-- {{weights}} \u2028 \U0001f600 \\u003c"
    document = Document(page({name: small()}, text))
    assert document.content["text"] == text
    assert document.content["models"][0]["name"] == name
    assert name in document.title
    assert "b" not in {tag for tag, _ in document.attributes}


def test_weights_are_those_of_the_model_and_a_shared_table_stands_once() -> None:
    """In order, as little-endian float32."""
    run = small(tie_weights=True, norm="layernorm", bias=True)
    document = Document(page({"tied": run}))
    (spec,) = document.content["models"]
    data = next(text for attributes, text in document.scripts if attributes.get("id") == "weights-0")
    numbers = torch.frombuffer(bytearray(base64.b64decode(data)), dtype=torch.float32)
    parameters = dict(run.network.named_parameters())
    assert [name for name, _ in spec["tensors"]] == list(parameters)
    assert torch.equal(numbers, torch.cat([parameter.detach().flatten() for parameter in parameters.values()]))
    assert spec["parameters"] == len(numbers)


def test_float16_halves_the_weights() -> None:
    """Two bytes a number."""
    sizes = []
    for dtype in ("float32", "float16"):
        scripts = Document(page({"one": small()}, dtype=dtype)).scripts
        sizes.append(len(base64.b64decode(next(text for found, text in scripts if found.get("id") == "weights-0"))))
    assert sizes[0] == 2 * sizes[1]


def test_the_page_opens_with_a_text_that_the_model_knows() -> None:
    """A line of Shakespeare, the run's own sample where its alphabet is another, or the text that is asked for."""
    chinese = Run(small("你好世界").network, CharTokenizer("你好世界"), sample="你好世界")
    latin = small()
    opens = [
        Document(page(models)).content["text"] for models in ({"a": latin}, {"b": chinese}, {"b": chinese, "a": latin})
    ]
    assert opens == [OPENING, "你好世界", "你好世界"]
    assert Document(page({"b": small("xFi\n")})).content["text"] == "Fiii\n"
    assert Document(page({"a": latin}, "# ~")).content["text"] == "# ~"


def large(parameters: int) -> Run:
    """A model with so many weights, which take no memory."""
    with torch.device("meta"):
        network = GPT(GPTConfig(vocab_size=parameters // 2, n_layer=0, n_embd=1, n_head=1, position="none"))
    return Run(network, CharTokenizer("ab"))


@pytest.mark.parametrize(
    ("parameters", "dtype", "named"),
    [
        (20_000_000, "float32", ["20.0 M parameters, 76 MiB in float32", "64 MiB", "--dtype float16"]),
        (40_000_000, "float32", ["153 MiB", "use a smaller model"]),
        (40_000_000, "float16", ["76 MiB in float16", "use a smaller model"]),
    ],
)
def test_a_model_that_is_too_large_is_refused_with_its_size_and_the_way_out(
    parameters: int, dtype: Any, named: list[str]
) -> None:
    """float16 is offered only where it helps."""
    assert parameters * 4 > LARGEST_MODEL
    with pytest.raises(UserError) as refused:
        page({"big": large(parameters)}, dtype=dtype)
    assert all(part in str(refused.value) for part in ["big: ", *named])


def set_weight(run: Run, value: float) -> Run:
    run.network.lm_head.weight.data[0, 0] = value
    return run


def word_bpe() -> Run:
    """A BPE that splits its words in another way than GPT-2's."""
    pytest.importorskip("tokenizers")
    definition = BPETokenizer.train("to be or not to be", 260).definition
    digits = {"type": "Digits", "individual_digits": True}
    definition["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, definition["pre_tokenizer"]]}
    return Run(small().network, BPETokenizer(definition))


@pytest.mark.parametrize(
    ("make", "dtype", "named"),
    [
        (lambda: set_weight(small(), float("nan")), "float32", "not finite (lm_head.weight)"),
        (lambda: set_weight(small(), 1e5), "float16", "beyond the range of float16"),
        (word_bpe, "float32", "splits it otherwise"),
        (lambda: Run(small().network, None), "float32", "no tokenizer"),  # type: ignore[arg-type]
    ],
)
def test_a_model_that_the_page_cannot_compute_is_refused(make: Callable[[], Run], dtype: Any, named: str) -> None:
    """By name, with the reason."""
    with pytest.raises(UserError, match="odd") as refused:
        page({"odd": make()}, dtype=dtype)
    assert named in str(refused.value)


def test_a_page_replaces_an_earlier_page_and_no_other_file(tmp_path: Path) -> None:
    """A mistyped name loses nothing, and nothing is left over."""
    target, models = tmp_path / "play.html", {"one": small()}
    write_page(target, models, "first")
    write_page(target, models, "second")
    assert Document(target.read_text(encoding="utf-8")).content["text"] == "second"
    target.write_text("my notes", encoding="utf-8")
    with pytest.raises(UserError, match="not a page of gptlit"):
        write_page(target, models)
    assert target.read_text(encoding="utf-8") == "my notes"
    assert list(tmp_path.iterdir()) == [target]


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of a few steps, one folder with the name of the other in it."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("a", "b", "other/a"):
        config = write_config(folder, trainer__max_steps=2, sample_text__max_new_tokens=20)
        assert gptlit("fit", "--config", config, "--run_dir", folder / name).code == 0
    return folder


def test_the_page_of_a_run_is_written_into_its_folder_and_its_path_printed(runs: Path) -> None:
    """Again, too; the model is that of best.ckpt."""
    for _ in range(2):
        answer = gptlit("play", "--ckpt_path", runs / "a")
        assert (answer.code, answer.out) == (0, f"{runs / 'a' / 'play.html'}\n"), answer.err
    content = Document((runs / "a" / "play.html").read_text(encoding="utf-8")).content
    (model,) = content["models"]
    step = load(runs / "a" / "best.ckpt")["global_step"]
    assert (model["name"], model["note"], model["config"]["n_embd"]) == ("a", f"step {step}", 16)


def test_several_runs_share_a_page_and_are_named_apart(runs: Path, tmp_path: Path) -> None:
    """Given together or one by one; two folders of one name by their paths."""
    page_file = tmp_path / "page.html"
    paths = [runs / "a", runs / "b" / "last.ckpt", runs / "other" / "a"]
    answer = gptlit("play", "--ckpt_path", *paths[:2], "--ckpt_path", paths[2], "--output", page_file, "--text", "null")
    assert (answer.code, answer.out) == (0, f"{page_file}\n"), answer.err
    content = Document(page_file.read_text(encoding="utf-8")).content
    names = [model["name"] for model in content["models"]]
    assert names == [str(runs / "a" / "best.ckpt"), "b/last", str(runs / "other" / "a" / "best.ckpt")]
    assert content["text"] == "null"


def test_a_page_that_cannot_be_written_is_one_line(runs: Path, tmp_path: Path) -> None:
    """It names the file, and nothing is lost."""
    (tmp_path / "notes.html").write_text("mine", encoding="utf-8")
    for output in (tmp_path / "notes.html" / "page.html", tmp_path / "notes.html", tmp_path):
        answer = gptlit("play", "--ckpt_path", runs / "a", "--output", output)
        assert (answer.code, answer.out) == (2, "")
        assert answer.err.startswith(f"gptlit: --output {output}: ")
        assert answer.err.count("\n") == 1
    assert (tmp_path / "notes.html").read_text(encoding="utf-8") == "mine"


def test_runs_are_read_for_python(runs: Path) -> None:
    """`page(read_runs([...]))` is the command's page; its samples come from the run folder."""
    (run,) = read_runs([runs / "a"]).values()
    assert run.sample
    assert run.sample in (runs / "a" / "samples" / "step-000002.txt").read_text(encoding="utf-8")
    assert (
        Document(page({"a": run})).content == Document((runs / "a" / "play.html").read_text(encoding="utf-8")).content
    )
