"""Measure exports of trained runs in other tools: differences, greedy text, sizes, and the speed of the tokenizer.

    python tests/benchmarks/bench_exchange.py RUN … --text FILE [--transformers4 FOLDER] [--nanogpt FOLDER]

RUN is a run folder with a character vocabulary. FOLDER of `--transformers4` comes from `pip install --target`; that of
`--nanogpt` is a checkout. OpenVINO is measured where it is installed. Formats that cannot hold a run are left out.
Prints Markdown.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from gptlit.checkpoint.files import find_checkpoint, read_checkpoint
from gptlit.convert.compare import restore
from gptlit.convert.export import Format, export_run
from gptlit.errors import UserError
from gptlit.model.config import GPTConfig
from gptlit.tokenizer import CharTokenizer, from_json

PROMPTS = ("ROMEO:", "To be", "\n", "First Citizen:\n")
FORMATS: tuple[Format, ...] = ("transformers", "onnx", "gguf", "nanogpt")
TRANSFORMERS = """
import json, sys, torch, transformers
folder, request = sys.argv[1], json.load(sys.stdin)
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
logits = model(torch.tensor(request["windows"])).logits.detach()
texts = []
for prompt in request["prompts"]:
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    new = model.generate(ids, max_new_tokens=request["context"] - ids.size(1), do_sample=False)[0, ids.size(1):]
    texts.append(tokenizer.decode(new))
torch.save({"logits": logits, "texts": texts, "version": transformers.__version__}, sys.argv[2])
"""


def real_windows(ids: list[int], block_size: int) -> torch.Tensor:
    """Return windows (B, T) of the end of a text, at least 1,000 positions."""
    rows = -(-1000 // block_size)
    return torch.tensor(ids[-rows * block_size :]).view(rows, block_size)


@torch.no_grad()
def greedy(logits: Callable[[torch.Tensor], torch.Tensor], ids: list[int], length: int) -> list[int]:
    """Return the most probable continuation up to `length` ids, by full forward passes."""
    start = len(ids)
    while len(ids) < length:
        ids = [*ids, int(logits(torch.tensor([ids]))[0, -1].argmax())]
    return ids[start:]


def in_transformers(folder: Path, request: dict[str, Any], path: str | None) -> dict[str, Any]:
    """Return logits and greedy texts of transformers, of another version if `path` has one."""
    environment = {**os.environ, **({"PYTHONPATH": path} if path else {}), "HF_HUB_OFFLINE": "1"}
    with tempfile.NamedTemporaryFile() as answer:
        command = [sys.executable, "-c", TRANSFORMERS, str(folder), answer.name]
        subprocess.run(command, input=json.dumps(request), env=environment, text=True, check=True, capture_output=True)
        return torch.load(answer.name, weights_only=True)


def in_onnxruntime(graph: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the logits of a graph in ONNX Runtime, as a function of ids."""
    import onnxruntime

    session = onnxruntime.InferenceSession(graph)
    return lambda ids: torch.from_numpy(session.run(None, {"input_ids": ids.numpy()})[0])


def quantize_dynamic(graph: Path, output: Path) -> None:
    """Round weights and activations to int8."""
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(graph, output)


def quantize_weights(graph: Path, output: Path) -> None:
    """Round weights to int8, in blocks of 32."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(onnx.load(graph), bits=8, block_size=32)
    quantizer.process()
    quantizer.model.save_model_to_file(str(output))


def in_openvino(graph: Path, options: dict[str, str]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the logits of a graph in OpenVINO, as a function of ids."""
    compiled = import_module("openvino").Core().compile_model(graph, "CPU", options)
    return lambda ids: torch.from_numpy(compiled(ids.numpy())[0])


def runtimes(graph: Path) -> Iterator[tuple[str, Path, Callable[[torch.Tensor], torch.Tensor]]]:
    """Yield the runtimes that are installed for an ONNX graph: what to call them, the file, and logits of ids."""
    tool = f"onnxruntime {version('onnxruntime')}"
    yield tool, graph, in_onnxruntime(graph)
    for name, quantize in (("quantize_dynamic", quantize_dynamic), ("MatMulNBitsQuantizer", quantize_weights)):
        small = graph.with_name(f"{name}.onnx")
        quantize(graph, small)
        yield f"{tool}, int8 by `{name}`", small, in_onnxruntime(small)
    if find_spec("openvino"):
        tool = f"openvino {version('openvino')}"
        wide = {"INFERENCE_PRECISION_HINT": "f32"}
        yield tool, graph, in_openvino(graph, {})
        yield f"{tool} with `INFERENCE_PRECISION_HINT` `f32`", graph, in_openvino(graph, wide)


def in_llama_cpp(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Return what `run_llama_cpp.py` answers."""
    script = Path(__file__).parent.parent / "convert" / "run_llama_cpp.py"
    command = [sys.executable, str(script), str(folder / "model.gguf")]
    answer = subprocess.run(command, input=json.dumps(request), text=True, check=True, capture_output=True)
    return json.loads(answer.stdout)


def in_nanogpt(folder: Path, checkout: Path, prompt: str, new: int) -> str:
    """Return the greedy text of nanoGPT's own sample.py."""
    with tempfile.TemporaryDirectory() as place:
        for name in ("model.py", "sample.py", "configurator.py"):
            Path(place, name).write_bytes((checkout / name).read_bytes())
        Path(place, "data").symlink_to((folder / "data").resolve())
        Path(place, "tiktoken.py").touch()  # for GPT-2's vocabulary
        flags = ["--num_samples=1", f"--max_new_tokens={new}", "--top_k=1", "--device=cpu", "--dtype=float32"]
        command = [sys.executable, "sample.py", f"--out_dir={folder.resolve()}", f"--start={prompt}", *flags]
        out = subprocess.run(command, cwd=place, text=True, check=True, capture_output=True).stdout
    return out.split("meta.pkl...\n")[1].split("\n---------------")[0].removeprefix(prompt)


def measure(run: str, text: str, transformers4: str | None, nanogpt: Path | None) -> None:
    """Print the rows of a run."""
    checkpoint = read_checkpoint(find_checkpoint(run, "best"))
    hyper = checkpoint["hyper_parameters"]
    gpt, tokenizer = GPTConfig(**hyper["gpt"]), from_json(hyper["tokenizer"])
    assert isinstance(tokenizer, CharTokenizer)
    model = restore(gpt, checkpoint["state_dict"])
    windows = real_windows(tokenizer.encode(text[-10_000:]), gpt.block_size)
    with torch.no_grad():
        logits = model(windows)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    texts = [tokenizer.decode(greedy(model, prompt, gpt.block_size)) for prompt in prompts]
    request = {"windows": windows.tolist(), "prompts": PROMPTS, "context": gpt.block_size}

    def row(
        format: str, tool: str, difference: float | None, found: list[str], size: int, expected: list[str] = texts
    ) -> None:
        shown = "" if difference is None else f"{difference:.1e}"
        equal = sum(map(str.__eq__, found, expected[: len(found)]))
        cells = (Path(run).name, format, tool, shown, f"{equal} of {len(found)}", f"{size / 1e6:.2f}")
        print(f"| {' | '.join(cells)} |", flush=True)

    with tempfile.TemporaryDirectory() as place:
        for kind in FORMATS:
            folder = Path(place, kind)
            try:
                export_run(checkpoint, folder, kind)
            except UserError as error:
                print(f"| {Path(run).name} | {kind} | refused: {error} | | | |", flush=True)
                continue
            size = max(path.stat().st_size for path in folder.iterdir())
            if kind == "transformers":
                for path in [None, *([transformers4] if transformers4 and gpt.position == "learned" else [])]:
                    answer = in_transformers(folder, request, path)
                    difference = float((answer["logits"] - logits).abs().max())
                    row(kind, f"transformers {answer['version']}", difference, answer["texts"], size)
                time_tokenizer(folder, text)
            elif kind == "onnx":
                for tool, file, run_graph in runtimes(folder / "model.onnx"):
                    difference = float((run_graph(windows) - logits).abs().max())
                    found = [tokenizer.decode(greedy(run_graph, prompt, gpt.block_size)) for prompt in prompts]
                    row(kind, tool, difference, found, file.stat().st_size)
            elif kind == "gguf":
                new = gpt.block_size - max(map(len, prompts)) - 1
                cut = windows[:, :-1]
                more = {
                    "vocab_size": gpt.vocab_size,
                    "text": text,
                    "windows": cut.tolist(),
                    "prompts": prompts,
                    "new": new,
                }
                answer = in_llama_cpp(folder, {**request, **more})
                expected = logits[:, :-1].log_softmax(-1).flatten(0, 1)
                difference = float((torch.tensor(answer["log_probabilities"]) - expected).abs().max())
                assert answer["ids"] == tokenizer.encode(text)
                shorter = [continuation[:new] for continuation in texts]  # llama.cpp needs one place more
                row(kind, f"xllamacpp {version('xllamacpp')}", difference, answer["texts"], size, shorter)
            elif nanogpt is not None:
                new = gpt.block_size - len(prompts[0])
                row(kind, "nanoGPT's sample.py", None, [in_nanogpt(folder, nanogpt, PROMPTS[0], new)], size)


def time_tokenizer(folder: Path, text: str) -> None:
    """Print the seconds that encoding takes with the exported layout and with that of version 0.1.0."""
    import tokenizers
    import transformers

    if not set(text) <= set(transformers.AutoTokenizer.from_pretrained(folder).get_vocab()):
        return  # another text
    new = transformers.AutoTokenizer.from_pretrained(folder)
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(new.get_vocab(), unk_token=""))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    old = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    seconds, ids = [], []
    for tokenizer in (old, new):
        start = time.perf_counter()
        ids.append(tokenizer(text)["input_ids"])
        seconds.append(time.perf_counter() - start)
    assert ids[0] == ids[1]
    print(f"encoding {len(text):,} characters: {seconds[0]:.1f} s as in 0.1.0, {seconds[1]:.1f} s now")


def main() -> None:
    """Print a table of all runs."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--transformers4")
    parser.add_argument("--nanogpt", type=Path)
    options = parser.parse_args()
    text = options.text.read_text(encoding="utf-8")
    print(
        "| run | format | tool | largest difference | greedy texts equal | MB |\n| --- | --- | --- | --- | --- | --- |"
    )
    for run in options.runs:
        measure(run, text, options.transformers4, options.nanogpt)


if __name__ == "__main__":
    main()
