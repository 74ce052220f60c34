"""What the command says: one-line errors, quiet libraries, the lines at the start and the table at the end of a run."""

import logging
import re
import sys
import warnings
from collections.abc import Iterable
from difflib import get_close_matches

from rich.console import Console
from rich.table import Table


def say(text: str, style: str | None = None) -> None:
    """A line on stderr."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(text, style=style, markup=False)


def quiet_libraries() -> None:
    """Silences advice and advertising of the libraries below us; their errors still arrive as exceptions."""
    import lightning.pytorch  # noqa: F401  sets its own levels on import, so it has to come first

    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        r".*does not have many workers.*",
        r".*dataloader is not resumable.*",
        r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
        r".*lr_scheduler.step\(\).*",
        r".*is smaller than the logging interval.*",
        r".*in eval mode at the start of training.*",
        r".*is not shared across.*",
        r".*GPU available but not used.*",
        r".*but have no logger configured.*",
        r".*callbacks used to create the checkpoint need to be provided.*",
        r"Experiment logs directory .* exists and is not empty.*",
    ):
        warnings.filterwarnings("ignore", message=message)


def parser_error_line(error: BaseException, known: Iterable[str]) -> str:
    """One line from an error of the parser: the flag, what is wrong with it, and the nearest known name."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    text = re.sub(r"^argument \S*: ", "", text)
    stranger = re.search(
        r"(?:Unrecognized arguments: |unrecognized arguments: |Option |Key |key ['\"]?)(--)?([\w.]+)", text
    )
    if stranger:
        close = get_close_matches(stranger.group(2), list(known), n=1, cutoff=0.6)
        if close and close[0] != stranger.group(2):
            text += f" (did you mean {close[0]}?)"
    return text


def table(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """A small two-column table on stderr."""
    grid = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(name, value)
    Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 120).print(grid)


def duration(seconds: float) -> str:
    """`47 s`, `3 min 5 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
