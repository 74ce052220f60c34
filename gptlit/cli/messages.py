"""Lines and tables on stderr, and warnings of libraries that are silenced."""

import logging
import warnings
from collections.abc import Iterable

from rich.text import Text

from gptlit.callbacks.console import console
from gptlit.checkpoint.run_dir import process_rank


def say(text: str, style: str | None = None) -> None:
    """Print a line on stderr."""
    console().print(text, style=style)


def say_once(text: str, style: str | None = None) -> None:
    """A line on stderr, from the first of several processes."""
    if process_rank() == 0:
        say(text, style=style)


CHATTER = (  # what Lightning logs unasked; everything else that it logs was asked for, or concerns the user
    *("GPU available", "TPU available", "HPU available", "You are using a CUDA device"),  # the opening lines say it
    *("`Trainer", "Trainer"),  # "`Trainer.fit` stopped: `max_steps=60` reached.": the closing lines say it
    *("Restor", "Loaded model weights"),  # checkpoints: the opening lines say it
    *("LOCAL_RANK", "Initializing distributed", "-----", "distributed_backend", "All distributed", "Using "),
    *("\U0001f4a1", "`weights_only`"),  # advertising, and a note to programmers
)
SILENCED = (  # warnings about what is as it should be in gptlit
    r".*does not have many workers.*",  # batches are a function of the step: there is nothing to wait for
    r".*dataloader is not resumable.*",  # the same
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",  # between Lightning and torch
    r".*is smaller than the logging interval.*",  # the last step is always logged
    r".*in eval mode at the start of training.*",  # set by validation
    r".*GPU available but not used.*",  # trainer.accelerator says so
    r".*but have no logger configured.*",  # validate and test print their metrics
    r".*sync_dist=True.*",  # the metrics are those of all processes already
    r".*callbacks used to create the checkpoint need to be provided.*",  # validate and test need none
    r"\s*Unable to serialize instance cpu\s*",  # default device of StochasticWeightAveraging, which is refused
)


class Heard(logging.Handler):
    """Prints what Lightning logs on stderr, without its chatter."""

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage().strip("\n")
        if not text.lstrip().startswith(CHATTER):
            say(text)


def quiet_libraries() -> None:
    """Silence the chatter of Lightning. What concerns the user's data or was asked for still arrives."""
    import lightning.pytorch  # noqa: F401  sets its own levels on import, so it has to come first

    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [Heard()], False
        logger.setLevel(logging.INFO)
    for message in SILENCED:
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
