"""Exports for transformers: same logits, same text, same token ids."""

import json
import math
import os
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command import digest, gptlit, load, report, write_config
from conftest import DIALECTS, NANOGPT, random_gpt
from torch import Tensor

from gptlit.cli import run
from gptlit.convert.dialects import GPT2, NANOCHAT, require_dialect
from gptlit.convert.export import export_run
from gptlit.convert.gpt2_weights import move_head_bias
from gptlit.errors import UserError
from gptlit.model.config import GPTConfig
from gptlit.model.gpt import GPT
from gptlit.tokenizer import BPETokenizer, CharTokenizer, Tokenizer

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

HEADER = ("export", "tool", "largest difference", "at positions", "greedy text")
TOKENIZER = CharTokenizer(
    "\n !$&',-.3:;?" + "".join(map(chr, range(65, 91))) + "".join(map(chr, range(97, 123))), "play"
)
MODERN = GPTConfig(**DIALECTS["modern"])
EXPORTABLE = {
    "nanogpt": GPTConfig(**DIALECTS["nanogpt"]),
    "nanogpt, cpu size": GPTConfig(**NANOGPT, block_size=64),
    "gpt2": GPTConfig(**DIALECTS["gpt2"]),
    "gpt2, untied, no bias": GPTConfig(**{**DIALECTS["nanogpt"], "tie_weights": False, "activation": "gelu_tanh"}),
    "lecture, biased head": GPTConfig(**{**DIALECTS["layernorm"], "n_embd": 128}),
    "modern": MODERN,
    "modern, base size": GPTConfig(vocab_size=65),
    "modern, softcap": GPTConfig(**DIALECTS["modern, softcap"]),
    "modern, another rope base": replace(MODERN, rope_base=100.0),
    "modern, tied": replace(MODERN, tie_weights=True, activation="gelu", mlp_ratio=3),
}


def checkpoint_of(model: GPT, tokenizer: Tokenizer, **more: Any) -> dict[str, Any]:
    """Return the checkpoint that a run would save for this network."""
    return {
        "state_dict": {f"net.{name}": tensor for name, tensor in model.state_dict().items()},
        "hyper_parameters": {"gpt": asdict(model.config), "tokenizer": tokenizer.to_json(), "seed": 1337},
        "global_step": 2000,
        **more,
    }


def positions(gpt: GPTConfig, count: int = 1000) -> Tensor:
    """Return random ids (B, T), at least `count` in total."""
    rows = math.ceil(count / gpt.block_size)
    return torch.randint(gpt.vocab_size, (rows, gpt.block_size), generator=torch.Generator().manual_seed(1))


def greedy(model: GPT, ids: list[int], new: int) -> list[int]:
    """Return the greedy continuation, computed without a cache."""
    for _ in range(new):
        ids = [*ids, int(model(torch.tensor([ids]))[0, -1].argmax())]
    return ids


@pytest.fixture(scope="module", params=list(EXPORTABLE))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, GPT, Path]:
    """Each exportable architecture in float32, with no weight near zero, and its exported folder."""
    model = random_gpt(EXPORTABLE[request.param]).float()
    folder = tmp_path_factory.mktemp("export") / "model"
    export_run(checkpoint_of(model, TOKENIZER), folder)
    return request.param, model, folder


@torch.no_grad()
def test_transformers_computes_the_same_logits_and_greedy_text(exported: tuple[str, GPT, Path]) -> None:
    """Guards against a transposed, swapped or missing weight, another activation, epsilon or rotation, and a wrong
    cache, which greedy text uses.
    """
    name, ours, folder = exported
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = positions(ours.config)
    expected = ours(ids)
    difference = float((theirs(ids).logits - expected).abs().max())
    prompt = "Ay, me"
    new = min(24, ours.config.block_size) - len(prompt)
    text = TOKENIZER.decode(greedy(ours, TOKENIZER.encode(prompt), new))
    written = tokenizer.decode(
        theirs.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=new, do_sample=False)[0]
    )
    same = "equal" if written == text else "differs"
    row = (f"transformers folder, {name}", f"transformers {transformers.__version__}", f"{difference:.1e}")
    report("Exports", HEADER, *row, f"{ids.numel():,}", same)
    assert float(expected.std()) > 0.1, "logits that are all alike would prove nothing"
    assert difference < (1e-5 if ours.config.position == "learned" and not has_head_bias(ours) else 1e-4)
    assert written == text


def has_head_bias(model: GPT) -> bool:
    return model.lm_head.bias is not None


def test_the_exported_tokenizer_is_lossless(exported: tuple[str, GPT, Path]) -> None:
    """Guards against stripped spaces, "cleaned up" punctuation, lost line ends and added special tokens."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported[2], local_files_only=True)
    text = "\n\n  First Citizen:\n  Don 't , we 're .  \n"
    ids = tokenizer(text)["input_ids"]
    assert ids == TOKENIZER.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer) == TOKENIZER.vocab_size


def test_the_exported_tokenizer_refuses_an_unknown_character(tmp_path: Path) -> None:
    """Otherwise the character would be dropped silently."""
    export_run(checkpoint_of(random_gpt(MODERN), TOKENIZER), tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model", local_files_only=True)
    with pytest.raises(Exception, match="Unk token"):
        tokenizer("caf\u00e9")


def test_the_exported_tokenizer_encodes_and_decodes_the_corpus(tinyshakespeare: Path, tmp_path: Path) -> None:
    """On all of Tiny Shakespeare."""
    text = tinyshakespeare.read_text(encoding="utf-8")
    ours = CharTokenizer.train(text, "tinyshakespeare")
    export_run(checkpoint_of(random_gpt(MODERN), ours), tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model", local_files_only=True)
    ids = tokenizer(text)["input_ids"]
    assert ids == ours.encode(text)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("dialect", ["nanogpt", "modern"])
def test_a_byte_pair_tokenizer_is_exported_unchanged(dialect: str, tmp_path: Path) -> None:
    """Guards against transformers' GPT-2 tokenizer class, which splits text differently."""
    text = "To be, or not to be: that is the question.\n  Whether 'tis nobler \u2014 na\u00efve \U0001f600\n\n" * 4
    ours = BPETokenizer.train([text], 300, "speech")
    gpt = replace(EXPORTABLE[dialect], vocab_size=ours.vocab_size)
    export_run(checkpoint_of(random_gpt(gpt), ours), tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model", local_files_only=True)
    for probe in (text, "  two  spaces, a tab\t and unseen \u65e5\u672c"):
        ids = tokenizer(probe)["input_ids"]
        assert ids == ours.encode(probe)
        assert tokenizer.decode(ids) == probe


@pytest.mark.parametrize("dialect", ["nanogpt", "modern"])
def test_generation_does_not_stop_at_a_token(dialect: str, tmp_path: Path) -> None:
    """NanoChat's default end token is id 1 and GPT-2's is 50256; here every id is an ordinary token."""
    model = GPT(replace(EXPORTABLE[dialect], tie_weights=False, init="zero")).eval()
    with torch.no_grad():
        model.transformer["wte"].weight[:] = (
            model.transformer["wte"].weight[0].clone()
        )  # all tokens have the same embedding
        if "wpe" in model.transformer:
            model.transformer["wpe"].weight.zero_()
        model.lm_head.weight.zero_()
        model.lm_head.weight[1] = model.hidden(torch.tensor([[0]]))[0, 0]  # id 1 is always the most probable
    export_run(checkpoint_of(model, TOKENIZER), tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", local_files_only=True)
    written = theirs.generate(torch.tensor([[5, 1]]), max_new_tokens=10, do_sample=False)
    assert written[0].tolist() == [5] + [1] * 11
    for file in ("config.json", "generation_config.json"):
        said = json.loads((tmp_path / "model" / file).read_text())
        assert [said.get(f"{name}_token_id") for name in ("bos", "eos", "pad")] == [None, None, None]


def test_generation_samples_from_all_tokens(tmp_path: Path) -> None:
    """By default transformers samples from the 50 most probable tokens only."""
    model = random_gpt(MODERN)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.01)  # all tokens about equally probable
    export_run(checkpoint_of(model, TOKENIZER), tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", local_files_only=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sampled = theirs.generate(torch.zeros(2000, 1, dtype=torch.int64), max_new_tokens=1)[:, 1]
    assert sampled.unique().tolist() == list(range(TOKENIZER.vocab_size))


@pytest.mark.parametrize("dialect", ["nanogpt", "modern"])
def test_the_pipeline_fills_the_context_at_temperature_one(
    dialect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pipeline's defaults are 256 tokens, which may exceed GPT-2's positions, and a temperature of 0.7."""
    export_run(checkpoint_of(random_gpt(EXPORTABLE[dialect]), TOKENIZER), tmp_path / "model")
    used, sample = [], transformers.GenerationMixin._sample

    def watched(model: Any, *arguments: Any, generation_config: Any, **options: Any) -> Any:
        used.append(generation_config)
        return sample(model, *arguments, generation_config=generation_config, **options)

    monkeypatch.setattr(transformers.GenerationMixin, "_sample", watched)
    pipeline = transformers.pipeline("text-generation", model=str(tmp_path / "model"), device="cpu")
    text = pipeline("Ay, me")[0]["generated_text"]
    assert text.startswith("Ay, me")
    assert len(text) == EXPORTABLE[dialect].block_size
    assert [(c.do_sample, c.temperature, c.top_k) for c in used] == [(True, 1.0, 0)]


def test_the_tokenizer_names_no_token_types(exported: tuple[str, GPT, Path]) -> None:
    """GPT-2 would add embeddings of token types. Transformers 4 and 5 both have the class."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported[2], local_files_only=True)
    assert set(tokenizer("Ay, me")) == {"input_ids", "attention_mask"}
    settings = json.loads((exported[2] / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.skipif(not os.environ.get("GPTLIT_TRANSFORMERS_4"), reason="GPTLIT_TRANSFORMERS_4 names no folder")
def test_transformers_4_computes_the_same_and_samples_the_same(tmp_path: Path) -> None:
    """In its own process, with the folder of the variable (pip install --target) first on sys.path."""
    ours = random_gpt(replace(EXPORTABLE["gpt2"], block_size=64)).float()
    export_run(checkpoint_of(ours, TOKENIZER), tmp_path / "model")
    torch.save(positions(ours.config), tmp_path / "ids.pt")
    program = """
import sys, torch, transformers
model, ids = sys.argv[1], torch.load(sys.argv[2])
pipe = transformers.pipeline("text-generation", model=model, device="cpu")
torch.save((pipe.model(ids).logits.detach(), pipe("Ay, me", do_sample=False)[0]["generated_text"]), sys.argv[3])
print(transformers.__version__, pipe.generation_config.temperature, len(pipe("Ay, me")[0]["generated_text"]))
"""
    paths = [str(tmp_path / name) for name in ("model", "ids.pt", "answer.pt")]
    environment = {**os.environ, "PYTHONPATH": os.environ["GPTLIT_TRANSFORMERS_4"]}
    answer = subprocess.run(
        [sys.executable, "-c", program, *paths], env=environment, capture_output=True, text=True, check=True
    )
    version, temperature, length = answer.stdout.split()[-3:]
    assert version.startswith("4.")
    assert (float(temperature), int(length)) == (1.0, 64)
    logits, text = torch.load(tmp_path / "answer.pt", weights_only=True)
    with torch.no_grad():
        difference = float((logits - ours(positions(ours.config))).abs().max())
    assert difference < 1e-5
    same = text == TOKENIZER.decode(greedy(ours, TOKENIZER.encode("Ay, me"), 58))
    row = ("transformers folder, gpt2", f"transformers {version}", f"{difference:.1e}", "1,024")
    report("Exports", HEADER, *row, "equal" if same else "differs")
    assert same


@pytest.mark.parametrize(
    ("gpt", "named"),
    [
        (GPTConfig(**DIALECTS["bigram"]), "model.gpt.n_layer 0"),
        (GPTConfig(**DIALECTS["one head"]), "model.gpt.residual false"),
        (GPTConfig(**DIALECTS["feed-forward"]), "model.gpt.norm none"),
        (replace(EXPORTABLE["nanogpt"], logit_softcap=1.0), "model.gpt.logit_softcap 1.0"),
        (replace(EXPORTABLE["nanogpt"], mlp_ratio=0), "model.gpt.mlp_ratio 0"),
        (replace(EXPORTABLE["nanogpt"], qk_norm=True), "model.gpt.qk_norm true"),
        (replace(EXPORTABLE["nanogpt"], position="none"), "model.gpt.position none"),
        (replace(MODERN, bias=True), "model.gpt.bias true"),
        (replace(MODERN, norm="layernorm"), "model.gpt.norm layernorm"),
        (replace(MODERN, token_shift=2), "model.gpt.token_shift 2"),
        (replace(EXPORTABLE["nanogpt"], token_shift=1), "model.gpt.token_shift 1"),
        (GPTConfig(**DIALECTS["layernorm"]), "model.gpt.bias true with model.gpt.tie_weights false"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_transformers_cannot_express_is_refused_by_name(gpt: GPTConfig, named: str, tmp_path: Path) -> None:
    """Guards against a folder that loads without error and computes other logits."""
    with pytest.raises(UserError) as refusal:
        export_run(checkpoint_of(random_gpt(gpt), TOKENIZER), tmp_path / "model")
    assert named in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


@dataclass(frozen=True)
class LaterConfig(GPTConfig):
    """A switch that export does not know."""

    memory: int = 0


@pytest.mark.parametrize("gpt", [EXPORTABLE["nanogpt"], MODERN], ids=["gpt2", "nanochat"])
def test_a_new_switch_is_refused_until_export_supports_it(gpt: GPTConfig) -> None:
    """Guards against a new field of GPTConfig that the export silently ignores."""
    later = LaterConfig(**asdict(gpt))
    assert require_dialect(later, GPT2, NANOCHAT) is require_dialect(gpt, GPT2, NANOCHAT)
    with pytest.raises(UserError, match=r"model\.gpt\.memory 1 \(only 0\)"):
        require_dialect(replace(later, memory=1), GPT2, NANOCHAT)


def test_the_bias_of_the_head_moves_into_the_norm_exactly() -> None:
    """W β' = W β + b if W has independent rows; a head with more tokens than channels is refused."""
    generator = torch.Generator().manual_seed(0)
    W, b, beta = (torch.randn(*shape, generator=generator) for shape in ((65, 384), (65,), (384,)))
    moved = move_head_bias(W, b, beta)
    torch.testing.assert_close(W.double() @ moved.double(), W.double() @ beta.double() + b, rtol=0, atol=1e-4)
    with pytest.raises(UserError, match="65 tokens, 32 channels"):
        move_head_bias(W[:, :32], b, beta[:32])
    W[1] = W[0]  # two equal rows cannot have different biases
    with pytest.raises(UserError, match="residual"):
        move_head_bias(W, b, beta)


def test_an_export_overwrites_nothing(tmp_path: Path) -> None:
    """A folder that is not empty is refused and unchanged; an empty one is used."""
    checkpoint = checkpoint_of(random_gpt(MODERN), TOKENIZER)
    export_run(checkpoint, tmp_path / "model")
    before = {path: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    with pytest.raises(UserError, match="not empty"):
        export_run(checkpoint, tmp_path / "model")
    assert {path: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    (tmp_path / "empty").mkdir()
    export_run(checkpoint, tmp_path / "empty")
    assert {path.name for path in (tmp_path / "empty").iterdir()} == {path.name for path in before}


def test_a_failed_export_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against an incomplete folder that looks complete."""

    def full(*arguments: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gptlit.convert.export.model_card", full)
    with pytest.raises(UserError, match="No space left on device"):
        export_run(checkpoint_of(random_gpt(MODERN), TOKENIZER), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_an_export_with_other_logits_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the comparison at the end of every export."""
    monkeypatch.setattr("gptlit.convert.huggingface.RMS_NORM_EPS", 1e-1)
    with pytest.raises(RuntimeError, match="something else"):
        export_run(checkpoint_of(random_gpt(MODERN), TOKENIZER), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    """A diverged run cannot be exported."""
    model = random_gpt(MODERN)
    with torch.no_grad():
        model.lm_head.weight[3, 4] = math.nan
    with pytest.raises(UserError, match=r"not finite \(lm_head.weight\)"):
        export_run(checkpoint_of(model, TOKENIZER), tmp_path / "model")


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line with the command that installs it, without an ImportError."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install '\.\[hf\]'"):
        export_run(checkpoint_of(random_gpt(MODERN), TOKENIZER), tmp_path / "model")


RUN_CONFIG = {"data": {"corpus": "plays/*.txt", "batch_size": 12, "val_fraction": 0.1}, "seed_everything": 7}


def test_the_lines_of_the_card_for_a_context_of_one_token_generate_nothing(tmp_path: Path) -> None:
    """`generate` has no room for a token after the prompt, and raises."""
    gpt = replace(EXPORTABLE["nanogpt"], block_size=1)
    export_run(checkpoint_of(random_gpt(gpt).float(), TOKENIZER), tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    lines = card.partition("```python\n")[2].partition("```")[0]
    exec(lines.replace('"."', repr(str(tmp_path / "model"))), {})
    assert "generate(" not in lines


@pytest.mark.parametrize(("best_step", "said"), [(2000, "1.5000 nats"), (1500, "not measured for these weights")])
def test_the_model_card_describes_the_run(best_step: int, said: str, tmp_path: Path) -> None:
    """With split, protocol, loss, seed and command of this run, and not with the loss of other weights."""
    checkpoint = checkpoint_of(
        random_gpt(MODERN),
        TOKENIZER,
        gptlit={"version": "0.1.0", "config": yaml.safe_dump(RUN_CONFIG)},
        callbacks={"Other": {}, "RunCheckpoints": {"best_score": 1.5, "best_step": best_step}},
    )
    export_run(checkpoint, tmp_path / "model", command="gptlit export --ckpt_path a|b")
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers"
    table = card_rows(tmp_path / "model")
    assert table["Text"] == "play"
    assert "last 0.1 " in table["Split"]
    assert "windows of 16 tokens" in table["Protocol"]
    assert table["Loss"].startswith(said)
    assert f"{1.5 / math.log(2):.4f} bits per character" in table["Loss"]
    assert table["Steps"] == f"2,000 of {12 * 16} tokens"
    assert table["Seed"] == "1337"
    assert table["Exported by"] == r"`gptlit export --ckpt_path a\|b`"
    assert "gptlit fit --config gptlit.yaml" in table["Trained by"]
    assert yaml.safe_load((tmp_path / "model" / "gptlit.yaml").read_text()) == RUN_CONFIG


@pytest.mark.parametrize(
    ("batches", "limit", "said"),
    [
        ([1, 23], None, "1 of 23 batches of the validation part in windows"),
        ([23, 23], 1000, "the whole validation part in windows"),
        (None, 1, "at most 1 batch of the validation part in windows"),  # versions that did not count
        (None, 1.0, "the whole validation part in windows"),
    ],
)
def test_the_model_card_says_that_a_loss_is_that_of_a_part(
    batches: list[int] | None, limit: float | None, said: str, tmp_path: Path
) -> None:
    state = {"best_score": 1.5, "best_step": 2000} | ({"best_batches": batches} if batches else {})
    config = yaml.safe_dump({**RUN_CONFIG, "trainer": {"limit_val_batches": limit}})
    checkpoint = checkpoint_of(
        random_gpt(MODERN),
        TOKENIZER,
        gptlit={"version": "0.1.0", "config": config},
        callbacks={"EarlyStopping{}": {"best_score": torch.tensor(9.0), "patience": 3}, "RunCheckpoints": state},
    )
    export_run(checkpoint, tmp_path / "model")
    rows = card_rows(tmp_path / "model")
    assert rows["Protocol"].startswith(said)
    assert rows["Loss"].startswith("1.5000 nats"), "not the score of another callback"


def card_rows(folder: Path) -> dict[str, str]:
    """Return the table of a model card, by title."""
    lines = (folder / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [line.strip("| ").split(" | ", 1) for line in lines if line.startswith("| ")]
    return {row[0]: row[1] for row in rows if len(row) == 2}


def test_the_model_card_names_the_initial_weights_and_a_command_that_gives_the_model(tmp_path: Path) -> None:
    """Also after a resume; without the initial weights, the same settings give another model."""
    config = write_config(tmp_path, trainer__max_steps=4, model__schedule={"shape": "constant"})
    source, run = tmp_path / "it's a run", tmp_path / "run"
    flags = ("--config", config, "--run_dir")
    assert gptlit("fit", *flags, source, "--trainer.max_steps", 2).code == 0
    answer = gptlit("fit", *flags, run, "--model.init_from", source, "--trainer.max_steps", 2)
    assert answer.code == 0, answer.err
    assert gptlit("fit", "--ckpt_path", run, "--trainer.max_steps", 4).code == 0
    assert load(run / "last.ckpt")["gptlit"]["init_from"] == str(source)
    export_run(load(run / "last.ckpt"), tmp_path / "model")
    rows = card_rows(tmp_path / "model")
    assert rows["Initial weights"] == f"those of {source}"
    program, verb, *arguments = shlex.split(rows["Trained by"].split("`")[1])
    assert (program, verb, arguments[1:3]) == ("gptlit", "fit", ["gptlit.yaml", "--model.init_from"])
    os.chdir(tmp_path / "model")
    answer = gptlit(verb, *arguments, "--run_dir", tmp_path / "again")
    assert answer.code == 0, answer.err
    assert digest(tmp_path / "again" / "last.ckpt") == digest(run / "last.ckpt")
    assert gptlit(verb, *arguments[:2], "--run_dir", tmp_path / "other").code == 0
    assert digest(tmp_path / "other" / "last.ckpt") != digest(run / "last.ckpt")


@pytest.mark.parametrize("tied", [True, False])
def test_the_model_card_warns_of_an_adapter_that_a_tied_head_would_share(tmp_path: Path, tied: bool) -> None:
    """Merging gives another model without a word (findings/peft-merges-into-the-tied-head.sh)."""
    config = replace(GPTConfig(**DIALECTS["nanogpt"]), vocab_size=TOKENIZER.vocab_size, tie_weights=tied)
    export_run(checkpoint_of(GPT(config), TOKENIZER), tmp_path / "model")
    assert ("Leave `wte` out of the adapters" in (tmp_path / "model" / "README.md").read_text("utf-8")) == tied


def test_the_model_card_of_a_run_without_initial_weights_names_none(tmp_path: Path) -> None:
    assert gptlit("fit", "--config", write_config(tmp_path, trainer__max_steps=1), "--run_dir", "run").code == 0
    export_run(load(Path("run/last.ckpt")), tmp_path / "model")
    rows = card_rows(tmp_path / "model")
    assert rows["Trained by"] == "`gptlit fit --config gptlit.yaml` (the file is in this folder)"
    assert rows.keys().isdisjoint({"Initial weights", "Teachers"})


def test_the_model_card_does_not_say_what_an_older_version_did_not_record(tmp_path: Path) -> None:
    """Nor after a resume with this version."""
    assert gptlit("fit", "--config", write_config(tmp_path, trainer__max_steps=1), "--run_dir", "run").code == 0
    checkpoint = load(Path("run/last.ckpt"))
    del checkpoint["gptlit"]["init_from"]
    torch.save(checkpoint, "run/last.ckpt")
    assert gptlit("fit", "--ckpt_path", "run", "--trainer.max_steps", 2).code == 0
    export_run(load(Path("run/last.ckpt")), tmp_path / "model")
    assert "does not say whether training began with" in card_rows(tmp_path / "model")["Trained by"]


def test_the_model_card_of_a_student_names_its_teachers(tmp_path: Path) -> None:
    config = write_config(tmp_path, trainer__max_steps=1)
    flags = ("--config", config, "--run_dir")
    for name in ("one", "two"):
        assert gptlit("fit", *flags, name).code == 0
    answer = gptlit("fit", *flags, "student", "--model.teachers", "[one, two]", "--model.teacher_weight", 0.25)
    assert answer.code == 0, answer.err
    export_run(load(Path("student/last.ckpt")), tmp_path / "model")
    assert card_rows(tmp_path / "model")["Teachers"] == "one, two; weight 0.25: 25% of the training loss is theirs"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"val_fraction": 0.25}, "the last 0.25 of the text, in order, is the validation part"),
        (
            {"val_fraction": 0.25, "split": "documents", "split_seed": 5},
            "0.25 of the documents, chosen at random (seed 5)",
        ),
        ({"split": "documents"}, "0.1 of the documents, chosen at random (seed 7)"),  # versions without split_seed
        ({"val_corpus": "b.txt"}, "trained on all of the text, validated on another one"),
    ],
)
def test_the_model_card_says_what_was_held_out(data: dict[str, Any], said: str, tmp_path: Path) -> None:
    """A loss on names at random is not that of the last names of a sorted list."""
    config = yaml.safe_dump({"data": {"corpus": "a.txt", "batch_size": 12, **data}, "seed_everything": 7})
    checkpoint = checkpoint_of(random_gpt(MODERN), TOKENIZER, gptlit={"version": "0.1.0", "config": config})
    export_run(checkpoint, tmp_path / "model")
    assert f"| Split | {said}" in (tmp_path / "model" / "README.md").read_text(encoding="utf-8")


def test_the_command_exports_a_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From flags to folder; messages go to stderr."""
    (tmp_path / "run").mkdir()
    torch.save(checkpoint_of(random_gpt(MODERN), TOKENIZER), tmp_path / "run" / "best.ckpt")
    assert run("export", ["--ckpt_path", str(tmp_path / "run"), "--output", str(tmp_path / "model")]) == 0
    words = capsys.readouterr()
    assert words.out == ""
    assert "NanoChatForCausalLM" in words.err
    assert (tmp_path / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--ckpt_path"),
        (["--ckpt_path", "nowhere", "--output", "model"], "nowhere"),
        (["--ckpt_path", "nowhere"], "--output"),
        (["--ckpt_pth", "nowhere"], "ckpt_pth"),
    ],
)
def test_a_user_error_in_export_is_one_line(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2; the flag is named; no traceback."""
    assert run("export", arguments) == 2
    words = capsys.readouterr().err
    assert named in words
    assert words.count("\n") == 1
