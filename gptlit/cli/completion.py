"""`gptlit completion SHELL`: a script that completes verbs, options and their values in a shell, written by shtab."""

import argparse
import types
from collections.abc import Iterable
from typing import Any, Literal, Union, get_args, get_origin

import shtab

from gptlit.cli.compare import make_parser as compare_parser
from gptlit.cli.export import export_parser
from gptlit.cli.fit.parser import make_parser as fit_parser
from gptlit.cli.ladder.command import make_parser as ladder_parser
from gptlit.cli.packaged import names_of_packaged_configs
from gptlit.cli.parser import PlainParser
from gptlit.cli.play import play_parser
from gptlit.cli.predict.command import make_parser as predict_parser
from gptlit.cli.verbs import VERBS

SHELLS = ("bash", "zsh")
PATHS = {
    "ckpt_path", "data.corpus", "data.tokenizer", "data.val_corpus", "model.init_from", "model.teachers", "output",
    "prompts", "run_dir", "runs",
}  # fmt: skip


def completion(verb: str, arguments: list[str]) -> int:
    """Print the script on stdout; return the exit code."""
    parser = PlainParser(
        prog=f"gptlit {verb}",
        description="Prints a script that completes gptlit's verbs, options and values; keep it where the shell looks.",
    )
    parser.add_argument("shell", choices=SHELLS, help="Shell that the script is for.")
    print(script(parser.parse_args(arguments).shell))
    return 0


def script(shell: str) -> str:
    """Return the script for `bash` or `zsh`."""
    root = argparse.ArgumentParser("gptlit", add_help=False)
    verbs = root.add_subparsers()
    for verb, text in VERBS.items():
        parser = verbs.add_parser(verb, help=one_line(text), add_help=False)
        parser.add_argument("-h", "--help", action="store_true", help="What the verb takes.")
        if verb == "completion":
            parser.add_argument("shell", choices=SHELLS)
        for action in options_of(verb):
            add_option(parser, action)
    return shtab.complete(root, shell)


def options_of(verb: str) -> Iterable[argparse.Action]:
    """Return the options of a verb, from its own parser."""
    if verb == "completion":
        return []
    if verb == "ladder":  # passes unknown options on to fit
        known = ladder_parser()._actions  # noqa: SLF001
        names = {action.dest for action in known}
        return [*known, *(action for action in options_of("fit") if action.dest not in names)]
    if verb == "play":
        return play_parser()._actions  # noqa: SLF001
    if verb == "compare":
        return compare_parser()._actions  # noqa: SLF001
    if verb in ("predict", "export"):
        return (predict_parser() if verb == "predict" else export_parser())._actions  # noqa: SLF001
    return fit_parser(verb)._actions  # noqa: SLF001


def add_option(parser: argparse.ArgumentParser, action: argparse.Action) -> None:
    """Add an option or an argument of another parser, with the values that it takes."""
    names = [name for name in action.option_strings if name.startswith("-")]  # the parser's links have other ones
    if not names and not action.option_strings and action.nargs == "+":
        parser.add_argument(action.dest, nargs="+").complete = shtab.FILE  # type: ignore[attr-defined]
    if not names or action.help == argparse.SUPPRESS or action.dest.rpartition(".")[2] == "help":
        return
    flag = action.nargs == 0
    settings: dict[str, Any] = {"action": "store_true"} if flag else {}
    values = [] if flag else [*(action.choices or values_of(getattr(action, "_typehint", None)))]
    if values:
        settings["choices"] = values
    if action.nargs == "+":
        settings["nargs"] = "+"
    added = parser.add_argument(*names, dest=action.dest, help=one_line(action.help or ""), **settings)
    if action.dest == "config":
        added.complete = config_names()  # type: ignore[attr-defined]
    elif action.dest in PATHS:
        added.complete = shtab.FILE  # type: ignore[attr-defined]


def values_of(kind: Any) -> list[str]:
    """Return the words that an option of this type takes; none for numbers and free text."""
    if kind is bool:
        return ["true", "false"]
    if get_origin(kind) is Literal:
        return [str(value) for value in get_args(kind)]
    if get_origin(kind) in (Union, types.UnionType):
        values = [value for part in get_args(kind) for value in values_of(part)]
        return [*values, "null"] if values and type(None) in get_args(kind) else values
    return []


def config_names() -> dict[str, Any]:
    """Return the completion of `--config` for shtab: names of packaged configurations, and files."""
    names = " ".join(names_of_packaged_configs())
    return {
        "bash": "_gptlit_config_files",  # `_file` in the name has shtab treat what it gives as names of files
        "zsh": "_gptlit_config_files",
        "preamble": {
            "bash": f'_gptlit_config_files() {{ compgen -W "{names}" -- "$1"; compgen -f -- "$1"; }}',
            "zsh": f"_gptlit_config_files() {{ _alternative 'names:packaged:({names})' 'files:file:_files'; }}",
        },
    }


def one_line(text: str) -> str:
    """Return the first sentence of a help text, with `%` escaped for argparse."""
    return " ".join(text.split()).partition(". ")[0].rstrip(".").replace("%", "%%")
