"""Values of a text column: texts, conversations, and the errors for everything else."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from gptlit.data.corpus.text import clean
from gptlit.errors import UserError

SPEAKER, CONTENT = ("role", "from"), ("content", "value")  # keys of a message: OpenAI's, ShareGPT's
SHOWN = 60  # characters of a value, or of the name of a column, in a message
COLUMN_ROWS = 1000  # rows without the column after which it is taken for missing


def text_of(value: Any, column: str, where: str, row: str) -> str:
    """Return the text of one value; an empty one where there is none.

    Messages of a conversation become lines `ROLE: CONTENT`, strings of a list lines of their own.

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
        raise UserError(
            f"{column!r} holds {shown} in {row} of {where}, which is not text: write it in quotes, take the row out, "
            "or name another column",
            "text_column",
        )
    return clean("\n".join(lines))


def conversation(value: Sequence[Any]) -> list[str] | None:
    """Return the lines of a list of strings or messages; None where it is a list of something else."""
    lines = []
    for message in value:
        if isinstance(message, str):
            lines.append(message)
            continue
        if not isinstance(message, dict):
            return None
        speaker = next((message[key] for key in SPEAKER if isinstance(message.get(key), str)), None)
        content = next((message[key] for key in CONTENT if key in message), None)
        if isinstance(content, list):  # parts, of which some may be pictures
            content = "".join(part["text"] for part in content if isinstance(part, dict) and part.get("text"))
        if speaker is None or not isinstance(content, str | None):
            return None
        if content:
            lines.append(f"{speaker}: {content}")
    return lines


def no_such_column(column: str, where: str, columns: Iterable[str]) -> UserError:
    """Return the error for a table without the column that the user named."""
    names = [shortened(" ".join(name.split())) for name in columns]
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return UserError(f"{column!r} is not a column of {where}, which has {', '.join(names[:12])}{more}", "text_column")


def shortened(text: str) -> str:
    """Return the beginning of a text, for a message."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
