"""`gptlit export`: write a run for other programs."""

import shlex
from pathlib import Path

from gptlit.checkpoint.files import find_checkpoint, read_checkpoint
from gptlit.cli.messages import table
from gptlit.cli.parser import Parser, parse
from gptlit.convert.export import Format, export_run
from gptlit.convert.nanogpt import vocabulary_of
from gptlit.errors import UserError


def export_parser() -> Parser:
    """Return the parser of the verb."""
    parser = Parser(
        prog="gptlit export",
        description="Write a run for other programs. The result is loaded again and compared with the run.",
        exit_on_error=False,
    )
    parser.add_argument("--ckpt_path", type=str | None, help="Run folder (its best.ckpt) or checkpoint file.")
    parser.add_argument("--output", type=str | None, help="Folder to make; it must be new or empty.")
    parser.add_argument(
        "--format",
        type=Format,
        default="transformers",
        help="transformers: GPT2LMHeadModel or NanoChatForCausalLM; onnx: a graph; gguf: llama.cpp; nanogpt: ckpt.pt.",
    )
    return parser


def export(verb: str, arguments: list[str]) -> int:
    """Export, and report on stderr; return the exit code."""
    options = parse(export_parser(), arguments)
    if not options.ckpt_path:
        raise UserError(f"gptlit {verb} needs --ckpt_path: a run folder or a checkpoint file")
    if not options.output:
        raise UserError(f"gptlit {verb} needs --output: the folder to make")
    if Path(options.output).name in ("", ".."):
        raise UserError(f"{options.output}: give the folder a name of its own", "--output")
    path = find_checkpoint(options.ckpt_path, "best")
    command = shlex.join(["gptlit", verb, *arguments])
    exported = export_run(read_checkpoint(path), Path(options.output), options.format, command)
    check = exported.check
    where = "in a checkout of nanoGPT" if options.format == "nanogpt" else "load it with"
    table(
        "done",
        [
            ("checkpoint", str(path)),
            ("architecture" if options.format == "transformers" else "format", exported.architecture),
            ("check", f"logits equal at {check.positions:,} positions to {check.largest_difference:.1e}"),
            ("folder", str(exported.folder)),
            (where, loading(options.format, exported.folder)),
        ],
    )
    return 0


def loading(format: Format, folder: Path) -> str:
    """Return what loads an export: a line of Python, or of a shell for the programs that are not libraries."""
    if format == "transformers":
        return f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})"
    if format == "onnx":
        return f"import onnxruntime; onnxruntime.InferenceSession({str(folder / 'model.onnx')!r})"
    if format == "gguf":
        return shlex.join(["llama-cli", "-m", str(folder / "model.gguf")])
    folder = folder.absolute()  # sample.py runs in a checkout of nanoGPT
    sample = shlex.join(["python", "sample.py", f"--out_dir={folder}", "--device=cpu"])
    vocabulary = vocabulary_of(folder)  # without one sample.py takes GPT-2's
    return f"{shlex.join(['cp', '-r', str(vocabulary), 'data/'])} && {sample}" if vocabulary.is_dir() else sample
