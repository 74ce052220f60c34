"""`gptlit.cli.imports`: stand-ins for classes of packages that are not needed, and the garbage collector."""

import gc
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from gptlit.cli.imports import collector_paused, deferred

PACKAGE = "a_large_package"
INIT = """
class Thing:
    def __init__(self, size=1):
        self.size = size

    @classmethod
    def made(cls):
        return cls(7)
"""


@pytest.fixture(autouse=True)
def _package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / PACKAGE).mkdir()
    (tmp_path / PACKAGE / "__init__.py").write_text(INIT)
    (tmp_path / PACKAGE / "part.py").write_text(f"from {PACKAGE} import Thing\nmade = Thing.made()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    finders = list(sys.meta_path)
    yield
    assert sys.meta_path == finders
    for name in [name for name in sys.modules if name.startswith(PACKAGE)]:
        del sys.modules[name]


def thing() -> Any:
    """Import a class of the package while that is deferred."""
    with deferred(PACKAGE):
        found = import_module(PACKAGE).Thing
    assert PACKAGE not in sys.modules
    return found


def test_a_class_is_loaded_when_it_is_used() -> None:
    """As an instance, by its methods, and in checks of types; in annotations it stays unused."""
    stand_in = thing()
    assert tuple[stand_in, int] | None
    assert PACKAGE not in sys.modules
    assert stand_in.made().size == 7
    real = import_module(PACKAGE).Thing
    assert stand_in is not real
    assert type(stand_in(size=2)) is real
    assert isinstance(real(), stand_in)
    assert not isinstance(1, stand_in)
    assert issubclass(real, stand_in)


def test_a_module_of_the_package_ends_the_wait() -> None:
    """It may need the package itself."""
    with deferred(PACKAGE):
        assert import_module(PACKAGE).Thing
        part = import_module(f"{PACKAGE}.part")
        assert sys.modules[f"{PACKAGE}.part"] is part
        assert type(part.made) is import_module(PACKAGE).Thing
    assert part.made.size == 7


def test_what_is_loaded_or_missing_stays_as_it_is() -> None:
    """Nothing is replaced, and a missing package stays missing."""
    real = import_module(PACKAGE)
    with deferred(PACKAGE):
        assert import_module(PACKAGE) is real
    with deferred("no_such_package"), pytest.raises(ModuleNotFoundError):
        import_module("no_such_package")


def test_a_failure_ends_the_wait_too() -> None:
    """Guards against a stand-in that stays behind."""
    with suppress(ModuleNotFoundError), deferred(PACKAGE):
        assert import_module(PACKAGE).Thing
        import_module("no_such_package")
    assert import_module(PACKAGE).Thing.made().size == 7


@pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers")
def test_lightning_leaves_transformers_alone() -> None:
    """A contract with the installed torchmetrics: it only imports classes, which must still work."""
    probe = (
        "import sys; from gptlit.cli.messages import quiet_libraries; quiet_libraries();"
        "assert 'transformers' not in sys.modules, 'is loaded';"
        "from torchmetrics.functional.text.bert import AutoModel;"
        "loads = AutoModel.from_pretrained; import transformers; assert loads == transformers.AutoModel.from_pretrained"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_collector_rests_during_the_first_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Afterwards it works again, without what was imported."""
    monkeypatch.delitem(sys.modules, "torch")
    try:
        with suppress(ModuleNotFoundError), collector_paused():
            assert not gc.isenabled()
            import_module("no_such_package")
        assert gc.isenabled()
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


def test_the_collector_of_a_running_program_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that calls `run` has garbage of its own, which must not be kept; one without a collector gets none."""
    before = gc.get_freeze_count()
    with collector_paused():  # torch is loaded
        assert gc.isenabled()
    monkeypatch.delitem(sys.modules, "torch")
    gc.disable()
    try:
        with collector_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
    assert gc.get_freeze_count() == before
