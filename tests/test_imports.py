"""Import order of the packages."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "gptlit"
PACKAGES = sorted({path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")})
LEVELS = [
    {"errors", "version"},
    {"device"},
    {"model", "optim", "tokenizer"},
    {"checkpoint"},
    {"convert", "data", "generation"},
    {"play", "training"},
    {"callbacks"},
    {"cli"},
]
TORCH_ONLY = ("device", "generation", "model", "optim")


def imports_of(package: str) -> set[str]:
    """Return the full names of everything that a package imports, at load time or later."""
    path = PACKAGE / f"{package}.py"
    found: set[str] = set()
    for file in [path] if path.is_file() else sorted((PACKAGE / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
    return found


def packages_imported_by(package: str) -> set[str]:
    """Return the packages of gptlit that a package imports."""
    parts = (name.split(".") for name in imports_of(package))
    return {part[1] for part in parts if part[0] == "gptlit" and len(part) > 1 and part[1] in PACKAGES} - {package}


def test_every_package_has_a_level() -> None:
    """A new package must be given a level."""
    assert set().union(*LEVELS) | {"__init__", "__main__"} == set(PACKAGES)


@pytest.mark.parametrize("level", range(len(LEVELS)))
def test_imports_run_downward_only(level: int) -> None:
    """A package imports packages of lower levels only: `training` does not import `callbacks`."""
    below: set[str] = set().union(*LEVELS[:level])
    for package in LEVELS[level]:
        assert packages_imported_by(package) <= below, package


@pytest.mark.parametrize("package", TORCH_ONLY)
def test_the_mathematics_needs_torch_alone(package: str) -> None:
    """The model can be lifted out of the application and used without Lightning."""
    heavy = {"lightning", "datasets", "transformers", "jsonargparse", "rich", "tensorboard"}
    assert not {name.split(".")[0] for name in imports_of(package)} & heavy


@pytest.mark.parametrize(
    "name", ["gptlit", "gptlit.checkpoint.atomic", "gptlit.data.corpus", "gptlit.errors", "gptlit.tokenizer"]
)
def test_light_packages_do_not_load_torch(name: str) -> None:
    """Importing torch costs seconds."""
    probe = f"import sys, {name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], check=False).returncode == 0
