"""Parsers of the verbs: texts as typed, nulls, own classes, configuration files, one read per checkpoint."""

import subprocess
import sys
from pathlib import Path
from typing import Any, Union
from unittest import mock

import pytest
import torch
import yaml
from command import gptlit, write_config

from gptlit.cli import settings
from gptlit.cli.export import export_parser
from gptlit.cli.fit.parser import make_parser
from gptlit.cli.fit.plan import parse_fit
from gptlit.cli.packaged import packaged_configs
from gptlit.cli.parser import Parser, is_text, parse
from gptlit.cli.predict.command import make_parser as predict_parser
from gptlit.cli.predict.command import stop_texts

TEXTS = (
    "# Chapter",
    "~",
    "null",
    "&x null",
    "*x",
    "'a'",
    '"a"',
    "{a: b}",
    "- a",
    " a ",
    "!!str 1",
    "1e5",
    "yes",
    "a: b",
)


def text_options() -> list[tuple[str, str]]:
    """Every text option of every verb with a typed parser."""
    parsers = {verb: make_parser(verb) for verb in ("fit", "validate", "test")}
    parsers |= {"predict": predict_parser(), "export": export_parser()}
    return [
        (verb, action.option_strings[0])
        for verb, parser in parsers.items()
        for action in parser._actions
        if action.option_strings
        and (is_text(getattr(action, "_typehint", int)) or getattr(action, "type", None) in (str, stop_texts))
    ]


@pytest.mark.parametrize(("verb", "option"), text_options())
def test_a_text_option_takes_what_was_typed(verb: str, option: str) -> None:
    """YAML would make None of a comment and of null, and a list or a group of brackets."""
    parser = {"predict": predict_parser, "export": export_parser}.get(verb, lambda: make_parser(verb))()
    for text in TEXTS:
        value = parse(parser, [f"{option}={text}"])[option.lstrip("-")]
        assert value == ([text] if isinstance(value, list) else text)


def test_there_are_text_options_of_every_verb() -> None:
    """The list above is found, not written down."""
    options = {f"{verb} {option}" for verb, option in text_options()}
    assert {
        "predict --prompt",
        "predict --output",
        "predict --stop",
        "fit --run_dir",
        "fit --data.val_corpus",
        "fit --sample_text.prompt",
    } < options


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_of_a_callback_is_taken_as_typed(text: str) -> None:
    """Options of nested classes have parsers of their own."""
    flags = ["--trainer.callbacks", "ModelCheckpoint", f"--trainer.callbacks.dirpath={text}"]
    (callback,) = parse_fit(flags).settings["trainer"]["callbacks"]
    assert callback["init_args"]["dirpath"] == text


def test_a_list_of_files_is_still_a_list() -> None:
    assert parse_fit(["--data.corpus", "[a.txt, '#b.txt']"]).settings["data"]["corpus"] == ["a.txt", "#b.txt"]


@pytest.mark.parametrize(
    ("yaml", "named"),
    [
        ("model: {gpt: {n_layer: null}}", "--model.gpt.n_layer is null: it must be a whole number"),
        ("model: {optimizer: {lr: null}}", "--model.optimizer.lr is null: it must be a number"),
        ("save_every_n_steps: null", "--save_every_n_steps is null: it must be a whole number"),
        ("average: {decay: null}", "--average.decay is null: it must be a number"),
        ("data: {batch_size: null}", "--data.batch_size is null: it must be a whole number"),
        ("trainer: {accumulate_grad_batches: null}", "--trainer.accumulate_grad_batches is null"),
        (
            "trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitor: val/loss, patience: null}}]}",
            "--trainer.callbacks.patience is null: it must be a whole number",
        ),
    ],
)
def test_null_is_refused_where_a_value_is_needed(tmp_path: Path, yaml: str, named: str) -> None:
    """The parser itself takes null for an int that has a default."""
    config = write_config(tmp_path)
    (tmp_path / "null.yaml").write_text(yaml, encoding="utf-8")
    answer = gptlit("fit", "--config", config, "--config", tmp_path / "null.yaml", "--run_dir", tmp_path / "run")
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert named in answer.err
    assert not (tmp_path / "run").exists()


def test_a_text_that_begins_with_two_dashes_is_given_with_an_equals_sign() -> None:
    """The parser takes it for an option."""
    answer = gptlit("predict", "--ckpt_path", "x", "--prompt", "---a")
    assert answer.code == 2
    assert "write --prompt=---a" in answer.err
    assert parse(predict_parser(), ["--prompt=---a"]).prompt == "---a"


def test_a_value_that_was_forgotten_is_not_taken_for_such_a_text() -> None:
    answer = gptlit("fit", "--run_dir", "--data.corpus", "a.txt")
    assert answer.err == "gptlit: --run_dir needs a value\n"


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict", "export"])
def test_help_exits_with_0(verb: str) -> None:
    answer = gptlit(verb, "--help")
    assert (answer.code, answer.err) == (0, "")
    assert f"usage: gptlit {verb}" in answer.out


def test_a_class_of_the_user_is_found_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The console script has its own folder on sys.path, not the current one."""
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(tmp_path))])
    monkeypatch.chdir(tmp_path)
    code = "import lightning.pytorch as pl\nclass Hello(pl.Callback):\n    def on_train_end(self, *_): print('hello')\n"
    (tmp_path / "mycb_of_the_user.py").write_text(code, encoding="utf-8")
    config = write_config(tmp_path, trainer__max_steps=1)
    answer = gptlit("fit", "--config", config, "--run_dir", "run", "--trainer.callbacks", "mycb_of_the_user.Hello")
    assert (answer.code, answer.out) == (0, "hello\n"), answer.err


def test_flags_win_over_files_wherever_they_stand(tmp_path: Path) -> None:
    config = str(write_config(tmp_path, trainer__max_steps=7))
    for arguments in (
        ["--trainer.max_steps", "3", "--config", config],
        ["--config", config, "--trainer.max_steps", "3"],
    ):
        assert parse_fit(arguments).settings["trainer"]["max_steps"] == 3


# ---------------------------------------------------------------- configuration files


def test_a_name_is_a_packaged_configuration_and_a_path_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against an edited file that is ignored, and against a packaged one where a file was named."""
    monkeypatch.chdir(tmp_path)
    packaged = packaged_configs() / "base.yaml"
    assert settings.find_config("base") == packaged
    answer = gptlit("fit", "--config", "configs/base.yaml")
    assert answer.code == 2
    assert (
        "--config configs/base.yaml: there is no such file; the packaged configuration is --config base" in answer.err
    )
    (tmp_path / "configs").mkdir()
    edited = tmp_path / "configs" / "base.yaml"
    edited.write_text(packaged.read_text(encoding="utf-8") + "\nseed_everything: 5\n", encoding="utf-8")
    assert settings.find_config("configs/base.yaml").samefile(edited)
    assert settings.find_config("base") == packaged
    (warning,) = settings.edited_copies([packaged])
    assert warning.endswith("was not read: to use it, give --config configs/base.yaml")
    assert settings.edited_copies([Path("configs/base.yaml")]) == []


def test_in_a_checkout_a_name_means_the_file_that_can_be_edited() -> None:
    """An editable install reads configs/ of the checkout."""
    checkout = Path(settings.__file__).parents[2] / "configs"
    if checkout.is_dir():
        assert settings.find_config("base") == checkout / "base.yaml"


def test_the_opening_lines_say_which_configuration_was_read(tmp_path: Path) -> None:
    config = write_config(tmp_path, trainer__max_steps=1)
    answer = gptlit("fit", "--config", config, "--run_dir", tmp_path / "run")
    assert f"config      {config}\n" in answer.err


# ---------------------------------------------------------------- checkpoints


def test_a_start_reads_each_checkpoint_once(tmp_path: Path) -> None:
    """The Trainer is given what was read for the plan."""
    run = tmp_path / "run"
    config = write_config(tmp_path, trainer__max_steps=6, trainer__val_check_interval=3)
    assert gptlit("fit", "--config", config, "--run_dir", run).code == 0
    for arguments, most in (
        (("fit", "--ckpt_path", run, "--trainer.max_steps", 8), {"last.ckpt": 1, "best.ckpt": 1}),
        (("validate", "--ckpt_path", run), {"best.ckpt": 1}),
        (("predict", "--ckpt_path", run, "--max_new_tokens", 3), {"best.ckpt": 1}),
    ):
        read: dict[str, int] = {}
        load = torch.load

        def count(file: Any, *args: Any, read: dict[str, int] = read, load: Any = load, **kwargs: Any) -> Any:
            name = Path(getattr(file, "name", file)).name
            read[name] = read.get(name, 0) + 1
            return load(file, *args, **kwargs)

        with mock.patch.object(torch, "load", count):
            assert gptlit(*arguments).code == 0
        assert read.items() <= most.items()


def test_a_folder_of_other_checkpoints_names_them(tmp_path: Path) -> None:
    """A user's ModelCheckpoint writes names of its own."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "step=4.ckpt").touch()
    answer = gptlit("predict", "--ckpt_path", tmp_path / "own")
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert f": name {tmp_path / 'own' / 'step=4.ckpt'}" in answer.err


@pytest.mark.parametrize("kind", [Union[float, int, None], Union[int, float, None], float | int], ids=str)  # noqa: UP007
def test_a_whole_number_stays_one_whatever_the_order_of_its_union(kind: Any) -> None:
    """`limit_val_batches: 1` is one batch, 1.0 all of them; which comes first depends on what was imported before."""
    parser = Parser(exit_on_error=False)
    parser.add_argument("--limit", type=kind)
    for text, value in (("1", 1), ("1.0", 1.0), ("0.5", 0.5)):
        found = parse(parser, ["--limit", text]).limit
        assert (found, type(found)) == (value, type(value))


def test_one_batch_of_the_trainer_is_one_batch() -> None:
    """In a process of its own, where imports are in the order of the command."""
    command = [sys.executable, "-m", "gptlit", "fit", "--trainer.limit_val_batches", "1", "--print_config"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert yaml.safe_load(shown)["trainer"]["limit_val_batches"] == 1
    assert isinstance(yaml.safe_load(shown)["trainer"]["limit_val_batches"], int)


@pytest.mark.parametrize(
    ("flags", "corpus"),
    [
        (("--data.corpus", "[a.txt]", "--data.corpus+=b.txt"), ["a.txt", "b.txt"]),
        (("--data.corpus", "a.txt", "--data.corpus+", "b.txt"), ["a.txt", "b.txt"]),
        (("--data.corpus", "a.txt", "--data.corpus+=[b.txt, c.txt]", "--data.corpus+=d.txt"), [*"abcd"]),
        (("--data.corpus+=# b",), ["tinyshakespeare", "# b"]),
        (("--config", "one.yaml", "--data.corpus+=b.txt"), ["a.txt", "b.txt"]),
        (("--config", "two.yaml", "--data.corpus+=c.txt"), ["a.txt", "b.txt", "c.txt"]),
        (("--config", "two.yaml", "--data.corpus=c.txt"), "c.txt"),
    ],
)
@pytest.mark.parametrize("option", ["data.corpus", "data.val_corpus", "model.teachers"])
def test_a_text_is_appended_to_the_texts_before_it(
    option: str, flags: tuple[str, ...], corpus: str | list[str]
) -> None:
    """The last one replaced the others, silently."""
    group, name = option.split(".")
    for file, value in (("one.yaml", "a.txt"), ("two.yaml", ["a.txt", "b.txt"])):
        Path(file).write_text(yaml.safe_dump({group: {name: value}}), encoding="utf-8")
    answer = gptlit("fit", *(flag.replace("data.corpus", option) for flag in flags), "--print_config")
    assert answer.code == 0, answer.err
    expected = [f"{name}.txt" if len(name) == 1 else name for name in corpus] if isinstance(corpus, list) else corpus
    if option != "data.corpus" and isinstance(expected, list):  # null by default
        expected = [name for name in expected if name != "tinyshakespeare"]
    assert yaml.safe_load(answer.out)[group][name] == expected


def test_appending_to_an_option_of_one_value_is_refused() -> None:
    for option in ("run_dir", "data.separator", "model.init_from"):
        answer = gptlit("fit", f"--{option}+=x")
        assert (answer.code, answer.err) == (2, f"gptlit: --{option}+ is not an option: did you mean --{option}?\n")
