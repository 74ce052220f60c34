"""`gptlit export`: a run becomes a folder that `transformers` loads."""

import shlex
from pathlib import Path

from gptlit.checkpoint.files import find_checkpoint, read_checkpoint
from gptlit.cli.messages import table
from gptlit.cli.parser import Parser, parse
from gptlit.convert.export import export_run
from gptlit.errors import UserError


def export_parser() -> Parser:
    """The options of the verb."""
    parser = Parser(
        prog="gptlit export",
        description="Writes a run as a Hugging Face folder: GPT2LMHeadModel or NanoChatForCausalLM, and its tokenizer.",
        exit_on_error=False,
    )
    parser.add_argument("--ckpt_path", type=str | None, help="Run folder (its best.ckpt) or checkpoint file.")
    parser.add_argument("--output", type=str | None, help="Folder to make; it must not hold anything yet.")
    return parser


def export(verb: str, arguments: list[str]) -> int:
    """Exports, and says what was written on stderr; returns the exit code."""
    options = parse(export_parser(), arguments)
    if not options.ckpt_path:
        raise UserError(f"gptlit {verb} needs --ckpt_path: a run folder or a checkpoint file")
    if not options.output:
        raise UserError(f"gptlit {verb} needs --output: the folder to make")
    if Path(options.output).name in ("", ".."):
        raise UserError(f"--output {options.output}: give the folder a name of its own")
    path = find_checkpoint(options.ckpt_path, "best")
    checkpoint = read_checkpoint(path)
    command = shlex.join(["gptlit", verb, *arguments])
    exported = export_run(checkpoint, Path(options.output), command)
    folder = str(exported.folder)
    table(
        "done",
        [
            ("checkpoint", str(path)),
            ("architecture", exported.architecture),
            ("check", f"logits equal at {exported.positions:,} positions to {exported.largest_difference:.1e}"),
            ("folder", folder),
            ("load it with", f"transformers.AutoModelForCausalLM.from_pretrained({folder!r})"),
        ],
    )
    return 0
