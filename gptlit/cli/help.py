"""The `--help` of verbs with typed options: gptlit's own settings first, Lightning's Trainer options last."""

import re
import textwrap
import types
from argparse import SUPPRESS
from collections.abc import Collection, Iterable
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import jsonargparse

WIDTH = 96
INDENT = 6
SECTIONS = {  # beginnings of option names -> title; an option is in the section with the longest beginning
    "": "Run",
    "model.gpt.": "Architecture of the model",
    "model.optimizer.": "Optimizer",
    "model.schedule.": "Learning-rate schedule",
    "data.": "Data",
    "model.": "Training",
    "average.": "Average of the weights",
    "sample_text.": "Text sampled after each validation",
    "pictures.": "Pictures for TensorBoard",
    "trainer.": "Options of Lightning's Trainer",
}
TRAINER = {  # where gptlit does not do, or does more than, what Lightning's own text says
    "accumulate_grad_batches": "Parts into which the batch of a step (data.batch_size) is split, to save memory.",
    "callbacks": "Further callbacks, as classes with arguments. gptlit adds its own before them.",
    "check_val_every_n_epoch": "Refused: a run is one epoch; set trainer.val_check_interval.",
    "default_root_dir": "Refused: set run_dir.",
    "enable_checkpointing": "false saves neither best.ckpt nor last.ckpt.",
    "enable_progress_bar": "false shows no progress, on a terminal or elsewhere.",
    "fast_dev_run": "Train and validate for so many steps (true: 1), without a run folder.",
    "limit_train_batches": "Refused: set trainer.max_steps.",
    "log_every_n_steps": "Optimizer steps between logged values.",
    "logger": "true: TensorBoard and metrics.csv in the run folder; false: none; or a logger class with arguments.",
    "max_epochs": "Refused: a run is one epoch; set trainer.max_steps.",
    "max_steps": "Optimizer steps of the whole run; for a resumed run, those it has made are counted. Must be given.",
    "max_time": "Stop after this time, as DD:HH:MM:SS; counted from this start.",
    "min_epochs": "Refused: a run is one epoch.",
    "precision": "One of Lightning's precisions, or auto: bf16-mixed on a GPU or CPU with instructions for bfloat16 "
    "matrix multiplications, else 32-true; a run keeps what auto chose at its start. null is 32-true.",
    "val_check_interval": "Optimizer steps between validations, or a fraction of the run below 1.",
}


def describe_fields(verb: str, arguments: Collection[str]) -> None:
    """Make the parser describe the fields of dataclasses, where that is shown: it takes half a second."""
    if verb == "completion" or not {"-h", "--help"}.isdisjoint(arguments):
        jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


def help_text(parser: jsonargparse.ArgumentParser, title: str = SECTIONS[""], all_of_lightning: bool = True) -> str:
    """Return the help of a parser, section by section.

    Args:
        parser: of the verb.
        title: of the first section.
        all_of_lightning: whether its `trainer.` options are taken from Lightning, with Lightning's texts.
    """
    sections: dict[str, list[str]] = {beginning: [] for beginning in SECTIONS}
    for action in parser._actions:  # noqa: SLF001
        if is_shown(action):
            beginning = max((b for b in SECTIONS if action.dest.startswith(b)), key=len)
            sections[beginning].append(entry(action, all_of_lightning))
    parts = [f"usage: {parser.prog} [options]", parser.description or ""]
    titles = SECTIONS | {"": title}
    parts += [
        f"{titles[beginning]}:\n{''.join(entries).rstrip()}" for beginning, entries in sections.items() if entries
    ]
    if any(action.dest == "config" for action in parser._actions):  # noqa: SLF001
        parts.append("A list is given as [0.9, 0.95]. Every option can be in a YAML file: --config FILE.")
    return "\n\n".join(parts) + "\n"


def is_shown(action: Any) -> bool:
    """Whether an option is for the user: not a group of options, the help of a class, or a linked setting."""
    names = [name for name in action.option_strings if name.startswith("--") and not name.endswith(".help")]
    is_group = action.dest in ("trainer", "data", "average", "sample_text", "pictures") or (
        action.dest in ("model", "model.gpt", "model.optimizer", "model.schedule")
    )
    return bool(names) and action.help != SUPPRESS and not is_group


def entry(action: Any, all_of_lightning: bool) -> str:
    """Return an option with what it takes, its description and its default."""
    names = ", ".join(name for name in action.option_strings if not name.endswith("+"))
    takes = "" if action.nargs == 0 or action.dest == "print_config" else f" {value_of(kind_of(action))}"
    wrapped = textwrap.wrap(f"{description(action, all_of_lightning)}{default_of(action)}".strip(), WIDTH - INDENT)
    return f"  {names}{takes}\n" + "".join(f"{' ' * INDENT}{line}\n" for line in wrapped)


def description(action: Any, all_of_lightning: bool) -> str:
    """Return what an option does, as one paragraph; of Lightning's own texts the first sentence."""
    group, _, name = action.dest.rpartition(".")
    if action.dest == "print_config":
        return "Print the settings as YAML and exit."
    text = " ".join((action.help or "").split())
    if group == "trainer" and all_of_lightning:
        text = TRAINER.get(name) or f"{text.partition('. ')[0].removesuffix('.')}."
        text = re.sub(r":\w+:`|``?", "", text)
    if re.match(r"[a-z]+ ", text) and not re.match(f"(true|false|{value_of(kind_of(action))})\\b", text):
        text = text[:1].upper() + text[1:]
    return text if not text or text.endswith((".", "…")) else f"{text}."


def kind_of(action: Any) -> Any:
    """Return the type of an option; None for one that jsonargparse does not check."""
    return getattr(action, "_typehint", None)


def default_of(action: Any) -> str:
    """Return ` (default: 64)`; nothing for an option that has none."""
    default = action.default
    if action.nargs == 0 or default is None or default == SUPPRESS or action.dest == "print_config":
        return ""
    if isinstance(default, bool):
        default = str(default).lower()
    if isinstance(default, str):
        default = default.encode("unicode_escape").decode("ascii") if not default.isprintable() else default
    if isinstance(default, tuple):
        default = list(default)
    return f" (default: {default})"


def value_of(kind: Any) -> str:
    """Return what an option takes: `INT`, `true|false`, `adamw|muon`, `FLOAT|null`."""
    if get_origin(kind) is Literal:
        return "|".join(unique(map(str, get_args(kind))))
    if get_origin(kind) in (Union, types.UnionType):
        return "|".join(unique(name for part in get_args(kind) for name in value_of(part).split("|")))
    if get_origin(kind) in (tuple, list):
        return "LIST"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "|".join(member.value for member in kind)
    names = {bool: "true|false", int: "INT", float: "FLOAT", str: "TEXT", type(None): "null", Path: "PATH"}
    return names.get(kind, "VALUE" if kind is None or not isinstance(kind, type) else kind.__name__)


def unique(names: Iterable[str]) -> list[str]:
    """Return names in their order, each once."""
    return list(dict.fromkeys(names))
