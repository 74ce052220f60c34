"""Flags and verbs of other projects: the answer names what they are called here."""

import re

import pytest
from command import REPOSITORY, gptlit

from gptlit.cli.completion import options_of
from gptlit.cli.familiar import FLAGS, VERBS, readme_table
from gptlit.cli.verbs import VERBS as OUR_VERBS

ALL_FLAGS = [(name, answer) for names, answer in FLAGS.items() for name in names.split()]
ALL_VERBS = [(name, answer) for names, answer in VERBS.items() for name in names.split()]


@pytest.mark.parametrize(("name", "answer"), ALL_FLAGS)
def test_a_familiar_flag_gets_its_name_here(name: str, answer: str) -> None:
    result = gptlit("fit", "--config", "base", f"--{name}", "1")
    assert result.code == 2
    assert result.err == f"gptlit: --{name} is not an option: use {answer}\n"


@pytest.mark.parametrize(("name", "answer"), ALL_VERBS)
def test_a_familiar_verb_gets_its_name_here(name: str, answer: str) -> None:
    result = gptlit(name, "--out_dir", "x")
    assert result.code == 2
    assert result.err == f"gptlit: {name!r} is not a verb: use {answer}\n"


def test_everything_that_the_answers_name_exists() -> None:
    options = {verb: {name for action in options_of(verb) for name in action.option_strings} for verb in OUR_VERBS}
    for answer in [*FLAGS.values(), *VERBS.values()]:
        command = re.search(r"gptlit (\w+)", answer)
        verbs = [command[1]] if command else ["fit", "predict"]
        for flag in re.findall(r"--[\w.]+", answer):
            assert any(flag in options[verb] for verb in verbs), (answer, flag)


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (("fit",), "gptlit fit needs a configuration: gptlit fit --config base"),
        (("fit", "config/train_shakespeare_char.py"), "configurations are YAML files, not Python"),
        (("fit", "configs/base.yaml"), "did you mean --config configs/base.yaml?"),
        (("fit", "base"), "did you mean --config base?"),
        (("fit", "--config", "base", "50"), "'50' is not the value of any option"),
        (("predict", "some/last.ckpt"), "did you mean --ckpt_path some/last.ckpt?"),
        (("play", "."), "did you mean --ckpt_path .?"),
        (("fti",), "did you mean 'fit'?"),
        (("--config", "base"), "the verb comes first: gptlit fit --config base"),
    ],
)
def test_what_is_in_the_wrong_place_is_named(arguments: tuple[str, ...], advice: str) -> None:
    result = gptlit(*arguments)
    assert result.code == 2
    assert advice in result.err
    assert len(result.err.splitlines()) == 1


def test_the_readme_shows_the_table_of_the_messages() -> None:
    """One table for both; the README is filled in by hand."""
    assert readme_table() in (REPOSITORY / "README.md").read_text(encoding="utf-8")
