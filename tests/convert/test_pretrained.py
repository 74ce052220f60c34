"""Weights of other projects: they compute the same here, and nothing in their files is executed."""

import json
import pickle
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command import gptlit, load, report, write_config
from conftest import DIALECTS, random_gpt
from test_export import EXPORTABLE, TOKENIZER, checkpoint_of, positions
from torch import Tensor
from torch.nn import functional as F

from gptlit.convert.export import export_run
from gptlit.convert.pretrained import PADDED, Pretrained, fit_to, load_pretrained
from gptlit.data.corpus.text import file_text
from gptlit.errors import UserError
from gptlit.model.config import GPTConfig
from gptlit.model.gpt import GPT
from gptlit.tokenizer import BPETokenizer

transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

HEADER = ("import of", "largest difference of logits", "at positions")
GPT2_SIZE = {"vocab_size": 65, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
NANOCHAT_SIZE = {
    "vocab_size": 65,
    "max_position_embeddings": 16,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
}


def shaken(model: Any) -> Any:
    """Return the model with every weight and bias far from its initial value."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def their_gpt2(**settings: Any) -> Any:
    no_special = {"bos_token_id": None, "eos_token_id": None}
    return shaken(transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**GPT2_SIZE, **no_special, **settings})))


def their_nanochat(**settings: Any) -> Any:
    no_special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = transformers.NanoChatConfig(**{**NANOCHAT_SIZE, **no_special, **settings})
    return shaken(transformers.NanoChatForCausalLM(config))


THEIRS: dict[str, Callable[[], Any]] = {
    "gpt2": their_gpt2,
    "gpt2, relu, narrow MLP": lambda: their_gpt2(activation_function="relu", n_inner=64),
    "gpt2, untied": lambda: their_gpt2(tie_word_embeddings=False),
    "nanochat": their_nanochat,
    "nanochat, another rope base": lambda: their_nanochat(
        rope_parameters={"rope_type": "default", "rope_theta": 100.0}
    ),
    "nanochat, tied, no softcap": lambda: their_nanochat(tie_word_embeddings=True, final_logit_softcapping=None),
}


def network(pretrained: Pretrained) -> GPT:
    """Return the GPT with these weights."""
    model = GPT(pretrained.gpt)
    model.load_state_dict(pretrained.state_dict())
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("name", list(THEIRS))
def test_a_folder_of_transformers_computes_the_same_here(name: str, tmp_path: Path) -> None:
    """Guards against a transposed, swapped or missing weight, and another activation, epsilon or rotation."""
    theirs = THEIRS[name]()
    theirs.save_pretrained(tmp_path)
    ours = network(load_pretrained(str(tmp_path)))
    ids = positions(ours.config)
    expected = theirs(ids).logits
    difference = float((ours(ids) - expected).abs().max())
    report(
        "Imports", HEADER, f"transformers {transformers.__version__}, {name}", f"{difference:.1e}", f"{ids.numel():,}"
    )
    assert float(expected.std()) > 0.1, "logits that are all alike would prove nothing"
    assert difference < 1e-5


@pytest.mark.parametrize("name", [name for name in EXPORTABLE if name != "lecture, biased head"])
def test_import_undoes_export(name: str, tmp_path: Path) -> None:
    """Architecture, weights (bit-exactly) and tokenizer are restored."""
    dropouts = {"dropout": 0.1, "attention_dropout": 0.2, "embedding_dropout": 0.3}
    model = random_gpt(replace(EXPORTABLE[name], **dropouts)).float()
    export_run(checkpoint_of(model, TOKENIZER), tmp_path / "model")
    back = load_pretrained(str(tmp_path / "model"))
    assert back.gpt == model.config
    assert back.tokenizer == TOKENIZER
    weights = back.state_dict()
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[key], tensor) for key, tensor in model.state_dict().items())


@torch.no_grad()
def test_a_moved_bias_of_the_head_gives_the_same_logits(tmp_path: Path) -> None:
    """The bias cannot be moved back, but the logits are equal."""
    model = random_gpt(EXPORTABLE["lecture, biased head"]).float()
    export_run(checkpoint_of(model, TOKENIZER), tmp_path / "model")
    back = load_pretrained(str(tmp_path / "model"))
    assert back.gpt == model.config
    ids = positions(model.config)
    torch.testing.assert_close(network(back)(ids), model(ids), rtol=0, atol=1e-4)


def test_a_byte_pair_tokenizer_is_restored(tmp_path: Path) -> None:
    """The weights need their own vocabulary."""
    tokenizer = BPETokenizer.train(["to be or not to be, that is the question " * 9], 280, "speech")
    gpt = replace(EXPORTABLE["modern"], vocab_size=tokenizer.vocab_size)
    export_run(checkpoint_of(random_gpt(gpt), tokenizer), tmp_path / "model")
    assert load_pretrained(str(tmp_path / "model")).tokenizer == tokenizer


@torch.no_grad()
def test_padded_rows_of_a_bpe_vocabulary_are_cropped(tmp_path: Path) -> None:
    """Models often have more rows than their own tokenizer has tokens; these rows are unused."""
    tokenizer = BPETokenizer.train(["to be or not to be, that is the question " * 9], 280, "speech")
    size = tokenizer.vocab_size
    model = random_gpt(replace(EXPORTABLE["gpt2"], vocab_size=size)).float()
    export_run(checkpoint_of(model, tokenizer), tmp_path / "model")
    padded = their_gpt2(vocab_size=320)
    padded.save_pretrained(tmp_path / "model")
    back = load_pretrained(str(tmp_path / "model"))
    assert back.gpt.vocab_size == size
    ids = positions(back.gpt)
    torch.testing.assert_close(network(back)(ids), padded(ids).logits[..., :size], rtol=0, atol=1e-5)


def test_a_character_vocabulary_must_match_the_weights(tmp_path: Path) -> None:
    """128 rows are no padding of 65 characters: the model was trained on another text."""
    export_run(checkpoint_of(random_gpt(replace(EXPORTABLE["gpt2"], vocab_size=65)), TOKENIZER), tmp_path / "model")
    their_gpt2(vocab_size=128).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="65 tokens, but its weights have 128"):
        load_pretrained(str(tmp_path / "model"))


@torch.no_grad()
@pytest.mark.parametrize("make", [their_gpt2, their_nanochat], ids=["gpt2", "nanochat"])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_separately_trained_head_is_kept(make: Callable[..., Any], sharded: bool, tmp_path: Path) -> None:
    """Some programs write `tie_word_embeddings: true` next to a head that differs from the embedding."""
    theirs = make(tie_word_embeddings=False)
    theirs.save_pretrained(tmp_path, max_shard_size="20kB" if sharded else "1GB")
    assert (tmp_path / "model.safetensors").is_file() != sharded
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    found = load_pretrained(str(tmp_path))
    assert not found.gpt.tie_weights
    ids = positions(found.gpt)
    torch.testing.assert_close(network(found)(ids), theirs(ids).logits, rtol=0, atol=1e-5)


def test_a_stored_copy_of_the_embedding_stays_tied(tmp_path: Path) -> None:
    """A file may store the shared table twice."""
    theirs = their_gpt2()
    theirs.save_pretrained(tmp_path)
    weights = safetensors_torch.load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()
    safetensors_torch.save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    found = load_pretrained(str(tmp_path))
    model = network(found)
    assert model.lm_head.weight.data_ptr() == model.transformer["wte"].weight.data_ptr()


def test_weights_that_the_architecture_does_not_have_are_refused(tmp_path: Path) -> None:
    """Transformers only warns and drops them."""
    their_nanochat().save_pretrained(tmp_path)
    weights = safetensors_torch.load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.self_attn.ve_gate.weight"] = torch.ones(2, 2)
    safetensors_torch.save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"hold model\.layers\.0\.self_attn\.ve_gate\.weight, which NanoChat"):
        load_pretrained(str(tmp_path)).state_dict()


# ---------------------------------------------------------------- nanoGPT


def nanogpt_file(path: Path, theirs: Any, prefix: str = "", masks: bool = False, bias: bool = True) -> Path:
    """Write a `ckpt.pt` with nanoGPT's keys and (out, in) projections from the weights of transformers."""
    weights: dict[str, Tensor] = {}
    for name, tensor in theirs.state_dict().items():
        if name.endswith(".bias") and not bias:
            continue
        projection = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        weights[prefix + name] = tensor.t().contiguous() if projection else tensor
        if masks and name.endswith("attn.c_attn.weight"):
            weights[prefix + name.replace("c_attn.weight", "bias")] = torch.ones(16, 16).tril()[None, None]
    config = theirs.config
    arguments = {key: getattr(config, key) for key in ("n_layer", "n_head", "n_embd", "vocab_size")}
    arguments |= {"block_size": config.n_positions, "bias": bias, "dropout": 0.2}
    content = {"model": weights, "model_args": arguments, "optimizer": {"state": {}}, "iter_num": 7}
    torch.save({**content, "best_val_loss": torch.tensor(1.5), "config": {"dataset": "shakespeare_char"}}, path)
    return path


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("prefix", "masks"), [("", False), ("_orig_mod.", False), ("", True)])
def test_a_checkpoint_of_nanogpt_computes_the_same_here(bias: bool, prefix: str, masks: bool, tmp_path: Path) -> None:
    """With and without biases, from a compiled model, and from before torch 2, when masks were saved too."""
    theirs = their_gpt2(activation_function="gelu")
    for name, parameter in theirs.named_parameters():
        if name.endswith(".bias") and not bias:
            parameter.zero_()
    nanogpt_file(tmp_path / "ckpt.pt", theirs, prefix, masks, bias)
    found = load_pretrained(str(tmp_path))  # the folder is nanoGPT's out_dir
    assert found.tokenizer is None
    assert (found.gpt.bias, found.gpt.qkv_bias, found.gpt.block_size) == (bias, bias, 16)
    assert (found.gpt.dropout, found.gpt.attention_dropout, found.gpt.embedding_dropout) == (0.2, 0.2, 0.2)
    ours = network(found)
    ids = positions(ours.config)
    difference = float((ours(ids) - theirs(ids).logits).abs().max())
    report("Imports", HEADER, f"nanoGPT's ckpt.pt, bias {str(bias).lower()}", f"{difference:.1e}", f"{ids.numel():,}")
    assert difference < 1e-5


def changed(file: Path, **changes: Any) -> Path:
    """Change entries of a nanoGPT checkpoint in place."""
    torch.save({**torch.load(file, weights_only=True), **changes}, file)
    return file


def decaying(*counts: int) -> dict[str, Any]:
    """Return nanoGPT's optimizer state with the given numbers of decayed and other tensors."""
    rates = (0.1, 0.0)
    return {"param_groups": [{"params": [0] * n, "weight_decay": rate} for n, rate in zip(counts, rates, strict=True)]}


@torch.no_grad()
@pytest.mark.parametrize("age", ["before 2023-01-27", "before 2023-05-06", "today", "without optimizer"])
def test_the_age_of_a_nanogpt_checkpoint_gives_its_gelu(age: str, tmp_path: Path) -> None:
    """NanoGPT had the tanh approximation until May 2023, and `bias` is an option since January of that year."""
    old = age.startswith("before")
    theirs = their_gpt2(activation_function="gelu_new" if old else "gelu")
    file = nanogpt_file(tmp_path / "ckpt.pt", theirs)
    # 8 matrices of 2 blocks are decayed, with the embeddings 10; biases and norms are not.
    optimizers = {"today": decaying(10, 18), "without optimizer": None}
    changed(file, optimizer=optimizers.get(age, decaying(8, 20)))
    if age == "before 2023-01-27":
        arguments = torch.load(file, weights_only=True)["model_args"]
        del arguments["bias"]
        changed(file, model_args=arguments)
    found = load_pretrained(str(file))
    assert found.gpt.activation == ("gelu_tanh" if old else "gelu")
    assert found.gpt.bias
    assert found.gpt.qkv_bias
    ids = positions(found.gpt)
    difference = float((network(found)(ids) - theirs(ids).logits).abs().max())
    report("Imports", HEADER, f"nanoGPT's ckpt.pt, {age}", f"{difference:.1e}", f"{ids.numel():,}")
    assert difference < 1e-5


@torch.no_grad()
def test_a_nanogpt_checkpoint_of_before_2023_01_14_keeps_its_own_head(tmp_path: Path) -> None:
    """Since then the head shares the table of the embedding."""
    theirs = their_gpt2(activation_function="gelu_new", tie_word_embeddings=False)
    file = nanogpt_file(tmp_path / "ckpt.pt", theirs)
    arguments = torch.load(file, weights_only=True)["model_args"]
    del arguments["bias"]
    found = load_pretrained(str(changed(file, model_args=arguments)))
    assert not found.gpt.tie_weights
    ids = positions(found.gpt)
    difference = float((network(found)(ids) - theirs(ids).logits).abs().max())
    report("Imports", HEADER, "nanoGPT's ckpt.pt, before 2023-01-14", f"{difference:.1e}", f"{ids.numel():,}")
    assert difference < 1e-5


# ---------------------------------------------------------------- our own runs


def test_a_run_gives_its_best_weights_and_its_tokenizer(tmp_path: Path) -> None:
    """A folder stands for best.ckpt; both files can be given by path."""
    models = {name: random_gpt(EXPORTABLE["modern"], seed).float() for seed, name in enumerate(("best", "last"))}
    for name, model in models.items():
        torch.save(checkpoint_of(model, TOKENIZER, optimizer_states=[{}]), tmp_path / f"{name}.ckpt")
    for source, name in ((tmp_path, "best"), (tmp_path / "best.ckpt", "best"), (tmp_path / "last.ckpt", "last")):
        found = load_pretrained(str(source))
        assert found.gpt == models[name].config
        assert found.tokenizer == TOKENIZER
        weights = found.state_dict()
        assert all(torch.equal(weights[key], tensor) for key, tensor in models[name].state_dict().items())


def test_fine_tuning_starts_from_the_pretrained_loss(tmp_path: Path) -> None:
    """Starting from a transformers folder, the first loss is that of its model, and the loss falls."""
    theirs = their_gpt2()
    theirs.save_pretrained(tmp_path)
    ours = network(load_pretrained(str(tmp_path)))
    ids = torch.tensor([TOKENIZER.encode("To be or not to b")])
    optimizer = torch.optim.AdamW(ours.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(ours(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        expected = F.cross_entropy(theirs(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
    assert losses[0] == pytest.approx(float(expected), abs=1e-5)
    assert losses[-1] < 0.5 * losses[0]
    ours_after = ours.transformer["wte"].weight
    assert torch.equal(ours_after, ours.lm_head.weight), "a tied head stays tied"


# ---------------------------------------------------------------- other settings


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[str], Pretrained]:
    """Return a function that saves a run of an architecture and loads it as pretrained weights."""

    def save(name: str) -> Pretrained:
        torch.save(checkpoint_of(random_gpt(EXPORTABLE[name]).float(), TOKENIZER), tmp_path / "best.ckpt")
        return load_pretrained(str(tmp_path))

    return save


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "modern"])
def test_a_shorter_context_computes_the_same(name: str, saved: Callable[[str], Pretrained]) -> None:
    """Cropping the table of positions keeps its first rows."""
    whole = saved(name)
    cropped = fit_to(whole, block_size=5, dropout=0.1)
    assert (cropped.gpt.block_size, cropped.gpt.dropout) == (5, 0.1)
    ids = positions(cropped.gpt, 20)
    assert torch.equal(network(cropped)(ids), network(whole)(ids))


@torch.no_grad()
def test_a_longer_context_needs_rotary_positions(saved: Callable[[str], Pretrained]) -> None:
    """Learned positions have a fixed number; rotations do not."""
    with pytest.raises(UserError, match=r"block_size is 17.*learned positions for 16"):
        fit_to(saved("gpt2"), block_size=17)
    whole = saved("modern")
    longer = network(fit_to(whole, block_size=32))
    ids = torch.randint(65, (1, 32), generator=torch.Generator().manual_seed(0))
    assert longer(ids).shape == (1, 32, 65)
    torch.testing.assert_close(longer(ids[:, :16]), network(whole)(ids[:, :16]))


@torch.no_grad()
@pytest.mark.parametrize("name", ["nanogpt", "gpt2"])
def test_an_untied_head_starts_as_a_copy(name: str, saved: Callable[[str], Pretrained]) -> None:
    """Same logits from two separately trained tables; a bias starts at zero."""
    tied = saved(name)
    untied = network(fit_to(tied, tie_weights=False))
    ids = positions(tied.gpt, 20)
    assert torch.equal(untied(ids), network(tied)(ids))
    assert untied.lm_head.weight.data_ptr() != untied.transformer["wte"].weight.data_ptr()


@pytest.mark.parametrize(
    ("wanted", "named"),
    [
        ({"vocab_size": 66}, "66 tokens.*trained with 65"),
        ({"tie_weights": True}, "model.gpt.tie_weights"),
        ({"n_layer": 3}, "model.gpt.n_layer is 3.*has 2"),
        ({"activation": "relu"}, "model.gpt.activation is relu.*has relu2"),
    ],
)
def test_settings_that_contradict_the_weights_are_refused_by_name(
    wanted: dict[str, Any], named: str, saved: Callable[[str], Pretrained]
) -> None:
    """Guards against weights that are silently dropped or initialised again."""
    with pytest.raises(UserError, match=named):
        fit_to(saved("modern"), **wanted)


def test_only_the_padding_of_gpt2_is_cropped(tmp_path: Path) -> None:
    """GPT-2's 50,257 tokens are 50,304 in nanoGPT; any other pair of sizes is an error, multiples of 64 too."""
    found = load_pretrained(str(nanogpt_file(tmp_path / "ckpt.pt", their_gpt2(vocab_size=50_304, n_embd=2))))
    assert fit_to(found, vocab_size=0).gpt.vocab_size == 50_304
    weights = fit_to(found, vocab_size=50_257).state_dict()
    assert weights["transformer.wte.weight"].shape == weights["lm_head.weight"].shape == (50_257, 2)
    for size in (65, 50_250, 50_305):
        with pytest.raises(UserError, match=f"{size} tokens"):
            fit_to(found, vocab_size=size)
    found = load_pretrained(str(nanogpt_file(tmp_path / "other.pt", their_gpt2(vocab_size=64))))
    with pytest.raises(UserError, match=r"63 tokens, but .* trained with 64"):
        fit_to(found, vocab_size=63)


def test_a_run_from_a_padded_vocabulary_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its settings hold the vocabulary of its tokenizer."""
    source = nanogpt_file(tmp_path / "ckpt.pt", their_gpt2(vocab_size=64))
    config, run = write_config(tmp_path, trainer__max_steps=1), tmp_path / "run"
    start = ("fit", "--config", config, "--run_dir", run, "--model.init_from", source)
    answer = gptlit(*start)
    assert answer.code == 2
    assert answer.err.startswith("gptlit: the tokenizer has 57 tokens, but nanoGPT's"), "before the opening lines"
    monkeypatch.setitem(PADDED, 57, 64)
    answer = gptlit(*start)
    assert answer.code == 0, answer.err
    answer = gptlit("fit", "--ckpt_path", run, "--trainer.max_steps", 2)
    assert answer.code == 0, answer.err
    assert load(run / "last.ckpt")["hyper_parameters"]["gpt"]["vocab_size"] == 57


# ---------------------------------------------------------------- safety and user errors


class Payload:
    """Creates a file when it is unpickled, as an attacker's payload could."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.proof), "w")


@pytest.mark.parametrize("kind", ["nanogpt", "run", "bare pickle"])
def test_a_payload_in_a_checkpoint_is_refused_and_not_executed(kind: str, tmp_path: Path) -> None:
    """Loading untrusted weights must not execute code."""
    proof, file = tmp_path / "proof", tmp_path / "ckpt.pt"
    payload = Payload(proof)
    if kind == "bare pickle":
        file.write_bytes(pickle.dumps(payload, protocol=2))
    else:
        keys = ("model", "model_args") if kind == "nanogpt" else ("state_dict", "hyper_parameters")
        torch.save({keys[0]: {}, keys[1]: payload}, file)
    with pytest.raises(UserError) as refusal:
        load_pretrained(str(file))
    assert "nothing in it was executed" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not proof.exists()
    pickle.loads(pickle.dumps(payload)).close()
    assert proof.exists(), "the payload is a real one"


def test_pickled_weights_in_a_folder_of_transformers_are_not_read(tmp_path: Path) -> None:
    """Only safetensors are read; a folder with pytorch_model.bin alone is refused."""
    their_gpt2().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Payload(tmp_path / "proof")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        load_pretrained(str(tmp_path)).state_dict()
    assert not (tmp_path / "proof").exists()


def test_code_in_a_folder_is_not_executed(tmp_path: Path) -> None:
    """A folder that names Python files to import is refused as another architecture."""
    their_gpt2().save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text().replace('"gpt2"', '"strange"')
    auto_map = '"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}'
    (tmp_path / "config.json").write_text(config.replace("{", "{" + auto_map + ",", 1))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'proof')!r}, 'w')")
    with pytest.raises(UserError, match=r"config\.json"):
        load_pretrained(str(tmp_path))
    assert not (tmp_path / "proof").exists()


def test_a_folder_is_opened_without_reading_its_weights(tmp_path: Path) -> None:
    """Architecture and tokenizer need no weights; a missing weight file is one line when the weights are needed."""
    export_run(checkpoint_of(random_gpt(EXPORTABLE["modern"]), TOKENIZER), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    found = load_pretrained(str(tmp_path / "model"))
    assert found.gpt == EXPORTABLE["modern"]
    assert found.tokenizer == TOKENIZER
    with pytest.raises(UserError, match="safetensors") as refusal:
        found.state_dict()
    assert "\n" not in str(refusal.value)


def test_incomplete_weights_are_refused(tmp_path: Path) -> None:
    """Transformers only warns and initialises missing weights at random."""
    their_gpt2().save_pretrained(tmp_path)
    weights = safetensors_torch.load_file(tmp_path / "model.safetensors")
    del weights["transformer.h.1.mlp.c_fc.weight"]
    safetensors_torch.save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"not complete: transformer.h.1.mlp.c_fc.weight"):
        load_pretrained(str(tmp_path)).state_dict()


def test_biases_trained_in_an_exported_folder_are_kept(tmp_path: Path) -> None:
    """An export of a model without biases has zero biases, which other programs may train."""
    export_run(checkpoint_of(random_gpt(EXPORTABLE["nanogpt"]), TOKENIZER), tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        theirs.transformer.h[0].mlp.c_fc.bias[0] = 1.0
    theirs.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"h.0.mlp.c_fc.bias is not zero.*config.json"):
        load_pretrained(str(tmp_path / "model")).state_dict()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"activation_function": "silu"}, "activation"),
        ({"n_inner": 33}, "33 wide"),
        ({"layer_norm_epsilon": 1e-3}, "layer_norm_epsilon"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ],
)
def test_an_unsupported_gpt2_setting_is_refused_by_name(settings: dict[str, Any], named: str, tmp_path: Path) -> None:
    """Each of these settings changes the logits."""
    their_gpt2(**settings).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=named):
        load_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_key_value_heads": 1}, "num_key_value_heads"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_parameters"),
        ({"attention_bias": True}, "attention_bias"),
    ],
)
def test_an_unsupported_nanochat_setting_is_refused_by_name(
    settings: dict[str, Any], named: str, tmp_path: Path
) -> None:
    """Each of these settings changes the logits."""
    their_nanochat(**settings).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=named):
        load_pretrained(str(tmp_path))


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    """Llama is not GPT-2."""
    transformers.LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="'llama'"):
        load_pretrained(str(tmp_path))


def test_weights_of_another_shape_than_the_configuration_are_refused(tmp_path: Path) -> None:
    """The error names the weight."""
    checkpoint = checkpoint_of(random_gpt(EXPORTABLE["modern"]), TOKENIZER)
    checkpoint["hyper_parameters"]["gpt"]["n_embd"] = 64
    torch.save(checkpoint, tmp_path / "best.ckpt")
    with pytest.raises(UserError, match="shape"):
        load_pretrained(str(tmp_path)).state_dict()


@pytest.mark.parametrize(
    ("name", "content"),
    [("best.ckpt", b""), ("best.ckpt", b"no checkpoint"), ("best.ckpt", {"a": 1}), ("best.ckpt", [1]), ("x", None)],
)
def test_a_file_or_folder_without_a_model_is_refused_in_one_line(name: str, content: Any, tmp_path: Path) -> None:
    """An empty file, a text, an unknown dict, a list, an empty folder."""
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / name)
    with pytest.raises(UserError) as refusal:
        load_pretrained(str(tmp_path))
    assert str(tmp_path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_an_unknown_name_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing path is not taken for a hub id; an unreachable hub gives no traceback."""
    with pytest.raises(UserError, match="no such file or folder"):
        load_pretrained("checkpoints/base/best.ckpt")
    Path("checkpoints/other").mkdir(parents=True)
    Path("checkpoints/other/best.ckpt").touch()
    with pytest.raises(UserError, match=r"no such run: train it first.*\(runs here: checkpoints/other\)"):
        load_pretrained("checkpoints/base")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="out of reach") as refusal:
        load_pretrained("nobody/has-this-model")
    assert "\n" not in str(refusal.value)


def nanochat_folder(place: Path) -> Path:
    weights = {"transformer.wte.weight": torch.zeros(2, 2), "value_embeds.1.weight": torch.zeros(2, 2)}
    torch.save({**weights, "resid_lambdas": torch.ones(2)}, place / "model_000650.pt")
    (place / "meta_000650.json").write_text("{}")
    return place


def llm_c_model(place: Path) -> Path:
    (place / "gpt2_124M.bin").write_bytes(struct.pack("<256i", 20240326, 3, *[0] * 254))
    return place / "gpt2_124M.bin"


def adapter(place: Path) -> Path:
    (place / "adapter_config.json").write_text("{}")
    return place


def gguf_file(place: Path) -> Path:
    (place / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    return place / "model.gguf"


def bare_safetensors(place: Path) -> Path:
    safetensors_torch.save_file({"a": torch.zeros(1)}, place / "model.safetensors")
    return place / "model.safetensors"


@pytest.mark.parametrize(
    ("make", "advice"),
    [
        (nanochat_folder, "value embeddings, smear and per-layer scalars"),
        (lambda place: nanochat_folder(place) / "model_000650.pt", "value embeddings, smear and per-layer scalars"),
        (llm_c_model, "a model file of llm.c: convert it"),
        (adapter, "merge it first"),
        (gguf_file, "a GGUF file"),
        (bare_safetensors, "give the folder with config.json"),
    ],
    ids=["nanochat folder", "nanochat file", "llm.c", "adapter", "GGUF", "safetensors"],
)
def test_a_known_format_that_cannot_be_read_is_refused_with_advice(
    make: Callable[[Path], Path], advice: str, tmp_path: Path
) -> None:
    """In one line that names the format."""
    source = make(tmp_path)
    with pytest.raises(UserError, match=advice) as refusal:
        load_pretrained(str(source))
    assert str(source) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_damaged_run_is_refused(tmp_path: Path) -> None:
    """Checksums cover every byte, as for --ckpt_path: a flipped bit in a weight is detected."""
    file = tmp_path / "best.ckpt"
    torch.save(checkpoint_of(random_gpt(EXPORTABLE["modern"]).float(), TOKENIZER), file)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="checksum"):
        load_pretrained(str(tmp_path))


def test_every_dialect_is_either_exportable_or_refused() -> None:
    """The table of dialects grows; a new one must not be forgotten here."""
    exportable = set(EXPORTABLE.values())
    unnamed = [name for name, settings in DIALECTS.items() if GPTConfig(**settings) not in exportable]
    refused = {"bigram", "positions", "one head", "four heads", "feed-forward", "residual", "layernorm"}
    assert set(unnamed) == {*refused, "modern, token shift"}


@pytest.mark.parametrize(
    ("magic", "name"),
    [(20240326, "a model file of llm.c"), (20240520, "a token file of llm.c"), (20240801, "a token file of llm.c")],
)
def test_a_file_of_llm_c_is_recognised_and_not_taken_for_text(magic: int, name: str, tmp_path: Path) -> None:
    """By its magic number; advice about encodings would not help."""
    file = tmp_path / "tokens.bin"
    file.write_bytes(struct.pack("<256i", magic, 1, *[0] * 254) + bytes(range(256)))
    with pytest.raises(UserError, match=name) as refusal:
        list(file_text(file, None, "data.corpus"))
    assert "iconv" not in str(refusal.value)
