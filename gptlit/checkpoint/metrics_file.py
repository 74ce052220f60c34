"""Reads `metrics.csv`, the table of all metrics of a run."""

import csv
import io
from pathlib import Path

from gptlit.errors import UserError


def read_metrics(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Return the columns of a metrics.csv and its rows; a line cut short by a crash is left out.

    Raises:
        UserError: if it is not a text file.
    """
    content = path.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]  # without a line end, the last number may lack digits
    try:
        text = complete.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}: repair the file, or train again") from error
    reader = csv.DictReader(io.StringIO(text, newline=""), restval=None)
    columns = list(reader.fieldnames or ["step"])
    return columns, [row for row in reader if None not in row and None not in row.values()]
