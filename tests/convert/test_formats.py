"""ONNX, GGUF and nanoGPT: exports compute the same; what a format cannot express is refused by name."""

import errno
import json
import os
import pickle
import resource
import shlex
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command import report
from conftest import DIALECTS, random_gpt
from test_export import EXPORTABLE, HEADER, MODERN, TOKENIZER, checkpoint_of, greedy, positions
from torch import Tensor
from torch.nn import functional as F

from gptlit.cli import run
from gptlit.cli.export import loading
from gptlit.convert.export import Format, export_run
from gptlit.convert.gguf_file import escaped, utf8_prefixes
from gptlit.convert.libraries import os_errors_of_rust
from gptlit.convert.pretrained import load_pretrained
from gptlit.convert.transformers_folder import save_backend
from gptlit.errors import UserError
from gptlit.model.config import GPTConfig
from gptlit.model.gpt import GPT
from gptlit.tokenizer import BPETokenizer, CharTokenizer

NANOGPT = replace(EXPORTABLE["nanogpt"], block_size=64)
GPT2 = replace(EXPORTABLE["gpt2"], block_size=256)


def version_of(package: str) -> str:
    """Return `package version` of an installed package."""
    from importlib.metadata import version

    return f"{package} {version(package)}"


# ---------------------------------------------------------------- ONNX


@pytest.mark.parametrize("dialect", ["bigram", "nanogpt", "modern, token shift"])
def test_an_onnx_graph_computes_the_same_at_every_length(dialect: str, tmp_path: Path) -> None:
    """For any batch size and length up to the context; one more token is an error."""
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    gpt = replace(GPTConfig(**DIALECTS[dialect]), n_layer=min(1, DIALECTS[dialect].get("n_layer", 1)))
    ours = random_gpt(gpt).float()
    exported = export_run(checkpoint_of(ours, TOKENIZER), tmp_path / "model", "onnx")
    assert exported.check.positions >= 1000
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(tmp_path / "model" / "model.onnx", options)

    def logits(ids: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"input_ids": ids.numpy()})[0])

    largest = 0.0
    for shape in [(1, length) for length in range(1, gpt.block_size + 1)] + [(3, 5), (130, gpt.block_size)]:
        ids = torch.randint(gpt.vocab_size, shape, generator=torch.Generator().manual_seed(shape[1]))
        with torch.no_grad():
            largest = max(largest, float((logits(ids) - ours(ids)).abs().max()))
    assert largest < 1e-4
    with pytest.raises(Exception, match="index"):
        logits(torch.zeros(1, gpt.block_size + 1, dtype=torch.int64))
    report("Exports", HEADER, f"onnx, {dialect}", version_of("onnxruntime"), f"{largest:.1e}", "1,000", "")


@pytest.mark.parametrize("block_size", [1, 2])
def test_the_lines_of_the_card_run_with_the_shortest_contexts(block_size: int, tmp_path: Path) -> None:
    """A graph for two tokens takes one, as the card does."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    gpt = replace(GPTConfig(**DIALECTS["nanogpt"]), n_layer=1, block_size=block_size)
    export_run(checkpoint_of(random_gpt(gpt).float(), TOKENIZER), tmp_path / "model", "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model" / "model.onnx")
    assert session.get_inputs()[0].shape[1] == (1 if block_size == 1 else "length")
    run_lines_of_card(tmp_path / "model")


def run_lines_of_card(folder: Path) -> None:
    """Run the Python of a model card, as a user pastes it."""
    lines = (folder / "README.md").read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    command = [sys.executable, "-c", lines]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr


def test_int8_as_the_card_of_a_graph_says_leaves_it_causal(tmp_path: Path) -> None:
    """With `quantize_dynamic`, later tokens and other texts change the logits (findings/)."""
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    quantization = pytest.importorskip("onnxruntime.quantization.matmul_nbits_quantizer")
    ours = random_gpt(replace(GPTConfig(**DIALECTS["modern, token shift"]), n_layer=1)).float()
    export_run(checkpoint_of(ours, TOKENIZER), tmp_path / "model", "onnx")
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "matmul_nbits_quantizer.MatMulNBitsQuantizer(model, bits=8, block_size=32)" in card
    quantizer = quantization.MatMulNBitsQuantizer(onnx.load(tmp_path / "model" / "model.onnx"), bits=8, block_size=32)
    quantizer.process()
    quantizer.model.save_model_to_file(str(tmp_path / "int8.onnx"))
    session = onnxruntime.InferenceSession(tmp_path / "int8.onnx")
    ids = torch.randint(ours.config.vocab_size, (8, ours.config.block_size), generator=torch.Generator().manual_seed(1))

    def logits(ids: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"input_ids": ids.numpy()})[0])

    whole, half = logits(ids), ids.size(1) // 2
    with torch.no_grad():
        error = (whole - ours(ids)).square().mean().sqrt()
    assert 1e-6 < error < 0.2, "it is int8, and close"
    assert (logits(ids[:, :half]) - whole[:, :half]).abs().max() < 1e-3 * error
    assert (logits(ids[:1]) - whole[:1]).abs().max() < 1e-3 * error


def test_the_tokenizer_next_to_an_onnx_graph_encodes_the_same(tmp_path: Path) -> None:
    """tokenizer.json needs only the tokenizers library."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from tokenizers import Tokenizer

    gpt = GPTConfig(**DIALECTS["bigram"])
    export_run(checkpoint_of(random_gpt(gpt), TOKENIZER), tmp_path / "model", "onnx")
    tokenizer = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    assert tokenizer.encode("Ay, me!\n  ").ids == TOKENIZER.encode("Ay, me!\n  ")
    assert tokenizer.decode(TOKENIZER.encode("Ay,  me")) == "Ay,  me"


# ---------------------------------------------------------------- GGUF


@pytest.mark.parametrize("name", ["nanogpt", "gpt2", "gpt2, untied, no bias", "lecture, biased head"])
def test_a_gguf_file_holds_every_weight(name: str, tmp_path: Path) -> None:
    """Exactly, in float32, under llama.cpp's names; an untied head is a tensor of its own."""
    gguf = pytest.importorskip("gguf")
    gpt = replace(EXPORTABLE[name], activation="gelu")
    ours = random_gpt(gpt).float()
    exported = export_run(checkpoint_of(ours, TOKENIZER), tmp_path / "model", "gguf")
    assert exported.check.largest_difference < 1e-4
    reader = gguf.GGUFReader(tmp_path / "model" / "model.gguf")
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    assert ("output.weight" in tensors) == (not gpt.tie_weights)
    assert torch.equal(tensors["token_embd.weight"], ours.transformer["wte"].weight)
    assert torch.equal(tensors["blk.1.attn_qkv.weight"], ours.blocks[1].attn.c_attn.weight)
    assert len(tensors) == 4 + 12 * gpt.n_layer + (not gpt.tie_weights)
    values = {key: field.contents() for key, field in reader.fields.items()}
    assert values["gpt2.context_length"] == gpt.block_size
    assert values["tokenizer.ggml.model"] == "rwkv"
    assert values["tokenizer.ggml.tokens"] == list(TOKENIZER.symbols)
    assert f"at most {gpt.block_size} tokens" in values["general.description"]


def test_tokens_of_a_gguf_file_are_escaped_and_prefixes_are_suppressed(tmp_path: Path) -> None:
    """A backslash is doubled; the beginnings of characters outside ASCII are tokens, never sampled."""
    gguf = pytest.importorskip("gguf")
    tokenizer = CharTokenizer("\\aé€", "signs")
    assert escaped(b"\\") == "\\\\"
    assert utf8_prefixes(tokenizer.symbols) == [b"\xc3", b"\xe2", b"\xe2\x82"]
    gpt = replace(GPT2, vocab_size=4)
    export_run(checkpoint_of(random_gpt(gpt), tokenizer), tmp_path / "model", "gguf")
    reader = gguf.GGUFReader(tmp_path / "model" / "model.gguf")
    values = {key: field.contents() for key, field in reader.fields.items()}
    assert values["tokenizer.ggml.tokens"] == ["\\\\", "a", "é", "€", "\\xc3", "\\xe2", "\\xe2\\x82"]
    assert values["tokenizer.ggml.suppress_tokens"] == [4, 5, 6]
    embedding = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight").data
    assert embedding.shape[0] == 7


MANY = CharTokenizer("".join(map(chr, range(0x410, 0x410 + 65))))  # Cyrillic: more characters than channels


@pytest.mark.parametrize(
    ("name", "tokenizer", "low"),
    [
        ("gpt2", MANY, True),  # a norm with bias
        ("nanogpt", CharTokenizer("\\aé€"), True),  # fewer tokens than channels
        ("gpt2, untied, no bias", CharTokenizer("\\aé€"), True),
        ("nanogpt", MANY, False),
        ("nanogpt", CharTokenizer("abc"), True),
    ],
)
def test_beginnings_of_characters_have_no_share_of_the_probabilities(
    name: str, tokenizer: CharTokenizer, low: bool, tmp_path: Path
) -> None:
    """Their logit is -1,000 in every context where the model has a direction for it; else the card says so."""
    gguf = pytest.importorskip("gguf")
    gpt = replace(EXPORTABLE[name], vocab_size=tokenizer.vocab_size)
    assert low or gpt.n_embd < tokenizer.vocab_size
    exported = export_run(checkpoint_of(random_gpt(gpt).float(), tokenizer), tmp_path / "model", "gguf")
    assert exported.check.largest_difference < 1e-4
    reader = gguf.GGUFReader(tmp_path / "model" / "model.gguf")
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    head = tensors["token_embd.weight" if gpt.tie_weights else "output.weight"]
    prefixes = len(utf8_prefixes(tokenizer.symbols))
    assert head.size(0) == gpt.vocab_size + prefixes
    states = torch.randn(100, gpt.n_embd, generator=torch.Generator().manual_seed(0))
    normed = F.layer_norm(states, (gpt.n_embd,), tensors["output_norm.weight"], tensors["output_norm.bias"])
    logits = (normed @ head.T)[:, gpt.vocab_size :]
    if low:
        assert bool(((logits + 1000).abs() < 1).all())
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert (f"The last {prefixes} tokens are beginnings of characters in UTF-8" in card) == (not low)


@pytest.mark.parametrize("name", ["gpt2", "nanogpt"])
def test_llama_cpp_reports_the_probabilities_of_a_vocabulary_outside_ascii(name: str, tmp_path: Path) -> None:
    """All of them are those of the vocabulary."""
    pytest.importorskip("gguf")
    tokenizer = CharTokenizer("\\aé€ü")
    gpt = replace(EXPORTABLE[name], vocab_size=5, block_size=256, activation="gelu_tanh")
    ours = random_gpt(gpt, std=0.1).float()
    export_run(checkpoint_of(ours, tokenizer), tmp_path / "model", "gguf")
    windows = positions(gpt, 256)[:1, :9]
    found = ask_llama_cpp(tmp_path / "model", gpt, "aü€", windows, [], 1)
    assert found["ids"] == tokenizer.encode("aü€")
    with torch.no_grad():
        expected = ours(windows).log_softmax(-1).flatten(0, 1)
    assert float((torch.tensor(found["log_probabilities"]) - expected).abs().max()) < 2e-2


def ask_llama_cpp(folder: Path, gpt: GPTConfig, text: str, windows: Tensor, prompts: list[list[int]], new: int) -> Any:
    """Return the answer of llama.cpp, run in its own process."""
    pytest.importorskip("xllamacpp")
    request = {
        "context": gpt.block_size,
        "vocab_size": gpt.vocab_size,
        "text": text,
        "windows": windows.tolist(),
        "prompts": prompts,
        "new": new,
    }
    command = [sys.executable, str(Path(__file__).parent / "run_llama_cpp.py"), str(folder / "model.gguf")]
    answer = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=True, timeout=250)
    return json.loads(answer.stdout)


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu"])
def test_llama_cpp_computes_the_same(activation: str, tinyshakespeare: Path, tmp_path: Path) -> None:
    """The ids of the corpus, log-probabilities at 1,020 positions, and greedy text.

    llama.cpp has the tanh approximation of GELU, from a float16 table: with it the text is equal; exact GELU differs by
    a few thousandths.
    """
    pytest.importorskip("gguf")
    text = tinyshakespeare.read_text(encoding="utf-8")
    tokenizer = CharTokenizer.train(text, "tinyshakespeare")
    gpt = replace(GPT2, activation=activation, n_layer=2)
    ours = random_gpt(gpt, std=0.1).float()
    export_run(checkpoint_of(ours, tokenizer), tmp_path / "model", "gguf")
    windows = positions(gpt, 1024)[:, :-1]  # the server reserves one position for the next token
    prompts = [tokenizer.encode(prompt) for prompt in ("ROMEO:", "To be", "\n")]
    found = ask_llama_cpp(tmp_path / "model", gpt, text, windows, prompts, 100)
    assert found["ids"] == tokenizer.encode(text)
    with torch.no_grad():
        expected = ours(windows).log_softmax(-1).flatten(0, 1)  # (B·T, V)
    difference = float((torch.tensor(found["log_probabilities"]) - expected).abs().max())
    assert 0 < difference < 2e-2
    texts = [tokenizer.decode(greedy(ours, prompt, 100)[len(prompt) :]) for prompt in prompts]
    equal = texts == found["texts"]
    if activation == "gelu_tanh":
        assert equal
    same = "equal" if equal else "differs after a near tie"
    row = (f"gguf, {activation}", version_of("xllamacpp"), f"{difference:.1e}", f"{windows.numel():,}", same)
    report("Exports", HEADER, *row)


# ---------------------------------------------------------------- nanoGPT


def test_a_nanogpt_checkpoint_has_the_keys_that_its_model_expects(tmp_path: Path) -> None:
    """GPTConfig's arguments, the state dict of its GPT, and a meta.pkl that encodes and decodes."""
    ours = random_gpt(NANOGPT).float()
    export_run(checkpoint_of(ours, TOKENIZER), tmp_path / "model", "nanogpt")
    content = torch.load(tmp_path / "model" / "ckpt.pt", weights_only=True)
    names = {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"}
    assert set(content["model_args"]) == names
    assert content["model_args"]["bias"] is False
    layer = [f"transformer.h.0.{part}.weight" for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc")]
    assert set(layer) <= content["model"].keys()
    assert not any(name.endswith("bias") for name in content["model"])
    meta = pickle.loads((tmp_path / "model" / "data" / content["config"]["dataset"] / "meta.pkl").read_bytes())
    assert [meta["stoi"][character] for character in "Ay"] == TOKENIZER.encode("Ay")
    assert "".join(meta["itos"][i] for i in TOKENIZER.encode("Ay, me")) == "Ay, me"


@pytest.mark.parametrize("biases", [(False, False), (True, True), (True, False), (False, True)])
def test_import_of_nanogpt_undoes_its_export(biases: tuple[bool, bool], tmp_path: Path) -> None:
    """Same logits for every setting of the biases; same configuration where nanoGPT has that setting."""
    gpt = replace(NANOGPT, bias=biases[0], qkv_bias=biases[1])
    ours = random_gpt(gpt).float()
    export_run(checkpoint_of(ours, TOKENIZER), tmp_path / "model", "nanogpt")
    back = load_pretrained(str(tmp_path / "model"))
    assert (back.gpt == gpt) == (biases[0] == biases[1])
    loaded = GPT(back.gpt)
    loaded.load_state_dict(back.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(loaded(positions(gpt)), ours(positions(gpt)), rtol=0, atol=1e-5)


@pytest.mark.skipif(not os.environ.get("GPTLIT_NANOGPT"), reason="GPTLIT_NANOGPT names no checkout of nanoGPT")
def test_nanogpt_itself_samples_the_same_text(tmp_path: Path) -> None:
    """Its sample.py, at top_k 1, continues like our greedy decoding."""
    ours = random_gpt(NANOGPT).float()
    export_run(checkpoint_of(ours, TOKENIZER), tmp_path / "model", "nanogpt")
    checkout = tmp_path / "nanoGPT"
    checkout.symlink_to(Path(os.environ["GPTLIT_NANOGPT"]).resolve())
    place = tmp_path / "place"
    place.mkdir()
    for name in ("model.py", "sample.py", "configurator.py"):
        (place / name).write_bytes((checkout / name).read_bytes())
    (place / "data").symlink_to(tmp_path / "model" / "data")
    (place / "tiktoken.py").touch()  # imported for GPT-2's vocabulary, which is not used here
    flags = ["--num_samples=1", "--max_new_tokens=50", "--top_k=1", "--device=cpu", "--dtype=float32"]
    command = [sys.executable, "sample.py", f"--out_dir={tmp_path / 'model'}", "--start=Ay", *flags]
    answer = subprocess.run(command, cwd=place, capture_output=True, text=True, check=True, timeout=250)
    text = answer.stdout.split("meta.pkl...\n")[1].split("\n---------------")[0]
    same = text == TOKENIZER.decode(greedy(ours, TOKENIZER.encode("Ay"), 50))
    report("Exports", HEADER, "nanogpt", f"sample.py, {version_of('torch')}", "", "", "equal" if same else "differs")
    assert same


# ---------------------------------------------------------------- all formats


@pytest.mark.parametrize(
    ("format", "gpt", "named"),
    [
        ("gguf", MODERN, "model.gpt.position rope (only learned)"),
        ("gguf", replace(NANOGPT, activation="relu"), "model.gpt.activation relu (only gelu or gelu_tanh)"),
        ("gguf", replace(NANOGPT, n_layer=0), "model.gpt.n_layer 0"),
        ("nanogpt", MODERN, "model.gpt.norm rmsnorm"),
        ("nanogpt", replace(NANOGPT, activation="gelu_tanh"), "model.gpt.activation gelu_tanh (only gelu)"),
        ("nanogpt", replace(NANOGPT, tie_weights=False), "model.gpt.tie_weights false"),
        ("nanogpt", replace(NANOGPT, mlp_ratio=3), "model.gpt.mlp_ratio 3 (only 4)"),
    ],
)
def test_what_a_format_cannot_express_is_refused_by_name(
    format: Format, gpt: GPTConfig, named: str, tmp_path: Path
) -> None:
    """Guards against a file that loads without error and computes other logits."""
    with pytest.raises(UserError) as refusal:
        export_run(checkpoint_of(random_gpt(gpt), TOKENIZER), tmp_path / "model", format)
    assert named in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["gguf", "nanogpt"])
def test_a_byte_pair_vocabulary_is_refused_by_formats_without_one(format: Format, tmp_path: Path) -> None:
    """GGUF's exact tokenizer has characters; nanoGPT's sample.py has characters and GPT-2's vocabulary."""
    pytest.importorskip("gguf")
    tokenizer = BPETokenizer.train(["to be or not to be, that is the question " * 9], 280, "speech")
    gpt = replace(NANOGPT, vocab_size=tokenizer.vocab_size)
    with pytest.raises(UserError, match=r"data\.tokenizer bpe"):
        export_run(checkpoint_of(random_gpt(gpt), tokenizer), tmp_path / "model", format)


@pytest.mark.parametrize(
    ("format", "module", "extra"),
    [("onnx", "onnxscript", "onnx"), ("gguf", "gguf", "gguf"), ("transformers", "transformers", "hf")],
)
def test_a_missing_library_of_a_format_is_named_with_its_extra(
    format: Format, module: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line with the command that installs it, and no file is left."""
    pytest.importorskip(module)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"{module}.*checkout of gptlit, pip install '\.\[{extra}\]'"):
        export_run(checkpoint_of(random_gpt(NANOGPT), TOKENIZER), tmp_path / "model", format)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_export_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison reads the file that was written."""
    save = torch.save
    monkeypatch.setattr("torch.save", lambda content, path: save({**content, "model": doubled(content["model"])}, path))
    with pytest.raises(RuntimeError, match="something else"):
        export_run(checkpoint_of(random_gpt(NANOGPT), TOKENIZER), tmp_path / "model", "nanogpt")
    assert not (tmp_path / "model").exists()


def doubled(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: 2 * tensor for name, tensor in weights.items()}


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Limit the size of files; above it the kernel refuses a write, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize(
    ("format", "reason"),
    [
        ("transformers", "File too large"),
        ("onnx", "File too large"),
        ("gguf", " written"),  # numpy tells only how much of it
        ("nanogpt", "File too large"),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_nothing(
    format: Format, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each library reports it with an exception of its own."""
    for module in {"transformers": ("transformers",), "onnx": ("onnxscript",), "gguf": ("gguf",)}.get(format, ()):
        pytest.importorskip(module)
    torch.save(checkpoint_of(random_gpt(NANOGPT).float(), TOKENIZER), tmp_path / "run.ckpt")
    (tmp_path / "out").mkdir()
    arguments = ["--ckpt_path", str(tmp_path / "run.ckpt"), "--output", str(tmp_path / "out" / "model")]
    with largest_file(10_000):
        assert run("export", [*arguments, "--format", format]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"gptlit: --output {tmp_path / 'out' / 'model'}: cannot be written (")
    assert reason in line
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_disk_for_the_tokenizer_is_an_error_of_the_operating_system(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as full:
        save_backend(tmp_path, TOKENIZER)
    assert full.value.errno == errno.ENOSPC


@pytest.mark.parametrize("error", [Exception("Unk token"), KeyError("a (os error 28)"), RuntimeError("os error")])
def test_other_errors_of_libraries_are_not_taken_for_a_full_disk(error: Exception) -> None:
    with pytest.raises(type(error)) as same, os_errors_of_rust():
        raise error
    assert same.value is error


def test_another_error_of_torch_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a full disk is an error of the user."""

    def fail(*arguments: Any) -> None:
        raise RuntimeError("a fault in torch")

    monkeypatch.setattr("torch.save", fail)
    with pytest.raises(RuntimeError, match="a fault in torch"):
        export_run(checkpoint_of(random_gpt(NANOGPT), TOKENIZER), tmp_path / "model", "nanogpt")
    assert list(tmp_path.iterdir()) == []


def test_exported_files_have_the_usual_permissions(tmp_path: Path) -> None:
    """Some libraries create private files."""
    pytest.importorskip("transformers")
    (tmp_path / "reference").touch()
    export_run(checkpoint_of(random_gpt(MODERN), TOKENIZER), tmp_path / "model")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "model").iterdir()}
    assert modes == {stat.S_IMODE((tmp_path / "reference").stat().st_mode)}


def test_the_command_takes_the_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`gptlit export --format nanogpt`; an unknown format is refused with the choices."""
    (tmp_path / "run").mkdir()
    torch.save(checkpoint_of(random_gpt(NANOGPT), TOKENIZER), tmp_path / "run" / "best.ckpt")
    arguments = ["--ckpt_path", str(tmp_path / "run"), "--output", str(tmp_path / "model")]
    assert run("export", [*arguments, "--format", "safetensors"]) == 2
    words = capsys.readouterr().err
    assert "--format" in words
    assert "nanogpt" in words
    assert words.count("\n") == 1
    assert run("export", [*arguments, "--format", "nanogpt"]) == 0
    assert "sample.py --out_dir=" in capsys.readouterr().err
    assert (tmp_path / "model" / "ckpt.pt").is_file()


def line_that_loads(format: str, words: str) -> str:
    """Return the line that the command prints after an export."""
    title = "in a checkout of nanoGPT" if format == "nanogpt" else "load it with"
    (line,) = (line for line in words.splitlines() if line.startswith(title))
    return line.removeprefix(title).strip()


def exported_line(format: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Export a run to a relative folder with a space, an apostrophe and a quotation mark."""
    torch.save(checkpoint_of(random_gpt(NANOGPT).float(), TOKENIZER), "run.ckpt")
    assert run("export", ["--ckpt_path", "run.ckpt", "--output", ODD_NAME, "--format", format]) == 0
    return line_that_loads(format, capsys.readouterr().err)


ODD_NAME = 'a "model" of Mary\'s'


def test_the_shell_line_for_llama_cpp_can_be_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    words = shlex.split(exported_line("gguf", capsys))
    assert words[:2] == ["llama-cli", "-m"]
    assert Path(words[2]).is_file()


def test_the_shell_line_for_nanogpt_can_be_pasted_in_its_checkout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shell runs it in another folder, with a program in the place of python."""
    line = exported_line("nanogpt", capsys)
    for folder in ("checkout/data", "bin"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "bin" / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@" > arguments\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    path = {**os.environ, "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(["sh", "-c", line], cwd=tmp_path / "checkout", env=path, check=True)
    assert (tmp_path / "checkout" / "data" / "gptlit" / "meta.pkl").is_file()
    program, out_dir, *_ = (tmp_path / "checkout" / "arguments").read_text().splitlines()
    assert program == "sample.py"
    assert (Path(out_dir.removeprefix("--out_dir=")) / "ckpt.pt").samefile(tmp_path / ODD_NAME / "ckpt.pt")


@pytest.mark.parametrize("format", ["transformers", "onnx"])
def test_the_line_of_python_can_be_pasted(format: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip({"transformers": "transformers", "onnx": "onnxscript"}[format])
    exec(exported_line(format, capsys), {})


def test_gpt2s_vocabulary_is_not_copied_to_nanogpt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is in nanoGPT; the export has no meta.pkl for it."""
    tokenizer = BPETokenizer.train(["to be or not to be, that is the question " * 9], 280, "speech")
    monkeypatch.setattr("gptlit.convert.nanogpt.GPT2_VOCABULARY", tokenizer.vocab_size)
    gpt = replace(NANOGPT, vocab_size=tokenizer.vocab_size)
    export_run(checkpoint_of(random_gpt(gpt), tokenizer), tmp_path / "model", "nanogpt")
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    words = [*shlex.split(loading("nanogpt", tmp_path / "model")), *card.splitlines()]
    assert "sample.py" in words
    assert not any("data/gptlit" in word for word in words)
