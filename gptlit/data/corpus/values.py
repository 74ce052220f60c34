"""Values of a text column: texts, conversations, and the errors for everything else."""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from gptlit.data.corpus.text import clean
from gptlit.errors import UserError, some_of

SPEAKER = ("role", "from")  # keys of a message: OpenAI's, and that of ShareGPT and Telegram
CONTENT = ("content", "value", "text")  # OpenAI's, ShareGPT's, Telegram's
KEYS_SHOWN, KEYS_DEEP = 6, 3  # names in a message, and dots in each
SHOWN = 60  # characters of a value, or of the name of a column, in a message
COLUMN_ROWS = 1000  # rows without the column after which it is taken for missing


class NoSuchColumnError(UserError):
    """A table has no column of the name that the user gave."""


def text_of(value: Any, column: str, where: str, row: str) -> str:
    """Return the text of one value; an empty one where there is none.

    Messages of a conversation become lines `ROLE: CONTENT`, strings of a list lines of their own; parts of one text
    (strings and objects with `text`, as in an export of Telegram) are joined.

    Args:
        value: a string, None, a list of strings, or a list of messages.
        column: name of the column, for errors.
        where: name of the file, for errors.
        row: place in the file, for errors: `line 3`.

    Raises:
        UserError: the value is none of these.
    """
    if isinstance(value, str):
        return clean(value)
    if value is None:
        return ""
    lines = conversation(value) if isinstance(value, Sequence) else None
    if lines is None:
        shown = shortened(json.dumps(value, ensure_ascii=False, default=str))
        inside = [name for name in keys_of(value, column) if name != column]
        remedy = "write it in quotes, take the row out, or name another column"
        if inside:
            remedy = f"name one of {', '.join(inside[:KEYS_SHOWN])}{', …' * (len(inside) > KEYS_SHOWN)}"
        raise UserError(f"{column!r} holds {shown} in {row} of {where}, which is not text: {remedy}", "text_column")
    return clean("\n".join(lines))


def text_in(row: Any, column: str, where: str, place: str, named: str = "") -> str | None:
    """Return the text of a row; None where the row has no such column.

    Args:
        row: usually a dict.
        column: a key, or keys inside each other with dots between them; of a list every element gives a line.
        where: name of the file, for errors.
        place: of the row in the file, for errors.
        named: whole name of the column, where `row` is inside of another.

    Raises:
        UserError: the value is not text.
    """
    named = named or column
    if not isinstance(row, dict):
        return None
    if column in row:
        return text_of(row[column], named, where, place)
    outer, _, inner = column.partition(".")
    if not inner or outer not in row:
        return None
    if not isinstance(row[outer], list):
        return text_in(row[outer], inner, where, place, named)
    texts = [text for part in row[outer] if (text := text_in(part, inner, where, place, named)) is not None]
    return "\n".join(filter(None, texts)) if texts else None


def keys_of(value: Any, column: str) -> Iterator[str]:
    """Yield the names of the values inside a column, `data.text`; that of the column for a plain value."""
    if isinstance(value, list) and value and conversation(value) is None:
        value = value[0]
    if not isinstance(value, dict) or not value or column.count(".") == KEYS_DEEP:
        yield column
        return
    for key, inner in value.items():
        yield from keys_of(inner, f"{column}.{key}" if column else key)


def conversation(value: Sequence[Any]) -> list[str] | None:
    """Return the lines of a list of strings or messages, or of one text in parts; None for a list of something else."""
    lines = []
    for message in value:
        if isinstance(message, str):
            lines.append(message)
            continue
        if not isinstance(message, dict):
            return None
        speaker = next((message[key] for key in SPEAKER if isinstance(message.get(key), str)), None)
        key = next((key for key in CONTENT if key in message), None)
        content = message[key] if key else None
        if isinstance(content, list):  # parts, of which some may be pictures
            content = "".join(filter(None, map(part_of, content)))
        if not isinstance(content, str | None) or (content and speaker is None) or not (key or "role" in message):
            return joined_parts(value)
        if content:
            lines.append(f"{speaker}: {content}")
    return lines


def joined_parts(value: Sequence[Any]) -> list[str] | None:
    """Return the text of a list of strings and of objects with `text` but no speaker; None for something else."""
    parts = [part_of(part) for part in value]
    spoken = any(key in part for part in value if isinstance(part, dict) for key in SPEAKER)
    return None if spoken or None in parts else ["".join(filter(None, parts))]


def part_of(value: Any) -> str | None:
    """Return the text of a part of a message: a string, or an object with one; None for something else."""
    text = value.get("text") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def no_such_column(column: str, where: str, columns: Iterable[str], remedy: str = "") -> NoSuchColumnError:
    """Return the error for a table without the column that the user named."""
    names = [shortened(" ".join(name.split())) for name in columns]
    return NoSuchColumnError(
        f"{column!r} is not a column of {where}, which has {some_of(names, 12)}{remedy}", "text_column"
    )


def shortened(text: str) -> str:
    """Return the beginning of a text, for a message."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
