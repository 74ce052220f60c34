"""`gptlit play`: trained models as one interactive HTML page."""

import webbrowser
from pathlib import Path

from gptlit.checkpoint.files import find_checkpoint
from gptlit.cli.messages import say
from gptlit.cli.parser import PlainParser
from gptlit.errors import UserError


def play_parser() -> PlainParser:
    """Return the parser of the verb's options."""
    parser = PlainParser(
        prog="gptlit play",
        description="Writes models as one HTML page, which computes next-token probabilities, surprise, attention and "
        "samples in the browser, without a network.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--ckpt_path",
        nargs="+",
        action="extend",
        metavar="RUN",
        help="Run folder (its best.ckpt) or checkpoint file; several are shown side by side.",
    )
    parser.add_argument("--output", help="HTML file to write. Default: play.html in the folder of the first run.")
    parser.add_argument(
        "--text", help="Text that the page opens with. Default: a line of Shakespeare, or a sample of the run."
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16"),
        default="float32",
        help="Type of the weights in the page. float16 halves its size and rounds the weights.",
    )
    parser.add_argument("--open", action="store_true", help="Open the page in the browser.")
    return parser


def play(verb: str, arguments: list[str]) -> int:
    """Write the page, and print its path on stdout; returns the exit code."""
    options = play_parser().parse_args(arguments)
    if not all(options.ckpt_path or [""]):
        raise UserError(f"gptlit {verb} needs --ckpt_path: a run folder or a checkpoint file, or several")
    from gptlit.play import read_runs, write_page

    runs = read_runs(options.ckpt_path)
    folder = find_checkpoint(options.ckpt_path[0], "best").parent
    path = Path(options.output) if options.output else folder / "play.html"
    try:
        write_page(path, runs, options.text, options.dtype)
    except UserError as error:
        raise UserError(f"--{error.setting} {error.message}" if error.setting else error.message) from error
    print(path)
    if options.open and not webbrowser.open(path.absolute().as_uri()):
        say(f"no browser was found: open {path}")
    return 0
