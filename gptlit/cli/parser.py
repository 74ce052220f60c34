"""The argument parser of every verb: texts are taken as typed, nulls are checked, user errors become `UserError`."""

import argparse
import types
from argparse import Action, ArgumentError
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn, Union, get_args, get_origin

import jsonargparse
from jsonargparse import Namespace

from gptlit.cli.messages import parser_error_line
from gptlit.errors import UserError


class AsTyped(str):
    """A value of a nested option, which jsonargparse must not read as YAML before it knows the option's type."""

    __slots__ = ()


class TextsAsTyped:
    """Mixin for a jsonargparse parser: a text option takes its value character by character.

    jsonargparse reads every value as YAML first, so that `# Chapter`, `~` and `null` become None where None is allowed.
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


class Parser(TextsAsTyped, jsonargparse.ArgumentParser):
    """jsonargparse's parser, with texts taken as typed."""


class PlainParser(argparse.ArgumentParser):
    """The standard library's parser, for verbs without typed options; raises `UserError` instead of exiting."""

    def error(self, message: str) -> NoReturn:
        """Raise `UserError` with one line that names the option."""
        line = parser_error_line(ValueError(message), [action.dest for action in self._actions])
        raise UserError(line.removeprefix("argument "))


def check_before_yaml(action: Any) -> None:
    """Put the checks of this module before those of jsonargparse, once for each option."""
    kind = getattr(action, "_typehint", None)
    if kind is None or "_check_type_" in vars(action):
        return
    check = action._check_type_
    text, texts = is_text(kind), list[str] in members(kind)
    if text and isinstance(action.default, Enum):  # a str that is also an Enum cannot be written as YAML
        action.default = action.default.value

    def check_value(value: Any, **context: Any) -> Any:
        if isinstance(value, str):
            value = str(value)
            if text and not (texts and is_bracketed(value)):
                return value
        if isinstance(getattr(value, "key", None), str) and type(getattr(value, "val", None)) is str:
            value = value._replace(val=AsTyped(value.val))
        return check(value, **context)

    action._check_type_ = check_value


def members(kind: Any) -> tuple[Any, ...]:
    """The types of a union; a tuple of the type itself for any other."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def is_text(kind: Any) -> bool:
    """Whether an option of this type takes any text (or, in a list, texts): str, path, their union, or None."""
    plain = [part for part in members(kind) if part is not type(None)]
    return bool(plain) and all(part in (str, list[str]) or is_path(part) for part in plain) and plain != [list[str]]


def is_path(kind: Any) -> bool:
    return isinstance(kind, type) and (issubclass(kind, Path) or kind.__name__ == "PathLike")


def is_bracketed(value: str) -> bool:
    """Whether a text is a YAML list: `[a.txt, b.txt]`."""
    return value.startswith("[") and value.endswith("]")


def parse(parser: jsonargparse.ArgumentParser, arguments: Sequence[str]) -> Namespace:
    """Parse the arguments of a verb.

    Args:
        parser: of the verb, made with `exit_on_error=False`.
        arguments: without the verb.

    Raises:
        UserError: one line that names the option, what is wrong with it and what it takes.
    """
    try:
        return parser.parse_args(list(arguments))
    except (ArgumentError, TypeError, ValueError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(parser_error_line(error, option_names(parser))) from error


def option_names(parser: jsonargparse.ArgumentParser) -> list[str]:
    """Names of all options and groups of a parser: `trainer.max_steps`."""
    return [action.dest for action in parser._actions]  # noqa: SLF001
