"""JSON: the texts of one column, read value by value as they stand in the file.

`datasets` and pandas guess a type for every column and convert the texts to it, from what the first rows hold. Here
only the text column is looked at, and always as text.
"""

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from gptlit.data.corpus.streams import READ_BYTES
from gptlit.data.corpus.text import decode, lines_of
from gptlit.data.corpus.values import COLUMN_ROWS, keys_of, no_such_column, shortened, text_in
from gptlit.errors import UserError

OTHER_JSON = "give an array, or values over several lines, the ending .json"
NOT_BLANK = re.compile(r"[^ \t\n\r]")  # between JSON values
NUMBER = "0123456789.eE+-"  # characters with which a number may continue after the end of a piece


def json_rows(chunks: Iterable[bytes], column: str, where: str, per_line: bool) -> Iterator[str]:
    """Yield the texts of a column of JSON objects, or texts that stand in the place of objects.

    A row without text gives an empty one.

    Args:
        chunks: bytes of the file.
        column: key of the text, or keys inside each other, `data.text`.
        where: name of the file, for errors.
        per_line: JSON Lines; otherwise one array of objects, or objects one after another.

    Raises:
        UserError: not JSON, no such column, or a value that is not text.
    """
    seen: dict[str, None] = {}
    found = False
    rows = json_lines(chunks, where) if per_line else json_values(chunks, where)
    for count, (place, row) in enumerate(rows):
        if isinstance(row, str):
            row = {column: row}
        if not isinstance(row, dict):
            shown = shortened(json.dumps(row))
            raise UserError(f"{where} holds {shown} in {place}, not a text or an object with a column {column!r}")
        text = text_in(row, column, where, place)
        if text is not None:
            found = True
        elif not found:
            seen.update(dict.fromkeys(keys_of(row, "")))
            if count + 1 == COLUMN_ROWS:
                raise no_such_column(column, where, seen)
        yield text or ""
    if not found and seen:
        raise no_such_column(column, where, seen)


def json_lines(chunks: Iterable[bytes], where: str) -> Iterator[tuple[str, Any]]:
    """Yield place and value of every line that is not blank."""
    decoder = json.JSONDecoder()
    for number, line in enumerate(lines_of(decode(chunks, where)), 1):
        line = line.strip(" \t\n\r")
        if not line:
            continue
        try:
            value, end = scan(decoder, line)
            if end < len(line):
                raise ValueError(f"more than one value at column {end + 1}")
        except ValueError as error:
            several = f"; {OTHER_JSON}" if line in ("[", "{") else ""
            raise UserError(f"{where} is not JSON Lines: {reason(error)} of line {number:,}{several}") from error
        if number == 1 and isinstance(value, list):
            raise UserError(f"{where} is not JSON Lines: line 1 is an array; {OTHER_JSON}")
        yield f"line {number:,}", value


def json_values(chunks: Iterable[bytes], where: str) -> Iterator[tuple[str, Any]]:
    """Yield place and value of every element of one array, or of values that follow each other.

    One element is held in memory at a time, not the array.
    """
    buffer, count = JsonBuffer(decode(chunks, where)), 0
    array = buffer.peek() == "["
    buffer.at += array
    while character := buffer.peek():
        if array and character in ",]":
            buffer.at += 1
            if character == "," or not buffer.peek():
                array = character == ","
                continue
            raise UserError(f"{where} is not JSON: something follows the end of its array")
        count += 1
        try:
            value = buffer.value()
        except ValueError as error:
            raise UserError(f"{where} is not JSON: {reason(error)} in row {count:,}") from error
        yield f"row {count:,}", value
    if array:
        raise UserError(f"{where} is not JSON: its array does not end")


class JsonBuffer:
    """A text that arrives in pieces, of which JSON values are read one by one."""

    def __init__(self, pieces: Iterator[str]) -> None:
        self.at = 0
        self._pieces, self._text, self._ended = pieces, "", False
        self._decoder = json.JSONDecoder()

    def peek(self) -> str:
        """Return the next character that is not blank, or an empty text at the end."""
        while True:
            found = NOT_BLANK.search(self._text, self.at)
            self.at = found.start() if found else len(self._text)
            if found or self._ended:
                return found[0] if found else ""
            self._more()

    def value(self) -> Any:
        """Return the next value.

        Raises:
            ValueError: the text is not JSON.
        """
        while True:
            try:
                value, end = scan(self._decoder, self._text, self.at)
                if self._ended or (end < len(self._text) and self._text[end] not in NUMBER):
                    self.at = end
                    return value
            except ValueError:
                if self._ended:
                    raise
            self._more()

    def _more(self) -> None:
        """Read as much again as is held, so that a long value is scanned a few times only."""
        held = self._text[self.at :]
        piece = "".join(itertools.islice(self._pieces, max(1, len(held) // READ_BYTES)))
        self._text, self.at, self._ended = held + piece, 0, not piece


def scan(decoder: json.JSONDecoder, text: str, at: int = 0) -> tuple[Any, int]:
    """Parse one JSON value and return it with the place of its end.

    Raises:
        ValueError: not JSON, or nested too deeply.
    """
    try:
        return decoder.raw_decode(text, at)
    except json.JSONDecodeError:
        raise
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except ValueError:  # an integer of more digits than Python converts, in whatever column
        return json.JSONDecoder(parse_int=float).raw_decode(text, at)


def reason(error: ValueError) -> str:
    """Return what is wrong with a line of JSON, without its place in the text."""
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    return f"{error.msg.removesuffix(' at')} at column {error.colno}"  # some end in "at", before the place
