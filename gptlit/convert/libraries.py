"""Optional libraries: imported when needed, named with their extra when missing, quiet, and with usual errors."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from gptlit.errors import UserError


def import_optional(extra: str, *names: str) -> list[Any]:
    """Import libraries that belong to an extra of gptlit.

    Args:
        extra: name of the extra.
        names: modules to import.

    Raises:
        UserError: names the first one that is missing and the command that installs it.
    """
    modules = []
    for name in names:
        try:
            modules.append(import_module(name))
        except ImportError as error:
            raise UserError(f"{name} is not installed: in the checkout of gptlit, pip install '.[{extra}]'") from error
    return modules


def import_transformers() -> Any:
    """Import transformers. Raises `UserError` if it is missing."""
    return import_optional("hf", "transformers")[0]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence advice, retries and progress bars of transformers and of its hub client inside the block."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    level, hub_level, bars = logging.get_verbosity(), hub_logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        hub_logging.set_verbosity(hub_level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def os_errors_of_rust() -> Iterator[None]:
    """Raise errors of the operating system as `OSError` where safetensors and tokenizers have classes of their own.

    Rust ends the message of such an error with its number: `No space left on device (os error 28)`. Other errors stay
    as they are.

    Raises:
        OSError: with that number.
    """
    from safetensors import SafetensorError

    try:
        yield
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)$", str(error))
        if number is None or type(error) not in (SafetensorError, Exception):  # tokenizers raises plain `Exception`
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
