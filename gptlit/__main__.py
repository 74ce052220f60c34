"""`gptlit` and `python -m gptlit`: answers what needs no torch, and passes the rest to `gptlit.cli`."""

import sys

from gptlit.cli.verbs import VERBS
from gptlit.version import __version__

HELP = """usage: gptlit VERB [options]

A character-level GPT in PyTorch Lightning.

{verbs}

gptlit VERB --help shows the options of a verb, gptlit --version the version.
Options of fit, predict, validate, test and ladder can be in YAML files: --config FILE, repeatable; later files override
earlier ones, flags override files.
"""


def help_text() -> str:
    """Return the top-level help."""
    width = max(map(len, VERBS))
    return HELP.format(verbs="\n".join(f"  {verb:<{width}}  {text}" for verb, text in VERBS.items()))


def verb_advice(arguments: list[str]) -> str:
    """Return what to do if the first argument is not a verb."""
    from difflib import get_close_matches

    from gptlit.cli.familiar import VERBS as FAMILIAR
    from gptlit.cli.familiar import answer_to

    if arguments[0].startswith("-"):
        return f"the verb comes first: gptlit fit {' '.join(arguments[:2])} …"
    if answer := answer_to(arguments[0], FAMILIAR):
        return f"use {answer}"
    close = get_close_matches(arguments[0], VERBS, n=1)
    return f"did you mean {close[0]!r}?" if close else f"the verbs are {', '.join(VERBS)}"


def main() -> int:
    """Run the command; return its exit code (2 after a user error)."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(help_text(), end="")
        return 0 if arguments else 2
    if arguments[0] in ("--version", "-V"):
        print(f"gptlit {__version__}")
        return 0
    if arguments[0] not in VERBS:
        print(f"gptlit: {arguments[0]!r} is not a verb: {verb_advice(arguments)}", file=sys.stderr)
        return 2
    if arguments == ["fit"]:
        print("gptlit: gptlit fit needs a configuration: gptlit fit --config base", file=sys.stderr)
        return 2
    from gptlit.cli import run

    return run(arguments[0], arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
