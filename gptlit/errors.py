"""User errors: an invalid flag, file or configuration, which the command reports in one line (exit code 2)."""

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

Kind = TypeVar("Kind", bound=BaseException)


class UserError(ValueError):
    """An error that the user can fix.

    The message says what is wrong, where, and what to do. Library classes name their own fields; `settings_under`
    puts the group of settings in front of it, as in `model.gpt.n_head`.

    Args:
        message: the error. With `setting`, what follows its name: "is 0: it must be 1 or more".
        setting: name of the setting at fault, with dots between groups.
    """

    def __init__(self, message: str, setting: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.setting = setting

    def __str__(self) -> str:
        return f"{self.setting} {self.message}" if self.setting else self.message


def require(condition: bool, setting: str, value: object, rule: str) -> None:
    """Check the range of a setting.

    Args:
        condition: whether the value is allowed.
        setting: its name.
        value: its value, for the message.
        rule: what it must be: "1 or more".

    Raises:
        UserError: `SETTING is VALUE: it must be RULE`.
    """
    if not condition:
        raise UserError(f"is {value}: it must be {rule}", setting)


@contextmanager
def settings_under(group: str) -> Iterator[None]:
    """Prefix the setting of a `UserError` raised inside with its group, such as `model.gpt`, where it is not there."""
    try:
        yield
    except UserError as error:
        if error.setting and not error.setting.startswith(f"{group}."):
            error.setting = f"{group}.{error.setting}"
        raise


def counted(count: int, noun: str) -> str:
    """Return `1 token`, `2,000 tokens`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def some_of(names: Sequence[str], count: int) -> str:
    """Return the first so many names as a list for a message: `a, b, c and 7 more`."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return f"{', '.join(names[:count])}{more}"


def shell_option(name: str, value: object) -> str:
    """Return an option with its value as a shell takes it: `--ckpt_path run`, `--ckpt_path=-run`.

    A value that begins with `-` needs the `=`, since the parser takes it for an option of its own otherwise.
    """
    text = str(value)
    return shlex.quote(f"{name}={text}") if text.startswith("-") else f"{name} {shlex.quote(text)}"


def reason_of(error: Exception) -> str:
    """Return kind and message of an error in one line, cut to 200 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def cause_of(error: BaseException, kind: type[Kind]) -> Kind | None:
    """Return the first exception of a kind among an exception and its causes."""
    link: BaseException | None = error
    while link is not None and not isinstance(link, kind):
        link = link.__cause__ or link.__context__
    return link
