"""The plan of the house: who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "gptlit"
ROOMS = sorted({path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")})
LEVELS = [
    {"errors", "verbs"},
    {"config", "affine", "tokenizer", "seeds", "progress"},
    {"kv_cache"},
    {"model"},
    {"decode", "optim", "corpus", "compiling", "devices", "huggingface"},
    {"folding"},
    {"lean", "graphed"},
    {"reader", "graphed_training"},
    {"sampling", "pretrained", "card"},
    {"drawing", "export"},
    {"data", "module"},
    {"callbacks"},
    {"cli"},
]
TORCH_ONLY = (
    "config",
    "kv_cache",
    "model",
    "affine",
    "decode",
    "folding",
    "lean",
    "graphed",
    "graphed_training",
    "reader",
    "sampling",
    "optim",
    "drawing",
    "seeds",
    "compiling",
    "devices",
)


def imports_of(room: str) -> set[str]:
    """Full names of everything a room imports while it is loaded or later, type checking apart."""
    path = PACKAGE / f"{room}.py"
    found: set[str] = set()
    for file in [path] if path.is_file() else sorted((PACKAGE / room).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
    return found


def rooms_imported_by(room: str) -> set[str]:
    """The rooms of gptlit that a room imports."""
    parts = (name.split(".") for name in imports_of(room))
    return {part[1] for part in parts if part[0] == "gptlit" and len(part) > 1 and part[1] in ROOMS} - {room}


def test_every_room_has_a_level() -> None:
    """A new file must say where in the house it belongs."""
    assert set().union(*LEVELS) | {"__init__", "__main__"} == set(ROOMS)


@pytest.mark.parametrize("level", range(len(LEVELS)))
def test_imports_run_downward_only(level: int) -> None:
    """A room imports rooms of lower levels, and never its neighbours: so `module` does not know `data`."""
    below: set[str] = set().union(*LEVELS[:level])
    for room in LEVELS[level]:
        assert rooms_imported_by(room) <= below, room


@pytest.mark.parametrize("room", TORCH_ONLY)
def test_the_mathematics_needs_torch_alone(room: str) -> None:
    """The model can be lifted out of the application and used without Lightning."""
    heavy = {"lightning", "datasets", "transformers", "jsonargparse", "rich", "tensorboard"}
    assert not {name.split(".")[0] for name in imports_of(room)} & heavy


@pytest.mark.parametrize("name", ["gptlit", "gptlit.tokenizer", "gptlit.corpus", "gptlit.errors"])
def test_light_rooms_do_not_load_torch(name: str) -> None:
    """Importing torch costs seconds."""
    probe = f"import sys, {name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], check=False).returncode == 0
