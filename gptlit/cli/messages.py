"""Lines and tables on stderr, and warnings of libraries that are silenced."""

import logging
import warnings
from collections.abc import Iterable

from rich.text import Text

from gptlit.callbacks.console import console


def say(text: str, style: str | None = None) -> None:
    """Print a line on stderr."""
    console().print(text, style=style)


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
        r".*sync_dist=True.*",  # the metrics are those of all processes already
        r".*callbacks used to create the checkpoint need to be provided.*",
        r"Experiment logs directory .* exists and is not empty.*",
    ):
        warnings.filterwarnings("ignore", message=message)


def table(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Print a title and rows of a name and a value on stderr; a row is one line, so that commands can be copied."""
    rows = list(rows)
    width = max((len(name) for name, _ in rows), default=0)
    if title:
        console().print(title)
    for name, value in rows:
        console().print(Text.assemble((f"{name:<{width}}  ", "dim"), value))


def duration(seconds: float) -> str:
    """Return `47 s`, `3 min 5 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
