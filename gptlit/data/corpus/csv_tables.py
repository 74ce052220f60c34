"""CSV and TSV: the texts of one column, always as text, row by row as they stand in the file."""

import csv
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from gptlit.data.corpus.streams import READ_BYTES
from gptlit.data.corpus.text import decode, lines_of
from gptlit.data.corpus.values import no_such_column
from gptlit.errors import UserError

HEAD_ROWS = 1000  # rows that are read before the form of a file is settled
LONGEST_FIELD = 2**27  # characters
LINES_OF_A_FIELD = 100  # lines of TSV after which a quote that is not closed is taken for a character
LINES_OF_A_HEADER = 20
DELIMITERS = ",;\t|"
HEADER = re.compile(r'(?:[^"\r\n]++|"[^"]*+")*+(\r\r\n|\r\n|\r|\n)')  # the first row, and its line end
SEPARATOR_LINE = re.compile('"?sep=(.)"?\n', re.IGNORECASE)  # before the header, in files of Excel
OTHER_LINE_END = "\0"  # in a field; `decode` refuses files that hold it


def csv_rows(chunks: Iterable[bytes], column: str, where: str, delimiter: str) -> Iterator[str]:
    """Yield the texts of a column of CSV or TSV, an empty one for a row without text.

    Recognised: another delimiter, where the one expected does not give the column, and Excel's first line `sep=;`;
    blanks after the delimiters; row numbers without a header, as R writes them; a comma at the end of every row; TSV in
    which quotes are ordinary characters; the line ends of Windows and of old Macs.

    Args:
        chunks: bytes of the file.
        column: name in the header; of a file without a header the number of the column, from 1.
        where: name of the file, for errors.
        delimiter: expected between fields.

    Raises:
        UserError: no such column, a row with more or fewer fields than the first, or unbalanced quotes.
    """
    csv.field_size_limit(LONGEST_FIELD)
    lines = itertools.dropwhile(str.isspace, lines_of(table_text(decode(chunks, where, line_ends=False))))
    first = list(itertools.islice(lines, LINES_OF_A_HEADER))
    form = form_of(first, column, where, delimiter)
    rows = rows_of(itertools.chain(first[form.lines :], lines), form, where)
    head = list(itertools.islice(rows, HEAD_ROWS))
    numbers = [row[0] for _, row in head if len(row) == form.width + 1]
    names = bool(head) and numbers == [str(number + 1) for number in range(len(head))]
    at, width = form.column + names, form.width + names
    for line, row in itertools.chain(head, rows):
        if len(row) < width or any(row[width:]):
            raise UserError(
                f"{where} has {len(row)} fields in the row that ends in line {line:,}, and {width} in its "
                f"{'header' if form.named else 'first row'}: put texts that hold the delimiter or line ends in quotes"
            )
        yield row[at].replace(OTHER_LINE_END, "\n")


@dataclass(frozen=True)
class Form:
    """How a CSV file is written.

    Attributes:
        delimiter: between fields.
        blanks: whether blanks after a delimiter are left out.
        column: place of the text in a row, from 0.
        width: number of fields, without empty ones at the end.
        lines: before the first row of texts.
        named: whether there is a header.
    """

    delimiter: str
    blanks: bool
    column: int
    width: int
    lines: int
    named: bool


def form_of(first: list[str], column: str, where: str, delimiter: str) -> Form:
    """Find the form in which a CSV file has the column.

    Args:
        first: lines of the file.
        column: name in the header, or number.
        where: name of the file, for errors.
        delimiter: expected between fields.

    Raises:
        UserError: no such column, or two of its name.
    """
    separator = SEPARATOR_LINE.fullmatch(first[0]) if first else None
    skipped = 1 if separator else 0
    delimiter = separator[1] if separator else delimiter
    for other, blanks in itertools.product((delimiter, *DELIMITERS), (False, True)):
        names, lines = header_of(first[skipped:], other, blanks)
        if names.count(column) > 1:
            raise UserError(f"{where} has {names.count(column)} columns {column!r}: give the others other names")
        if column in names and (all(map(str.isdecimal, names)) or not column.isdecimal()):
            return Form(other, blanks, names.index(column), len(names), skipped + lines, named=True)
    if column.isdecimal():
        for other in (delimiter, *DELIMITERS):
            names, _ = header_of(first[skipped:], other, False)
            if 0 < int(column) <= len(names):
                return Form(other, False, int(column) - 1, len(names), skipped, named=False)
    names, _ = header_of(first[skipped:], delimiter_of(first[skipped:], delimiter), False)
    raise no_such_column(column, where, names, "; if that is no header, name a column by its number: 1")


def delimiter_of(lines: list[str], expected: str) -> str:
    """Return the delimiter that makes the first two rows equally wide, with several fields; else the expected one."""
    for delimiter in (expected, *DELIMITERS):
        widths = {len(row) for row in itertools.islice(csv.reader(lines, delimiter=delimiter), 2)}
        if len(widths) == 1 and max(widths) > 1:
            return delimiter
    return expected


def table_text(pieces: Iterable[str]) -> Iterator[str]:
    """Yield the text of a table in which `\\n` ends the rows, and OTHER_LINE_END is a line end of another kind.

    The line end after the header ends all rows. Programs write the other kind without quotes (pandas a carriage return,
    for instance), since it belongs to a field.
    """
    held, end = "", ""
    for piece in itertools.chain(pieces, (None,)):
        text = held + (piece or "")
        if not end:
            text = text.lstrip("\r\n")
            found = HEADER.match(text)
            settled = found and found.end() < len(text)  # no part of a longer line end
            if piece is not None and not settled and len(text) < READ_BYTES:
                held = text
                continue
            end = found[1] if found else "\n"
        cut = len(text) if piece is None else len(text.rstrip("\r"))
        text, held = text[:cut], text[cut:]
        if end == "\r\r\n":  # `\r\n` that went through a text file of Windows
            text = text.replace(end, "\n")
        if end == "\r":
            text = text.replace("\r\n", "\r").replace("\n", OTHER_LINE_END).replace("\r", "\n")
        elif "\r" in text:
            text = text.replace("\r\n", "\n").replace("\r", OTHER_LINE_END)
        yield text


def header_of(lines: list[str], delimiter: str, blanks: bool) -> tuple[list[str], int]:
    """Return the names in a header, without empty ones at its end, and the number of its lines."""
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=blanks)
    names = [name.replace(OTHER_LINE_END, "\n") for name in next(reader, [])]
    while names and not names[-1]:
        names.pop()
    return names, reader.line_num


def rows_of(lines: Iterable[str], form: Form, where: str) -> Iterator[tuple[int, list[str]]]:
    """Yield number of the last line and fields of each row after the header; blank lines are left out.

    Raises:
        UserError: a quoted field does not end where a field ends.
    """
    lines = iter(lines)
    if form.delimiter == "\t":
        head = list(itertools.islice(lines, HEAD_ROWS))
        lines = itertools.chain(head, lines)
        quoted = quotes_enclose_fields(head)
    else:
        quoted = True
    reader = csv.reader(
        lines,
        delimiter=form.delimiter,
        skipinitialspace=form.blanks,
        strict=True,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
    )
    try:
        for row in reader:
            if row:
                yield reader.line_num + form.lines, row
    except csv.Error as error:
        raise UserError(
            f"{where} is not CSV: {error} in line {reader.line_num + form.lines:,}: write a quote inside a quoted text "
            "twice"
        ) from error


def quotes_enclose_fields(lines: list[str]) -> bool:
    """Return whether quotes enclose fields of TSV; otherwise they are characters of the texts.

    They are characters where they are not balanced, or where no field needs them and a column has some with and some
    without (`NA` apart, which R writes without): lines of a dialogue, for instance.
    """
    reader = csv.reader(lines, delimiter="\t", strict=True)
    rows, end = [], 0
    try:
        for row in reader:
            end = reader.line_num
            rows.append(row)
    except csv.Error:
        if reader.line_num < HEAD_ROWS or HEAD_ROWS - end > LINES_OF_A_FIELD:
            return False  # else it is only the field in which these lines end
    if len({len(row) for row in rows if row}) > 1:
        return False
    as_they_stand = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    if list(map(len, rows)) != list(map(len, as_they_stand)):
        return True  # a delimiter or a line end is in quotes
    some = False
    for column in zip(*filter(None, as_they_stand), strict=True):
        fields = [field for field in column if field not in ("", "NA")]
        quoted = [field for field in fields if field[0] == '"']
        if any('""' in field[1:-1] for field in quoted):
            return True
        some = some or 0 < len(quoted) < len(fields)
    return not some
