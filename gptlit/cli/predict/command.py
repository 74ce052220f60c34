"""`gptlit predict`: text generated from a checkpoint, streamed to stdout or written to a file.

On one device this needs no Lightning, whose import takes longer than the rest. Several devices, strategies and
precisions go through the Trainer.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from jsonargparse import Namespace

from gptlit.checkpoint.files import find_checkpoint, read_checkpoint
from gptlit.checkpoint.network import load_network
from gptlit.checkpoint.run_dir import first_process
from gptlit.cli.messages import say
from gptlit.cli.parser import Parser, WrongValueError, option_names, parse
from gptlit.cli.predict.prompts import Prompt, encode_prompt, in_batches, is_jsonl, read_prompts
from gptlit.cli.predict.writer import TextWriter, open_output
from gptlit.cli.settings import check_config, values_of
from gptlit.cli.streams import drop_the_rest
from gptlit.device.cpu import is_amd
from gptlit.device.memory import keep_freed_memory
from gptlit.device.processes import leave_process_group
from gptlit.errors import UserError
from gptlit.generation.engine.small_weights import WeightsDtype, check_weights_dtype
from gptlit.generation.generate import Sampling
from gptlit.generation.text import GenerationConfig, generate_texts
from gptlit.tokenizer import Tokenizer, from_json

Run = Callable[[Sequence[Prompt], TextWriter], None]
ONE_DEVICE = {"devices": (1, "1", "auto"), "strategy": ("auto",), "num_nodes": (1,), "precision": ("32-true", "32", 32)}


def make_parser() -> Parser:
    """Return the parser of `gptlit predict`."""
    parser = Parser(prog="gptlit predict", description="Generate text with a trained model.", exit_on_error=False)
    parser.add_argument("-c", "--config", action="config", help="YAML file with any of these options.")
    parser.add_argument("--ckpt_path", type=str | None, help="Run folder (its best.ckpt) or checkpoint file.")
    parser.add_argument(
        "--prompt",
        type=str | None,
        help="Text to continue; `-` reads it from stdin, `FILE:path` from a file. Default: the start of a document, "
        "or a newline.",
    )
    parser.add_argument(
        "--prompts",
        type=str | None,
        help='File of prompts, one per line, or JSONL with {"prompt": …}; `-` is stdin, in either format.',
    )
    parser.add_argument("--max_new_tokens", type=int, default=500, help="Tokens to generate for each sample.")
    parser.add_argument("--num_samples", type=int, default=1, help="Samples per prompt.")
    parser.add_argument(
        "--seed", type=int, default=1337, help="Seed; sample k depends only on it and k, not on the batch."
    )
    parser.add_class_arguments(Sampling, None)
    add_text_options(parser)
    parser.add_argument("--repeat_prompt", type=bool, default=True, help="Print the prompt before the text.")
    parser.add_argument(
        "--output",
        type=str | None,
        help="File to write: JSONL with log-probabilities if it ends in .jsonl, else text.",
    )
    add_trainer_options(parser)
    return parser


def add_text_options(parser: Parser) -> None:
    """Add where a text ends, what the model reads of it, and what becomes of unknown characters."""
    parser.add_argument(
        "--stop",
        type=stop_texts,
        action="extend",
        help="Text to stop before; may be given several times. A configuration file holds one text or a list; those "
        "of later flags are added to it.",
    )
    parser.add_argument(
        "--one_document",
        type=bool,
        default=False,
        help="Stop at the end of the document, as the run's data defines it.",
    )
    parser.add_argument(
        "--context",
        type=Literal["exact", "rolling"],
        default="rolling",
        help="After block_size tokens: keep half of the cache when it is full (rolling), or read the last block_size "
        "tokens again for every token (exact, many times slower).",
    )
    parser.add_argument(
        "--weights_dtype",
        type=WeightsDtype | None,
        help="Round the large weight matrices to bfloat16 or int8: faster on a CPU with instructions for bfloat16, for "
        "models from a few million parameters on. Default: the model's own type.",
    )
    parser.add_argument(
        "--unknown",
        type=str,
        default="error",
        help="Prompt characters outside the vocabulary: error, skip or replace:C.",
    )


def add_trainer_options(parser: Parser) -> None:
    """Add the settings of the Trainer that concern sampling."""
    parser.add_argument("--trainer.accelerator", type=str, default="auto", help="Device: auto, cpu, gpu, mps or tpu.")
    parser.add_argument("--trainer.devices", type=int | str, default=1, help="Devices that share the prompts.")
    parser.add_argument("--trainer.strategy", type=str, default="auto", help="How devices work together, such as ddp.")
    parser.add_argument("--trainer.num_nodes", type=int, default=1, help="Machines that share the prompts.")
    parser.add_argument(
        "--trainer.precision",
        type=str,
        default="32-true",
        help="One of Lightning's precisions. auto and the mixed ones sample in that of the weights, float32.",
    )


def stop_texts(value: Any) -> list[str] | None:
    """Return the texts of one `--stop`, which is taken as typed, or of `stop` in a configuration file.

    Raises:
        WrongValueError: for anything but a text, a list of texts or null.
    """
    texts = [value] if isinstance(value, str) else value
    if texts is None or (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
        return texts
    raise WrongValueError("stop", value, "it must be a text or a list of texts")


def predict(verb: str, arguments: list[str]) -> int:
    """Generate text; return the exit code."""
    keep_freed_memory()
    options = parse_predict(arguments)
    return run_predict(options, generation_config(options))


def parse_predict(arguments: list[str]) -> Namespace:
    """Parse the arguments of `gptlit predict`.

    Raises:
        UserError: for an unknown option or a value of the wrong type.
    """
    parser = make_parser()
    for config in values_of(arguments, "--config", "-c"):
        check_config(config, option_names(parser))
    options = parse(parser, arguments)
    if not options.ckpt_path:
        raise UserError("gptlit predict needs --ckpt_path: a run folder or a checkpoint file")
    return options


def generation_config(options: Namespace) -> GenerationConfig:
    """Return what the options ask to generate.

    Raises:
        UserError: for a value out of range.
    """
    return GenerationConfig(
        max_new_tokens=options.max_new_tokens,
        sampling=Sampling(**{name: options[name] for name in ("temperature", "top_k", "top_p", "min_p")}),
        num_samples=options.num_samples,
        seed=options.seed,
        context=options.context,
        weights_dtype=options.weights_dtype,
        stop=tuple(options.stop or ()),
        log_probabilities=is_jsonl(options.output),
    )


def run_predict(options: Namespace, config: GenerationConfig) -> int:
    """Generate as the options say; return the exit code."""
    first = first_process()  # the others receive its prompts, and write nothing
    texts = read_prompts(options.prompt, options.prompts) if first else []
    checkpoint = read_checkpoint(find_checkpoint(options.ckpt_path, "best"))
    tokenizer = from_json(checkpoint["hyper_parameters"]["tokenizer"])
    start = document_start(checkpoint)
    if options.one_document:
        if start is None:
            raise UserError(
                "is true, but the model was trained on one whole text: set data.documents or data.separator when you "
                "train, or give the text to stop before as --stop",
                "one_document",
            )
        config = replace(config, stop=(*config.stop, start))
    prompts = [
        encode_prompt(index, text, tokenizer, options.unknown, start or "\n") for index, text in enumerate(texts)
    ]
    run = make_run(checkpoint, config, vars(options.trainer))
    with open_output(options.output) if first else open(os.devnull, "w", encoding="utf-8") as file:
        for prompt, text in zip(prompts, texts, strict=True):
            if not prompt.text:
                say_start(prompt, text, tokenizer)
        writer = TextWriter(file, config, options.output, options.repeat_prompt)
        try:
            run(prompts, writer)
            writer.close()
        except BrokenPipeError:
            raise
        except OSError as error:
            if error.strerror is None:
                raise
            say(f"gptlit: {options.output or 'stdout'} cannot be written: {error.strerror}")
            drop_the_rest(file)
            return 1
    leave_process_group()
    return 0


def document_start(checkpoint: Mapping[str, Any]) -> str | None:
    """Return the text after which a document begins; None where the model was trained on one whole text."""
    corpus = checkpoint.get("gptlit", {}).get("corpus") or {}
    return corpus.get("document_start")


def make_run(checkpoint: dict[str, Any], config: GenerationConfig, settings: Mapping[str, Any]) -> Run:
    """Return the function that generates: without Lightning where one device is enough, else with the Trainer."""
    if settings["precision"] == "auto":  # sampling computes in the precision of the weights, as with bf16-mixed
        settings = {**settings, "precision": "32-true"}
    device = single_device(settings)
    if config.weights_dtype == "bfloat16" and not is_amd() and first_process():
        say("--weights_dtype bfloat16 was not faster than float32 on the Intel CPU that was measured: try int8")
    if device is None:
        from gptlit.cli.predict.distributed import with_trainer

        return with_trainer(checkpoint, config, settings)
    network, tokenizer = load_network(checkpoint)
    network.to(device)
    check_weights_dtype(network, config.weights_dtype)

    def run(prompts: Sequence[Prompt], writer: TextWriter) -> None:
        for batch in in_batches(prompts, config.num_samples):
            generate_texts(network, tokenizer, batch, config, writer)

    return run


def single_device(settings: Mapping[str, Any]) -> torch.device | None:
    """Return the one device that trainer settings ask for; None if they ask for more than that."""
    launched = any(int(os.environ.get(name, "1")) > 1 for name in ("WORLD_SIZE", "SLURM_NTASKS"))
    if launched or any(settings[name] not in allowed for name, allowed in ONE_DEVICE.items()):
        return None
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    found = {
        "auto": "cuda" if cuda else "mps" if mps else "cpu",
        "cpu": "cpu",
        "gpu": "cuda" if cuda else "mps" if mps else None,
        "cuda": "cuda" if cuda else None,
        "mps": "mps" if mps else None,
    }.get(settings["accelerator"])
    if settings["devices"] == "auto" and found != "cpu":
        return None  # all devices of the machine
    return None if found is None else torch.device(found)


def say_start(prompt: Prompt, given: str | None, tokenizer: Tokenizer) -> None:
    """Print what the model reads instead of a missing prompt, or one without a character that it knows."""
    start = tokenizer.decode(prompt.ids)
    if given is None:
        subject = "no --prompt: the text"
    else:
        why = "every character of it is skipped" if given else "it is empty"
        subject = f"prompt {prompt.index + 1}: {why}, so that it"
    say(f"{subject} begins with {'a newline' if start == chr(10) else repr(start)}")
