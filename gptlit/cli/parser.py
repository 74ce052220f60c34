"""The argument parser of every verb: texts are taken as typed, and user errors become `UserError`."""

import argparse
import re
import shlex
import types
from argparse import Action, ArgumentError
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

import jsonargparse
from jsonargparse import Namespace

from gptlit.cli.familiar import flag_advice, value_advice
from gptlit.cli.help import help_text
from gptlit.cli.packaged import names_of_packaged_configs
from gptlit.errors import UserError, cause_of


class AsTyped(str):
    """A value of a nested option, which jsonargparse must not read as YAML before it knows the option's type."""

    __slots__ = ()


class WrongValueError(TypeError):
    """A value that does not fit the type of its option."""

    def __init__(self, option: str, value: Any, reason: str) -> None:
        shown = "null" if value is None else getattr(value, "class_path", value)
        self.option, self.message = option, f"is {shown}: {reason}"
        super().__init__(f"{option} {self.message}")


class TextsAsTyped:
    """Mixin for a jsonargparse parser: a text option takes its value character by character.

    jsonargparse reads every value as YAML first, so that `# Chapter`, `~` and `null` become None where None is allowed.
    It also accepts null for an option that has a default, whatever its type.
    Parsers of nested classes, such as callbacks, are made from the same class and behave alike.
    """

    def add_argument(self, *args: Any, **kwargs: Any) -> Action:
        action: Action = super().add_argument(*args, **kwargs)  # type: ignore[misc]
        check_before_yaml(action)
        return action

    def add_class_arguments(self, *args: Any, **kwargs: Any) -> Any:
        added = super().add_class_arguments(*args, **kwargs)  # type: ignore[misc]
        for action in self._actions:  # type: ignore[attr-defined]
            check_before_yaml(action)
        return added

    def parse_object(self, cfg_obj: Any, *args: Any, **kwargs: Any) -> Namespace:
        refuse_nulls(self, cfg_obj)
        return super().parse_object(cfg_obj, *args, **kwargs)  # type: ignore[misc]


class Parser(TextsAsTyped, jsonargparse.ArgumentParser):
    """jsonargparse's parser, with texts taken as typed, and the help of `fit`."""

    def format_help(self, formatter: Any = None) -> str:
        """Return the text of `--help`."""
        return help_text(self, "Options", all_of_lightning=False)


class PlainParser(argparse.ArgumentParser):
    """The standard library's parser, for verbs without typed options; raises `UserError` instead of exiting."""

    def error(self, message: str) -> NoReturn:
        """Raise `UserError` with one line that names the option."""
        raise explain(ValueError(message.removeprefix("argument ")), self, ())


def parse(parser: jsonargparse.ArgumentParser, arguments: Sequence[str]) -> Namespace:
    """Parse the arguments of a verb.

    Args:
        parser: of the verb, made with `exit_on_error=False`.
        arguments: without the verb.

    Raises:
        UserError: one line that names the option, what is wrong with it and what it takes.
    """
    try:
        config = parser.parse_args(list(arguments))
        refuse_nulls(parser, config)
        return config
    except (ArgumentError, TypeError, ValueError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise explain(error, parser, arguments) from error


def option_names(parser: argparse.ArgumentParser) -> list[str]:
    """Names of all options and groups of a parser: `trainer.max_steps`."""
    return [action.dest for action in parser._actions]  # noqa: SLF001


# ---------------------------------------------------------------- types of options


def check_before_yaml(action: Any) -> None:
    """Put the checks of this module around that of jsonargparse, once for each option."""
    kind = getattr(action, "_typehint", None)
    if kind is None or "_check_type_" in vars(action):
        return
    kind = action._typehint = whole_numbers_first(kind)  # noqa: SLF001
    check = action._check_type_
    text, texts = is_text(kind), list[str] in members(kind)
    if text and isinstance(action.default, Enum):  # a str that is also an Enum cannot be written as YAML
        action.default = action.default.value

    def check_value(value: Any, **context: Any) -> Any:
        if isinstance(value, str):
            value = str(value)
            if text and not (texts and is_bracketed(value)):
                return [*texts_before(action, context), value] if context.get("append") else value
        given, nested = value, isinstance(getattr(value, "key", None), str)
        if nested and type(getattr(value, "val", None)) is str:
            value = value._replace(val=AsTyped(value.val))
        try:
            return check(value, **context)
        except (TypeError, ValueError) as error:
            option = f"{action.dest}.{given.key}" if nested else action.dest
            inner = cause_of(error, WrongValueError)
            if inner is not None:  # of a nested class
                inner.option = f"{action.dest}.{inner.option}"
                raise inner from error
            value = given.val if nested else given
            raise WrongValueError(option, value, class_problem(error) or rule_for(kind, value)) from error

    action._check_type_ = check_value


def texts_before(action: Any, context: Mapping[str, Any]) -> list[str]:
    """Return the texts to which `--option+=TEXT` appends; a single text counts as a list of one."""
    before = (context.get("cfg") or {}).get(action.dest)
    return [] if before is None else list(before) if isinstance(before, list) else [before]


def refuse_nulls(parser: Any, config: Any) -> None:
    """Refuse null for an option whose type does not allow it.

    Raises:
        WrongValueError: for the first such option.
    """
    if not isinstance(config, Mapping | Namespace):
        return
    for action in parser._actions:  # noqa: SLF001
        kind = getattr(action, "_typehint", None)
        if kind is None or action.required or action.dest not in config or type(None) in members(kind):
            continue
        if config[action.dest] is None and action.default is not None and kind is not Any:
            raise WrongValueError(action.dest, None, f"it must be {describe(kind)}")


def whole_numbers_first(kind: Any) -> Any:
    """Return a union with int before float, where it has both: of `1`, jsonargparse makes what comes first.

    Lightning means 1 batch by `limit_val_batches: 1` and all of them by 1.0. It declares int first, but Python keeps
    one object for unions that are equal, in the order of the first one that any library has declared.
    """
    parts = members(kind)
    if int not in parts or float not in parts or parts.index(int) < parts.index(float):
        return kind
    return Union[tuple(sorted(parts, key=lambda part: part is float))]  # noqa: UP007


def members(kind: Any) -> tuple[Any, ...]:
    """The types of a union; a tuple of the type itself for any other."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def is_text(kind: Any) -> bool:
    """Whether an option of this type takes any text (or a list of texts): str, path, their union, or None."""
    plain = [part for part in members(kind) if part is not type(None)]
    return bool(plain) and all(part in (str, list[str]) or is_path(part) for part in plain) and plain != [list[str]]


def is_path(kind: Any) -> bool:
    return isinstance(kind, type) and (issubclass(kind, Path) or kind.__name__ == "PathLike")


def is_bracketed(value: str) -> bool:
    """Whether a text is a YAML list: `[a.txt, b.txt]`."""
    return value.startswith("[") and value.endswith("]")


PLAIN = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
EXPONENT = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+")  # 1e5: a text for PyYAML
NOT_FINITE = re.compile(r"[-+]?\.?(inf|infinity|nan)", re.IGNORECASE)


def rule_for(kind: Any, value: Any) -> str:
    """Return what an option of this type must be, with what is wrong about a number: its notation, or its size."""
    rule, parts = f"it must be {describe(kind)}", members(kind)
    if int in parts and float not in parts and EXPONENT.fullmatch(str(value)):
        return f"{rule}, written in digits"
    if float in parts and NOT_FINITE.fullmatch(str(value)):
        return rule.replace(PLAIN[float], "a finite number")
    return rule


def describe(kind: Any) -> str:
    """What an option of this type takes: `a whole number or null`."""
    parts = members(kind)
    choices = [str(choice) for part in parts if get_origin(part) is Literal for choice in get_args(part)]
    described = [f"one of {', '.join(choices)}"] if choices else []
    rest = [part for part in parts if get_origin(part) is not Literal]
    described += sorted({describe_one(part) for part in rest}, key=lambda text: (text == "null", text))
    return " or ".join(described)


def describe_one(kind: Any) -> str:
    if kind in PLAIN:
        return PLAIN[kind]
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if origin is tuple and Ellipsis not in arguments:
        return f"a list of {len(arguments)}"
    if origin is not str and isinstance(origin, type) and issubclass(origin, Iterable):
        return "a group of settings" if issubclass(origin, Mapping) else "a list"
    return "a text" if is_path(kind) else "a class with its arguments (class_path, init_args)"


# ---------------------------------------------------------------- messages


def explain(error: BaseException, parser: argparse.ArgumentParser, arguments: Sequence[str]) -> UserError:
    """One line from an error of the parser, whose text runs over many lines."""
    known = option_names(parser)
    wrong = cause_of(error, WrongValueError)
    flat = " ".join(str(error).split())
    if wrong is not None:
        return UserError(wrong.message, f"--{wrong.option}")
    if found := re.search(r'key "([^"]*)": Unable to load config \'?"?([^\'"]*)', flat):
        return UserError(f"is {found[2]}: it must be a group of settings", f"--{found[1]}")
    if found := re.search(r"unrecognized arguments: (\S+)", flat, re.IGNORECASE):
        if not found[1].startswith("-"):
            advice = value_advice(found[1], known, names_of_packaged_configs())
            return UserError(f"{found[1]!r} is not the value of any option: {advice}")
        return UserError(unknown_option(found[1].partition("=")[0], known))
    if found := re.search(r"does not accept option '([^']*)'|Key '([^']*)' is not expected", flat):
        return UserError(unknown_option(f"--{found[1] or found[2]}", known))
    if found := re.search(r"(?:^|argument )(\S+): expected one argument", flat):
        return missing_value(found[1].split("/"), arguments, known)
    if found := re.search(r'Linked "([^"]*)" must be given via "([^"]*)"', flat):
        return UserError(f"always equals --{found[2]}: give that instead", f"--{found[1]}")
    return UserError(flat)


def class_problem(error: BaseException) -> str:
    """What jsonargparse says about a class that was named: not found, no subclass, or a wrong argument."""
    found = re.search(
        r"Problem with given class_path '[^']*':\s*([^\n]*)|(Import path (?:\S+ )?does not [^\n]*)", str(error)
    )
    return (found[1] or found[2]).strip() if found else ""


def missing_value(spellings: Sequence[str], arguments: Sequence[str], known: Iterable[str]) -> UserError:
    """An option without a value; where a text that begins with - follows, how to give it."""
    option = max(spellings[:2], key=len).rstrip("+")
    for given, following in pairwise([*arguments, ""]):
        if given in spellings and following.startswith("-") and following.lstrip("-").partition("=")[0] not in known:
            return UserError(
                f"needs a value: write {shlex.quote(f'{option}={following}')} for one that begins with -", option
            )
    return UserError("needs a value", option)


def unknown_option(flag: str, known: Iterable[str]) -> str:
    """Say that there is no such option, and which one was meant."""
    if advice := flag_advice(flag):
        return f"{flag} is not an option: {advice}"
    names = [name for name in known if not name.startswith("_")]
    wanted = flag.lstrip("-")
    close = get_close_matches(wanted, names, n=1, cutoff=0.6)
    if not close:  # a forgotten prefix: --n_layer for --model.gpt.n_layer
        close = [name for name in names if name.rpartition(".")[2] == wanted.rpartition(".")[2]]
    return f"{flag} is not an option" + (f": did you mean --{close[0]}?" if close else "; --help lists them")
