"""What the command says: one-line errors, quiet libraries, the lines at the start and the table at the end of a run."""

import logging
import re
import warnings
from collections.abc import Iterable
from difflib import get_close_matches

from rich.text import Text

from gptlit.callbacks.console import console
from gptlit.cli.familiar import flag_advice, value_advice


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


def parser_error_line(error: BaseException, known: Iterable[str]) -> str:
    """One line from an error of jsonargparse: the flag, what is wrong with it, what it takes or what was meant.

    Args:
        error: as the parser raised it; its text runs over many lines.
        known: names of all options, for "did you mean".
    """
    text = re.sub(r"^(?:argument \S+: )?Problems? .*? config: ", "", str(error).strip())
    flat = " ".join(text.split())
    if found := re.search(r"unrecognized arguments: (\S+)", flat, re.IGNORECASE):
        if not found[1].startswith("-"):
            return f"{found[1]!r} is not the value of any option: {value_advice(found[1])}"
        return unknown_option(found[1].partition("=")[0], known)
    if found := re.search(r"does not accept option '([^']*)'|Key '([^']*)' is not expected", flat):
        return unknown_option(f"--{found[1] or found[2]}", known)
    if found := re.search(r"argument (\S+): expected one argument", flat):
        return f"{max(found[1].split('/')[:2], key=len).rstrip('+')} needs a value"
    if found := re.search(r'Linked "([^"]*)" must be given via "([^"]*)"', flat):
        return f"--{found[1]} always equals --{found[2]}: give that instead"
    if found := re.search(r'key "([^"]*)"', flat):
        return f"--{found[1]} {wrong_value(text)}"
    return flat


def unknown_option(flag: str, known: Iterable[str]) -> str:
    """Return that there is no such option, and which one was meant."""
    if advice := flag_advice(flag):
        return f"{flag} is not an option: {advice}"
    names = [name for name in known if not name.startswith("_")]
    wanted = flag.lstrip("-")
    close = get_close_matches(wanted, names, n=1, cutoff=0.6)
    if not close:  # a forgotten prefix: --n_layer for --model.gpt.n_layer
        close = [name for name in names if name.rpartition(".")[2] == wanted.rpartition(".")[2]]
    return f"{flag} is not an option" + (f": did you mean --{close[0]}?" if close else "; --help lists them")


TYPES = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text", "NoneType": "null"}
TYPES |= dict.fromkeys(("tuple", "list", "collections.abc.Iterable"), "a list")


def wrong_value(text: str) -> str:
    """`is x: it must be a whole number`, from what jsonargparse says about one key."""
    given = re.search(r"(?:Got value|Given value): (.*)", text)
    shown = "" if given is None else re.sub(r"NestedArg\(key='.*?', val='?(.*?)'?\)", r"\1", given[1].strip())
    value = f"is {shown}: " if given else ""
    if found := re.search(r"Problem with given class_path '([^']*)':\s*(.*)", text):
        return f"names {found[1]}, which cannot be used: {found[2].strip()}"
    wanted: list[str] = []
    choices: list[str] = []
    for kind in re.findall(r"Expected a (.*?)(?:\. Got value.*)?(?=\n|$)", text):
        if kind.startswith("typing.Literal["):
            choices += [choice.strip(" '\"") for choice in kind[len("typing.Literal[") : -1].split(",")]
        elif name := TYPES.get(kind.removeprefix("<class '").removesuffix("'>")):
            wanted.append(name)
    if "import path" in text:
        wanted.insert(0, "a class with its arguments (class_path, init_args)")
    if choices:
        wanted.insert(0, f"one of {', '.join(dict.fromkeys(choices))}")
    if not wanted:
        unloadable = re.search(r"Unable to load config ['\"]?(.*?)['\"]?\s", text)
        if unloadable:
            return f"is {unloadable[1]}: it must be a group of settings"
        return re.sub(r'^Parser key "[^"]*": ', "", " ".join(text.split()))
    return f"{value}it must be {' or '.join(dict.fromkeys(wanted))}"


def cause_of(error: BaseException, kind: type[BaseException]) -> BaseException | None:
    """The first exception of a kind among an exception and those that led to it."""
    link: BaseException | None = error
    while link is not None and not isinstance(link, kind):
        link = link.__cause__ or link.__context__
    return link


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
