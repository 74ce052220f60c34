"""Imports of large libraries in less time; tests/benchmarks/README.md has the figures."""

import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


@contextmanager
def collector_paused() -> Iterator[None]:
    """Context for the first imports of a process: no garbage collection, and afterwards none of what they made.

    The objects of torch and Lightning live as long as the process. Python's collector reads all of them several times
    while they are made, during training, and when Python exits. A process that has torch already keeps its collector
    as it is, since `gc.freeze` would also keep garbage of its own.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def deferred(package: str) -> Iterator[None]:
    """Context in which `from PACKAGE import Class` yields stand-ins; the package is imported when one is used.

    For packages whose classes are imported, but not used, by what is imported in this context. Importing a module of
    the package ends it. Does nothing if the package is loaded already, or not installed.
    """
    if package in sys.modules or find_spec(package) is None:
        yield
        return
    finder = DeferringFinder(package)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        finder.end()


class DeferringFinder(MetaPathFinder, Loader):
    """Finds a stand-in for a package. Its modules are found where they are."""

    def __init__(self, package: str) -> None:
        self.package = package
        self.stand_in: ModuleType | None = None

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if fullname == self.package:
            return ModuleSpec(fullname, self, is_package=True)
        if fullname.startswith(f"{self.package}."):
            self.end()
            return ModuleSpec(fullname, LoadedModule(import_module(fullname)))
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        self.stand_in = ModuleType(spec.name)
        return self.stand_in

    def exec_module(self, module: ModuleType) -> None:
        def stand_in_for(name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return StandIn(name, (), {"__module__": self.package})

        module.__getattr__ = stand_in_for  # type: ignore[method-assign]

    def end(self) -> None:
        """Let the package be imported as usual."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        if self.stand_in is not None and sys.modules.get(self.package) is self.stand_in:
            del sys.modules[self.package]


class LoadedModule(Loader):
    """Returns a module that is loaded."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing."""


class StandIn(type):
    """A class that imports the class of its name, from the package in its `__module__`, when it is used."""

    def __getattr__(cls, name: str) -> Any:
        return getattr(original(cls), name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return original(cls)(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, original(cls))

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, original(cls))


def original(stand_in: type) -> Any:
    """Import and return what stands behind a stand-in."""
    return getattr(import_module(stand_in.__module__), stand_in.__name__)
