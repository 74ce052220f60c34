"""`gptlit`, `python -m gptlit`: answers what needs no torch at once, and hands the rest to `gptlit.cli`."""

import sys

from gptlit.cli.verbs import VERBS
from gptlit.version import __version__

HELP = """usage: gptlit VERB [options]

A character-level GPT, trained, sampled and kept safe by PyTorch Lightning.

{verbs}

gptlit VERB --help shows the options of a verb; gptlit --version the version.
Options can stand in YAML files: --config FILE, repeatable, later files win, flags win over files.
"""


def help_text() -> str:
    """The top-level help."""
    width = max(map(len, VERBS))
    return HELP.format(verbs="\n".join(f"  {verb:<{width}}  {text}" for verb, text in VERBS.items()))


def main() -> int:
    """Runs the command; returns its exit code (2 after a mistake of the user)."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(help_text(), end="")
        return 0 if arguments else 2
    if arguments[0] in ("--version", "-V"):
        print(f"gptlit {__version__}")
        return 0
    if arguments[0] not in VERBS:
        from difflib import get_close_matches

        if arguments[0].startswith("-"):
            advice = f"the verb comes first: gptlit fit {' '.join(arguments[:2])} …"
        else:
            close = get_close_matches(arguments[0], VERBS, n=1)
            advice = f"did you mean {close[0]!r}?" if close else f"the verbs are {', '.join(VERBS)}"
        print(f"gptlit: {arguments[0]!r} is not a verb: {advice}", file=sys.stderr)
        return 2
    from gptlit.cli import run

    return run(arguments[0], arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
