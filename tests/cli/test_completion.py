"""Completion scripts in real shells: bash and zsh load the script and complete a line."""

import shutil
import subprocess
from pathlib import Path

import pytest
from command import gptlit

from gptlit.cli.completion import script
from gptlit.cli.verbs import VERBS

BASH = """
source ./completion.sh
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
_shtab_gptlit 2> /dev/null
echo "${COMPREPLY[@]}"
"""
ZSH = """
zmodload zsh/zpty
zpty shell "PS1='> ' zsh -f -i"
zpty -w shell "fpath=($PWD \\$fpath); autoload -Uz compinit; compinit -u -d $PWD/dump; stty cols 250; echo REA''DY"
zpty -r shell out '*READY*'
zpty -w -n shell "$1"$'\\t'
zpty -r shell out "*$2*" && echo found
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the scripts of both shells, and a file and a folder to complete."""
    folder = tmp_path_factory.mktemp("completion")
    (folder / "completion.sh").write_text(script("bash"), encoding="utf-8")
    (folder / "_gptlit").write_text(script("zsh"), encoding="utf-8")
    (folder / "my.txt").touch()
    (folder / "my.yaml").touch()
    (folder / "runs").mkdir()
    return folder


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("", set(VERBS)),
        ("fit --model.gpt.posi", {"--model.gpt.position"}),
        ("fit --model.gpt.position ", {"none", "learned", "rope"}),
        ("fit --model.gpt.qk_norm ", {"true", "false"}),
        ("fit --config lecture/1_", {"lecture/1_bigram"}),
        ("fit --config my", {"my.yaml", "my.txt"}),
        ("fit --data.corpus my.t", {"my.txt"}),
        ("fit --config base --seed_e", {"--seed_everything"}),
        ("fit --model.teachers ru", {"runs"}),
        ("compare ru", {"runs"}),
        ("compare runs ru", {"runs"}),
        ("compare --output my.t", {"my.txt"}),
        ("play --ckpt_path runs ru", {"runs"}),
        ("ladder --rungs 1 --model.gpt.n_h", {"--model.gpt.n_head"}),
        ("predict --context ", {"exact", "rolling"}),
        ("predict --weights_dtype ", {"bfloat16", "int8", "null"}),
        ("export --outp", {"--output"}),
        ("play --dtype ", {"float32", "float16"}),
        ("completion ", {"bash", "zsh"}),
    ],
)
def test_bash_completes_verbs_options_and_values(scripts: Path, line: str, offered: set[str]) -> None:
    """Guards against missing options: each verb has a parser of its own."""
    words = ["gptlit", *line.split(" ")]
    done = subprocess.run(["bash", "-c", BASH, "bash", *words], cwd=scripts, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == offered


@pytest.mark.skipif(not shutil.which("zsh"), reason="needs zsh")
@pytest.mark.parametrize(
    ("line", "then"),
    [("exp", "ort"), ("fit --model.gpt.posi", "tion"), ("fit --model.gpt.position ", "learned"), ("compare ru", "ns")],
)
def test_zsh_completes_verbs_options_and_values(scripts: Path, line: str, then: str) -> None:
    """Guards against descriptions with characters of zsh's grammar, such as brackets and colons.

    `then` is what the shell appends to the line.
    """
    command = ["zsh", "-f", "-c", ZSH, "zsh", f"gptlit {line}", then]
    done = subprocess.run(command, cwd=scripts, capture_output=True, text=True, timeout=60, check=False)
    assert "found" in done.stdout, done.stdout + done.stderr


def test_an_unknown_shell_is_named() -> None:
    """A user error is one line."""
    answer = gptlit("completion", "csh")
    assert answer.code == 2
    assert answer.out == ""
    assert "csh" in answer.err
    assert answer.err.count("\n") == 1


def test_no_values_are_offered_for_numbers_and_free_text() -> None:
    """Guards against a `null` that one press of the Tab key would insert in place of a number."""
    assert '"--model.gpt.logit_softcap[' in script("zsh")
    (line,) = {line for line in script("zsh").splitlines() if '"--model.gpt.logit_softcap[' in line}
    assert "null" not in line
