"""BPE in the data path: trained once, deterministic, and measured in bits per character."""

import json
import math
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from command import PLAY, gptlit, load, write_config
from hypothesis import given, settings
from hypothesis import strategies as st

from gptlit import BPETokenizer, GPTConfig, LitGPT, TextDataModule, UserError
from gptlit.cli.packaged import packaged_configs
from gptlit.data import TextSpec, encode_text
from gptlit.data.encode import learned_bpe, sample

TEXT = "".join(f"{number}. À la mode, naïve — 日本語 🙂🙃 e\u0301, one letter at a time.\n" for number in range(200))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gptlit" / "tokens"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text in which many characters have several bytes, and many tokens parts of characters."""
    path = tmp_path / "modes.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def bpe_data(path: Path, vocab_size: int = 280, **more: object) -> TextDataModule:
    """Set up the text as BPE tokens."""
    data = TextDataModule(str(path), tokenizer="bpe", vocab_size=vocab_size, block_size=8, batch_size=4, **more)  # type: ignore[arg-type]
    data.setup()
    return data


def test_the_tokens_of_each_part_are_the_text_of_that_part(text: Path) -> None:
    """Nothing is lost, and no token reaches from the training into the validation part."""
    data = bpe_data(text)
    cut = int(0.9 * len(TEXT))
    assert data.tokenizer.decode(data.train_tokens.tolist()) == TEXT[:cut]
    assert data.tokenizer.decode(data.val_tokens.tolist()) == TEXT[cut:]
    assert data.chars_per_train_token == cut / len(data.train_tokens) > 1


def test_the_vocabulary_is_learned_from_the_training_part_alone(text: Path) -> None:
    """Guards against a tokenizer that has seen the validation text."""
    alone = BPETokenizer.train(TEXT[: int(0.9 * len(TEXT))], 280)
    assert bpe_data(text).tokenizer == alone


def test_the_vocabulary_is_learned_once(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second start, and a moved text, find it; another text, split or size is learned again."""
    first = bpe_data(text).tokenizer
    calls: list[int] = []
    train = BPETokenizer.train

    def counted(texts: object, vocab_size: int, *more: object, **options: object) -> BPETokenizer:
        calls.append(vocab_size)
        return train(texts, vocab_size, *more, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(BPETokenizer, "train", counted)
    assert bpe_data(text).tokenizer == first
    moved = bpe_data(text.rename(text.with_name("moved.txt"))).tokenizer
    assert (moved, moved.source, calls) == (first, "moved", [])
    path = text.with_name("moved.txt")
    bpe_data(path, vocab_size=281)
    bpe_data(path, val_fraction=0.2)
    path.write_text(TEXT + "more", encoding="utf-8")
    bpe_data(path)
    assert calls == [281, 280, 280]


def test_the_vocabulary_does_not_depend_on_how_the_text_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ties between pairs included."""
    text = PLAY.read_text()[:60_000]
    whole = learned_bpe(lambda: [text], ("whole", 0, 400), 400, "")
    monkeypatch.setattr("gptlit.tokenizer.bpe.slices.__defaults__", (500,))
    cut = learned_bpe(lambda: [text], ("cut", 0, 400), 400, "")
    assert cut == whole
    assert cut.to_json() == whole.to_json()


@pytest.mark.parametrize("wanted", [100, 300, 1000])
def test_a_very_long_text_is_sampled_evenly(wanted: int) -> None:
    """Guards against a day of training, and against a vocabulary of the beginning of the text only."""
    pieces = [f"{number:03}" + "." * (number % 7) for number in range(200)]
    characters = sum(map(len, pieces))
    taken = list(sample(pieces, characters, wanted))
    assert 0 <= sum(map(len, taken)) - min(wanted, characters) < 10
    assert taken == sorted(taken)
    quarter = sum(len(piece) for piece in taken if piece < "050")
    assert quarter == pytest.approx(sum(map(len, taken)) / 4, abs=10)


def test_a_shorter_text_is_learned_from_completely() -> None:
    """Guards against a sample that leaves out the last piece."""
    pieces = ["abc", "def", "gh"]
    assert list(sample(pieces, 8, 8)) == list(sample(pieces, 8, 9)) == pieces


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    """A vocabulary with tokens that are parts of characters, and tokens that span several."""
    return BPETokenizer.train(TEXT, 300)


@given(text=st.text(max_size=80))
@settings(max_examples=100, deadline=None)
def test_the_characters_of_the_tokens_are_the_characters_of_the_text(tokenizer: BPETokenizer, text: str) -> None:
    """Exactly, for any text: bits per character are divided by them."""
    per_token = np.array(tokenizer.chars_per_token())
    assert per_token[tokenizer.encode(text)].sum() == len(text)


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_bits_per_character_and_per_byte_are_exact(text: Path, tmp_path: Path, kind: str) -> None:
    """An untrained uniform model needs log2(V) bits for every token but the first."""
    data = TextDataModule(str(text), tokenizer=kind, vocab_size=280, block_size=8, batch_size=4, eval_batch_size=7)
    data.setup()
    module = LitGPT(GPTConfig(block_size=8, n_layer=0, n_head=1, n_embd=8))
    module.tokenizer = data.tokenizer
    module.configure_model()
    torch.nn.init.zeros_(module.network.lm_head.weight)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    (metrics,) = trainer.validate(module, datamodule=data, verbose=False)
    held_out = TEXT[int(0.9 * len(TEXT)) :]
    tokens = data.tokenizer.encode(held_out)
    bits = math.log2(data.tokenizer.vocab_size) * (len(tokens) - 1)
    characters = len(held_out) - data.tokenizer.chars_per_token()[tokens[0]]
    size = len(held_out.encode()) - data.tokenizer.bytes_per_token()[tokens[0]]
    assert metrics["val/bpc"] == pytest.approx(bits / characters)
    assert metrics["val/bpb"] == pytest.approx(bits / size)
    assert metrics["val/loss"] == pytest.approx(math.log(data.tokenizer.vocab_size))


def test_a_tokenizer_file_is_used_as_it_is(text: Path, tmp_path: Path) -> None:
    """Such as GPT-2's; its size is taken over."""
    path = tmp_path / "tokenizer.json"
    theirs = BPETokenizer.train("another text altogether, for a vocabulary that does not fit", 270)
    path.write_text(json.dumps(theirs.definition))
    data = TextDataModule(str(text), tokenizer=str(path), block_size=8)
    data.setup()
    assert data.tokenizer == theirs
    assert data.tokenizer.decode(data.val_tokens.tolist()) == TEXT[int(0.9 * len(TEXT)) :]


def test_an_unknown_tokenizer_is_refused_with_the_choices(text: Path) -> None:
    """The error names the setting."""
    with pytest.raises(UserError, match=r"tokenizer is 'bep': it must be char, bpe, or the path"):
        encode_text(TextSpec(str(text)), None, "bep", 300)


def test_too_small_a_vocabulary_is_refused_and_nothing_is_kept(text: Path, cache: Path) -> None:
    """A byte-level BPE has a token for each byte."""
    with pytest.raises(UserError, match="vocab_size is 100: it must be 256 or more"):
        bpe_data(text, vocab_size=100)
    assert not list(cache.glob("*.bpe"))


def test_a_checkpoint_contains_its_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Resuming and validating need no learning, even with an empty cache."""
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path, data__tokenizer="bpe", data__vocab_size=270, trainer__max_steps=2)
    assert gptlit("fit", "--config", config, "--run_dir", "run").code == 0
    for path in cache.iterdir():
        path.unlink()
    monkeypatch.setattr(BPETokenizer, "train", lambda *_, **__: pytest.fail("the vocabulary was learned again"))
    assert gptlit("fit", "--ckpt_path", "run", "--trainer.max_steps", 3).code == 0
    answer = gptlit("validate", "--ckpt_path", "run")
    assert answer.code == 0
    assert "val/bpc" in answer.out
    assert load(tmp_path / "run" / "last.ckpt")["hyper_parameters"]["gpt"]["vocab_size"] == 270


def test_the_config_is_base_with_subwords() -> None:
    """Only the tokenizer and the length of the run differ, so that bits per character can be compared."""
    base, bpe = (yaml.safe_load((packaged_configs() / name).read_text()) for name in ("base.yaml", "bpe.yaml"))
    assert base["model"] == bpe["model"]
    extra = {"tokenizer": "bpe", "vocab_size": 1024}
    assert base["data"] | extra == bpe["data"]
    lengths = ("max_steps", "val_check_interval")
    assert {k: v for k, v in base["trainer"].items() if k not in lengths} == {
        k: v for k, v in bpe["trainer"].items() if k not in lengths
    }
