"""`--help`: gptlit's own settings come first, every option is described, and the texts are true."""

import re
import subprocess
import sys
from functools import cache

import pytest
from command import REPOSITORY, gptlit

from gptlit.cli.help import TRAINER


@cache
def help_of(verb: str) -> str:
    """The help of a verb, from a process of its own: descriptions of fields are read when the parser is built."""
    command = [sys.executable, "-m", "gptlit", verb, "--help"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def options(text: str) -> dict[str, str]:
    """Descriptions by option."""
    entries = re.findall(r"^  (?:-\w, )?--([\w.]+)[^\n]*\n((?:      [^\n]*\n)*)", text, flags=re.MULTILINE)
    return {name: " ".join(lines.split()) for name, lines in entries}


@pytest.mark.parametrize("verb", ["fit", "validate", pytest.param("test", marks=pytest.mark.slow)])
def test_options_of_the_trainer_come_last(verb: str) -> None:
    names = list(options(help_of(verb)))
    first = next(index for index, name in enumerate(names) if name.startswith("trainer."))
    assert names[0] == "help"
    assert all(name.startswith("trainer.") for name in names[first:])
    ours = ["model.gpt.n_layer", *["model.optimizer.lr"] * (verb == "fit"), "data.corpus"]
    places = [names.index(name) for name in ours]
    assert places == sorted(places)
    assert places[-1] < first


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict", "export"])
def test_every_option_has_a_description(verb: str) -> None:
    assert [name for name, text in options(help_of(verb)).items() if len(text) < 10] == []


def test_descriptions_of_fields_and_defaults_are_shown() -> None:
    shown = options(help_of("fit"))
    assert shown["model.gpt.n_embd"].endswith("(default: 128)")
    assert "residual stream" in shown["model.gpt.n_embd"]
    assert shown["model.optimizer.betas"].endswith("(default: [0.9, 0.99])")
    assert "adamw|muon" in help_of("fit")


def test_the_help_of_all_verbs_names_those_that_read_files() -> None:
    """The others refuse `--config`."""
    shown = " ".join(gptlit("--help").out.split())
    assert "Options of fit, predict, validate, test and ladder can be in YAML files: --config FILE" in shown
    for verb in ("compare", "export", "play"):
        assert "--config is not an option" in gptlit(verb, "--config=base", *["run"] * (verb == "compare")).err


@pytest.mark.parametrize("verb", ["predict", "export"])
def test_help_has_no_types_of_python(verb: str) -> None:
    text = help_of(verb)
    assert not re.search(r"Literal|str \| |True|False|skip_default|type: ", text)
    assert ("--config FILE" in text) == (verb == "predict")


def test_nothing_of_lightning_is_promised_that_gptlit_does_not_do() -> None:
    """Lightning's --ckpt_path takes "best" and a model registry; its val_check_interval counts batches."""
    text = help_of("fit")
    assert "registry:" not in text
    assert "Runs the full optimization routine" not in text
    shown = options(text)
    for name, description in TRAINER.items():
        assert description in shown[f"trainer.{name}"]
    for name, value in (("max_epochs", "3"), ("limit_train_batches", "5"), ("default_root_dir", "x")):
        assert shown[f"trainer.{name}"].startswith("Refused")
        answer = gptlit("fit", "--config", "base", f"--trainer.{name}", value)
        assert answer.code == 2
        assert name in answer.err


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "min_p"])
def test_sampling_options_are_described(name: str) -> None:
    assert len(options(help_of("predict"))[name]) > 30
