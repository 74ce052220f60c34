"""Settings outside of the parser: configuration files, settings of a checkpoint, options among arguments, YAML."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml

from gptlit.cli.packaged import names_of_packaged_configs, packaged_configs
from gptlit.cli.parser import EXPONENT, unknown_option
from gptlit.errors import UserError

DEFAULT_SEED = 1337  # of a run without seed_everything
# Hyper-parameters of a checkpoint that are settings under `model`.
HYPER_PARAMETERS = ("gpt", "optimizer", "schedule", "compile", "checkpoint_activations", "matmul_precision")


def represent_text(dumper: Any, text: str) -> Any:
    """Quote two kinds of text that PyYAML writes without quotes and that are then read as something else."""
    style = None
    if EXPONENT.fullmatch(text):
        style = "'"
    elif "\x85" in text:  # next line: written as it is, it would be read as a space
        style = '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


class Dumper(yaml.SafeDumper):
    """PyYAML's dumper with `represent_text`."""

    yaml_representers: ClassVar = {**yaml.SafeDumper.yaml_representers, str: represent_text}


def as_yaml(settings: Mapping[str, Any]) -> str:
    """Return the settings as YAML that parses to the same settings; non-ASCII characters are kept."""
    text: str = yaml.dump(dict(settings), Dumper=Dumper, sort_keys=False, allow_unicode=True)
    return text


def find_config(name: str) -> Path:
    """The configuration file that `--config NAME` means.

    Args:
        name: of a packaged configuration (`base`, `lecture/1_bigram`), or a path. A path is never taken for a name.

    Raises:
        UserError: when there is no such file.
    """
    if name in names_of_packaged_configs():
        return packaged_configs() / f"{name}.yaml"
    try:
        if Path(name).is_file():
            return Path(name)
        folder = Path(name).is_dir()
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}", "--config") from error
    if folder:
        raise UserError(f"{name} is a folder: name a YAML file in it", "--config")
    stem = name.removesuffix(".yaml").removeprefix("configs/")
    if stem in names_of_packaged_configs():
        raise UserError(f"{name}: there is no such file; the packaged configuration is --config {stem}", "--config")
    names = ", ".join(names_of_packaged_configs())
    raise UserError(f"{name}: there is no such file, and no packaged configuration of that name ({names})", "--config")


def edited_copies(files: Iterable[Path]) -> list[str]:
    """Warnings about copies of packaged configurations that were edited in `configs/` here, but not read.

    Args:
        files: the configuration files that were read.
    """
    warnings = []
    packaged = packaged_configs()
    for file in files:
        if file.is_relative_to(packaged):
            copy = Path("configs") / file.relative_to(packaged)
            if copy.is_file() and not copy.samefile(file) and copy.read_bytes() != file.read_bytes():
                warnings.append(f"{copy} differs from {file} and was not read: to use it, give --config {copy}")
    return warnings


def check_config(path: str, known: Collection[str]) -> None:
    """Check a configuration file before the parser reads it: the parser's messages do not name the file.

    Args:
        path: path of a YAML file.
        known: names of all options.

    Raises:
        UserError: if it is not YAML, or holds an unknown setting.
    """
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"--config {path} is not a text file (byte {error.start} is not UTF-8)") from error
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"--config {path}, line {line}: this is not YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise UserError(f"--config {path}: this is not YAML: {error}") from error
    if not isinstance(settings, dict) or not settings:
        raise UserError(f"--config {path}: a configuration holds settings, such as `trainer: {{max_steps: 1000}}`")
    values = leaves_of(known)
    for key, value in flat(settings, stop_at=values).items():
        if key in values:
            continue
        if any(name.startswith(f"{key}.") for name in values) and not isinstance(value, str):
            raise UserError(f"--config {path}: {key} is {value}: it must be a group of settings")
        if not any(name.startswith(f"{key}.") for name in values):
            raise UserError(f"--config {path}: {unknown_option(key, values)}")


def leaves_of(known: Collection[str]) -> frozenset[str]:
    """Return the options that hold a value, not a group of options."""
    names = [name for name in known if not name.endswith(".help")]
    groups = {name.rpartition(".")[0] for name in names}
    return frozenset(name for name in names if name not in groups)


def flat(tree: Any, prefix: str = "", stop_at: Collection[str] = ()) -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`; values of the keys in `stop_at` are not flattened."""
    if not isinstance(tree, Mapping) or prefix in stop_at:
        return {prefix: tree}
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves.update(flat(value, f"{prefix}.{key}" if prefix else str(key), stop_at))
    return leaves


def stored_config(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that a checkpoint was trained with; only those of the model if it was trained from Python."""
    text = (checkpoint.get("gptlit") or {}).get("config")
    stored = yaml.safe_load(text) if text else {}
    name_split_seed(stored)
    return stored or config_of_model(checkpoint)


def config_of_model(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the model of a checkpoint that was trained from Python, as the command names them.

    The seed of its data is not in the checkpoint: the command has one seed for both.
    """
    hyper, names = checkpoint["hyper_parameters"], checkpoint.get("gptlit") or {}
    model = {key: hyper[key] for key in HYPER_PARAMETERS if key in hyper}
    if names.get("teachers"):
        model |= {"teachers": list(names["teachers"]), "teacher_weight": names["teacher_weight"]}
    return {"model": model} | ({"seed_everything": hyper["seed"]} if "seed" in hyper else {})


def name_split_seed(settings: dict[str, Any]) -> None:
    """Add `data.split_seed` to all settings of a run of a version without it: the seed of the run chose documents."""
    data = settings.get("data") or {}
    if data.get("split") == "documents":
        data.setdefault("split_seed", settings.get("seed_everything", DEFAULT_SEED))


def option(arguments: list[str], name: str) -> str | None:
    """Return the last value given for an option, as `--name value` or `--name=value`; None without one."""
    return next(reversed(values_of(arguments, name)), None)


def values_of(arguments: list[str], *names: str) -> list[str]:
    """Return all values given for an option of these names, in order."""
    values = []
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if argument in names and index + 1 < len(arguments):
            values.append(arguments[index + 1])
        elif equals and name in names:
            values.append(value)
    return values


def take_configs(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split off `--config FILE`, `-c FILE` and `--config=FILE`: the files in order, and the other arguments."""
    files: list[str] = []
    others: list[str] = []
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name not in ("--config", "-c"):
            others.append(word)
        elif equals:
            files.append(value)
        elif (following := next(words, None)) is not None:
            files.append(following)
        else:
            others.append(word)  # the parser says that its value is missing
    return files, others


def without_option(arguments: list[str], name: str) -> list[str]:
    """Return the arguments without an option and its value."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == name:
            skip = True
        elif not argument.startswith(f"{name}="):
            kept.append(argument)
    return kept
