"""The README says what is so: its Python runs, its commands parse, its files exist."""

import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from gptlit.cli.settings import find_config
from gptlit.cli.verbs import VERBS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted(set(re.findall(r"(?:^|`|&& )((?:\.venv/bin/)?gptlit [a-z]+[^`#\n]*)", README, flags=re.MULTILINE)))


def test_the_python_example_runs(tmp_path: Path) -> None:
    """What a reader copies must work."""
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "MARENNA:" in done.stdout


def test_pictures_and_files_that_are_named_exist() -> None:
    """Guards against a picture that was moved."""
    named = re.findall(r"\]\(([\w/.-]+)\)", README) + re.findall(r"(tests/benchmarks/\w+\.py)", README)
    assert named
    assert [path for path in named if not (ROOT / path).is_file()] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_name_verbs_and_configs_that_exist(command: str) -> None:
    """Guards against a verb or a configuration that was renamed."""
    words = shlex.split(command.replace("…", "").replace(".venv/bin/", ""))
    assert words[1] in VERBS or words[1] == "verb"
    for flag, value in pairwise(words):
        if flag == "--config":
            find_config(str(ROOT / value) if "/" in value and value.startswith("configs") else value)
