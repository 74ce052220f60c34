"""The tab in TensorBoard: its routes, its guards, and TensorBoard itself when our package is broken."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command import REPOSITORY, gptlit, write_config
from tensorboard.plugins.base_plugin import TBPlugin
from test_play_page import Document
from werkzeug.test import Client, TestResponse

from gptlit.play import page, read_runs
from gptlit.play.tensorboard_tab import PlayPlugin

ROUTE = "/data/plugin/gptlit_play"


@pytest.fixture(scope="module")
def logdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, one of them deeper; a damaged one; a link that leads out of the folder; and a folder without a run."""
    place = tmp_path_factory.mktemp("board")
    folder = place / "runs"
    config = write_config(place, trainer__max_steps=2)
    assert gptlit("fit", "--config", config, "--run_dir", folder / "one").code == 0
    shutil.copytree(folder / "one", folder / "more" / "two")
    shutil.copytree(folder / "one", place / "outside")
    (folder / "link").symlink_to(place / "outside")
    (folder / "file").mkdir()
    (folder / "file" / "best.ckpt").symlink_to(place / "outside" / "best.ckpt")
    (folder / "damaged").mkdir()
    (folder / "damaged" / "last.ckpt").write_bytes((folder / "one" / "last.ckpt").read_bytes()[:1000])
    (folder / "nothing").mkdir()
    return folder


def plugin(logdir: str | Path, run_paths: dict[str, str] | None = None) -> PlayPlugin:
    """The plugin as TensorBoard makes it."""
    multiplexer = None if run_paths is None else SimpleNamespace(RunPaths=lambda: run_paths)
    return PlayPlugin(SimpleNamespace(logdir=str(logdir), multiplexer=multiplexer))


def ask(made: PlayPlugin, address: str, method: str = "GET", **headers: str) -> TestResponse:
    """Call the route of an address."""
    route = made.get_plugin_apps()[address.partition("?")[0]]
    return Client(route).open(address, method=method, headers=headers)


def runs_of(made: PlayPlugin) -> set[str]:
    """The runs that the plugin lists."""
    return set(json.loads(ask(made, "/runs").get_data(as_text=True)))


# ---------------------------------------------------------------- what TensorBoard needs of every plugin


def test_the_entry_point_is_a_plugin_that_imports_nothing_heavy() -> None:
    """TensorBoard imports it at every start, and does not start if that fails."""
    with (REPOSITORY / "pyproject.toml").open("rb") as file:
        ((name, value),) = tomllib.load(file)["project"]["entry-points"]["tensorboard_plugins"].items()
    loaded = EntryPoint(name, value, "tensorboard_plugins").load()
    assert issubclass(loaded, TBPlugin)
    assert "." not in loaded.plugin_name
    assert all(route.startswith("/") for route in plugin("x").get_plugin_apps())
    before = "import sys, werkzeug, tensorboard.plugins.base_plugin; before = set(sys.modules); "
    after = f"import {value.partition(':')[0]}; print(sorted(m.split('.')[0] for m in set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", before + after], capture_output=True, text=True, check=True)
    found = set(re.findall(r"'(\w+)'", done.stdout))
    assert {name for name in found if name not in sys.stdlib_module_names} <= {"gptlit", "werkzeug"}


def test_the_tab_is_active_where_there_is_a_run(logdir: Path, tmp_path: Path) -> None:
    """An empty or missing folder would otherwise open with our tab; an error is an inactive tab."""
    assert plugin(logdir).is_active()
    assert not plugin(tmp_path).is_active()
    assert not plugin(tmp_path / "missing").is_active()
    assert not plugin("").is_active()
    broken = PlayPlugin(None)
    assert not broken.is_active()


def test_a_slow_folder_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard waits for this answer before it shows any tab; a run found later counts at the next question."""
    release = threading.Event()
    made = plugin("x")

    def slow_runs() -> Iterator[tuple[str, Path]]:
        release.wait(60)
        yield "late", Path()

    monkeypatch.setattr(made, "iter_runs", slow_runs)
    assert not made.is_active()
    assert not made.is_active()  # one search, not one for each question
    release.set()
    assert made._search is not None
    made._search.join()
    assert made.is_active()


# ---------------------------------------------------------------- routes


def test_runs_with_a_checkpoint_inside_of_the_folder_are_listed(logdir: Path) -> None:
    """No link leads out, and the folder itself may be a run."""
    assert runs_of(plugin(logdir)) == {"one", "more/two", "damaged"}
    assert runs_of(plugin(logdir / "one")) == {"one"}
    assert runs_of(plugin("", {"a": str(logdir / "one"), "b": str(logdir / "more")})) == {"a", "b/two"}


def test_a_folder_may_be_relative_or_begin_with_a_tilde(logdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard hands on what was typed."""
    monkeypatch.chdir(logdir.parent)
    monkeypatch.setenv("HOME", str(logdir.parent))
    assert runs_of(plugin("runs")) == runs_of(plugin("~/runs")) == runs_of(plugin(logdir))


def test_the_page_is_that_of_the_command_and_its_script_may_run(logdir: Path) -> None:
    """Of one run and of several, in TensorBoard's colours."""
    answer = ask(plugin(logdir), "/model.html?run=one&run=more/two&theme=dark")
    document = answer.get_data(as_text=True)
    assert answer.status_code == 200
    assert '<html data-theme="dark" lang="en">' in document
    paths = {"one": logdir / "one", "more/two": logdir / "more" / "two"}
    expected = page({name: next(iter(read_runs([path]).values())) for name, path in paths.items()})
    assert document.replace(' data-theme="dark"', "") == expected
    (allowed,) = re.findall(r"script-src '(sha256-[^']*)'", expected.replace("&#x27;", "'"))
    assert f"'{allowed}'" in answer.headers["Content-Security-Policy"]
    assert Document(document).content["models"][1]["name"] == "more/two"


@pytest.mark.parametrize(
    ("address", "status", "said"),
    [
        ("/model.html", 404, "choose a run"),
        ("/model.html?run=three", 404, "no run"),
        ("/model.html?run=../outside", 404, "no run"),
        ("/model.html?run=link", 404, "no run"),
        ("/model.html?run=<script>", 404, "&lt;script&gt;"),
        ("/model.html?run=damaged", 400, "damaged"),
    ],
)
def test_a_run_that_cannot_be_shown_is_a_message(logdir: Path, address: str, status: int, said: str) -> None:
    """Nothing outside of the folder is read, and nothing typed is markup."""
    answer = ask(plugin(logdir), address)
    assert answer.status_code == status
    assert said in answer.get_data(as_text=True)


def test_other_methods_and_other_sites_are_refused(logdir: Path) -> None:
    """TensorBoard checks neither."""
    made = plugin(logdir)
    for route in made.get_plugin_apps():
        assert ask(made, route, "POST").status_code == 405
        for site in ("cross-site", "same-site"):
            assert ask(made, route, **{"Sec-Fetch-Site": site}).status_code == 403
    for site in ("none", "same-origin"):
        assert ask(made, "/runs", **{"Sec-Fetch-Site": site}).status_code == 200
    assert ask(made, "/runs", "HEAD").get_data() == b""


def test_a_failure_of_ours_is_an_answer_and_no_exception(logdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard's other tabs share the process."""
    made = plugin(logdir)
    monkeypatch.setattr(made, "iter_runs", lambda: 1 / 0)
    for route in ("/runs", "/model.html?run=one"):
        answer = ask(made, route)
        assert (answer.status_code, "ZeroDivisionError" in answer.get_data(as_text=True)) == (500, True)


# ---------------------------------------------------------------- TensorBoard with our package broken


def nothing(package: Path) -> None:
    pass


def without_torch(package: Path) -> None:
    (package.parent / "torch.py").write_text("raise ImportError('no torch')\n")


def page_that_raises(package: Path) -> None:
    (package / "play" / "page_file.py").write_text("raise RuntimeError('broken')\n")


def syntax_error(package: Path) -> None:
    (package / "play" / "pack.py").write_text("def\n")


def without_data_files(package: Path) -> None:
    for path in (package / "play").glob("*.[jhc]*s*"):
        path.unlink()


def without_checkpoints(package: Path) -> None:
    shutil.rmtree(package / "checkpoint")


def replaced(package: Path, old: str, new: str) -> None:
    path = package / "play" / "tensorboard_tab.py"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def is_active_that_raises(package: Path) -> None:
    replaced(package, "        if not self._found and (", "        1 / 0\n        if not self._found and (")


def constructor_that_raises(package: Path) -> None:
    replaced(package, "        self.context = context\n", "        1 / 0\n")


def routes_that_raise(package: Path) -> None:
    replaced(package, '        return {"/index.js"', '        1 / 0\n        return {"/index.js"')


BREAKS = [
    nothing,
    without_torch,
    page_that_raises,
    syntax_error,
    without_data_files,
    without_checkpoints,
    is_active_that_raises,
    constructor_that_raises,
    routes_that_raise,
]


@contextmanager
def tensorboard(site: Path, logdir: Path) -> Iterator[str]:
    """Start TensorBoard where the package in `site` is installed with its entry point; yields its address."""
    info = site / "gptlit-0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gptlit\nVersion: 0\n")
    entry = "[tensorboard_plugins]\ngptlit_play = gptlit.play.tensorboard_tab:PlayPlugin\n"
    (info / "entry_points.txt").write_text(entry)
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--host", "127.0.0.1", "--port", "0"],
        env={**os.environ, "PYTHONPATH": path},
        cwd=site,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    said = ""
    try:
        for line in process.stderr:
            said += line
            if found := re.search(r"at (http://127\.0\.0\.1:\d+/)", line):
                threading.Thread(target=process.stderr.read, daemon=True).start()  # a full pipe would stop it
                yield found.group(1)
                return
        pytest.fail(f"TensorBoard does not start: {said}")
    finally:
        process.terminate()
        process.wait(timeout=30)


def fetch(address: str) -> Any:
    """JSON from an address."""
    with urllib.request.urlopen(address, timeout=60) as answer:
        return json.load(answer)


@pytest.mark.slow
@pytest.mark.parametrize("break_package", BREAKS, ids=lambda function: function.__name__.replace("_", " "))
def test_tensorboard_starts_and_its_other_tabs_work(break_package: Any, logdir: Path, tmp_path: Path) -> None:
    """Whatever of ours is broken; ours is listed unless its constructor fails."""
    shutil.copytree(REPOSITORY / "gptlit", tmp_path / "gptlit", ignore=shutil.ignore_patterns("__pycache__"))
    break_package(tmp_path / "gptlit")
    with tensorboard(tmp_path, logdir) as address:
        listed = fetch(f"{address}data/plugins_listing")
        assert {"scalars", "text", "hparams"} <= listed.keys()
        assert ("gptlit_play" in listed) == (break_package is not constructor_that_raises)
        assert "one" in fetch(f"{address}data/runs")
        assert fetch(f"{address}data/plugin/scalars/tags")["one"]
        if break_package is nothing:
            assert set(fetch(f"{address}{ROUTE[1:]}/runs")) == {"one", "more/two", "damaged"}
