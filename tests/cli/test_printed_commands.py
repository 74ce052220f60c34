"""Printed commands can be pasted into a shell, whatever the names of folders are."""

import re
import shlex
from pathlib import Path

import pytest
from command import REPOSITORY, extra_callbacks, gptlit, write_config
from lightning.pytorch import Callback

from gptlit.callbacks.slowdown import Watch, slowdown_line
from gptlit.cli.fit.messages import sample_command
from gptlit.errors import shell_option

NAMES = ("-lead", "--run_dir", "-my run", "it's", "plain")


@pytest.mark.parametrize("name", NAMES)
def test_a_shell_reads_an_option_with_its_value(name: str) -> None:
    words = shlex.split(f"gptlit predict {shell_option('--ckpt_path', name)}")[2:]
    assert words == ([f"--ckpt_path={name}"] if name.startswith("-") else ["--ckpt_path", name])


@pytest.mark.parametrize("name", ["-lead", "-my run"])
def test_a_run_in_a_folder_that_begins_with_a_dash_is_sampled_evaluated_and_resumed(tmp_path: Path, name: str) -> None:
    config = write_config(tmp_path, trainer__max_steps=2)
    answer = gptlit("fit", "--config", config, f"--run_dir={name}")
    assert answer.code == 0, answer.err
    sample = re.search(r"^sample +(.+)$", answer.err, re.MULTILINE)
    assert sample is not None
    assert gptlit(*shlex.split(sample[1])[1:], "--max_new_tokens", 2).code == 0
    for verb in ("validate", "test"):
        assert gptlit(verb, f"--ckpt_path={name}").code == 0
    longer = gptlit("fit", f"--ckpt_path={name}")
    command = re.search(r"to train longer: gptlit (.+)", longer.err)
    assert command is not None
    answer = gptlit(*shlex.split(command[1]))
    assert answer.code == 0, answer.err
    assert "resuming from step 2" in answer.err


def test_a_stopped_run_in_such_a_folder_prints_a_command_that_resumes_it(tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: object, *_: object) -> None:
            trainer.should_stop = True  # type: ignore[attr-defined]

    with extra_callbacks(Stop()):
        answer = gptlit("fit", "--config", write_config(tmp_path, trainer__max_steps=3), "--run_dir=-lead")
    command = re.search(r"resume with: gptlit (.+)", answer.err)
    assert command is not None, answer.err
    answer = gptlit(*shlex.split(command[1]))
    assert answer.code == 0, answer.err
    assert "resuming from step 1" in answer.err


def test_commands_of_callbacks_and_tables_take_such_a_folder() -> None:
    run = Path("-lead")
    assert "gptlit fit --ckpt_path=-lead --threads 4" in slowdown_line(Watch(1.0, 3, 3, 30.0), 8, run)
    assert sample_command(run, "To be") == "gptlit predict --ckpt_path=-lead --prompt 'To be'"


def test_no_module_quotes_the_value_of_an_option_by_itself() -> None:
    """`shell_option` is the only place that knows about values that begin with a dash."""
    quoting = re.compile(r"--[\w.]+ \{shlex\.quote|\"--(ckpt_path|run_dir|logdir|model\.\w+)\", str\(")
    files = sorted((REPOSITORY / "gptlit").rglob("*.py"))
    assert [file.name for file in files if quoting.search(file.read_text(encoding="utf-8"))] == []
