"""`gptlit.cli.imports`: the garbage collector during the first imports of a process."""

import gc
import sys
from contextlib import suppress
from importlib import import_module

import pytest

from gptlit.cli.imports import collector_paused


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
