"""`gptlit validate --report full`: each measure against a plain computation, and none of them in `val/loss`."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Answer, gptlit, write_config
from conftest import random_gpt
from torch.nn import functional as F

from gptlit.cli.report import RANDOM_BATCHES, Measure, full_report, to_markdown
from gptlit.data.chunks import ESTIMATE_STREAM, RandomChunks
from gptlit.model.config import GPTConfig
from gptlit.model.gpt import GPT
from gptlit.tokenizer import BPETokenizer, CharTokenizer

T = 8


def tiny(vocabulary: int) -> GPT:
    return random_gpt(GPTConfig(vocab_size=vocabulary, block_size=T, n_layer=1, n_head=2, n_embd=8))


def report_on(tokens: torch.Tensor, tokenizer: CharTokenizer, stride: int, rows: int = 3) -> dict[str, Measure]:
    model = tiny(tokenizer.vocab_size)
    measures = full_report(model, tokens, tokenizer, batch_size=4, stride=stride, seed=5, rows=rows)
    return dict(zip(("whole", "first", "second", "sliding", "random"), measures, strict=True))


def plain_loss(model: GPT, tokens: torch.Tensor, start: int, target: int) -> float:
    """Return the loss of one token, read from the window that starts at `start`."""
    logits = model(tokens[None, start:target])[0, -1]
    return F.cross_entropy(logits[None].float(), tokens[target : target + 1]).item()


@pytest.mark.parametrize("length", [T + 1, 2 * T + 1, 43])
@pytest.mark.parametrize("stride", [1, 3, 4, T])
def test_every_token_is_predicted_once_from_the_longest_context_that_its_window_has(length: int, stride: int) -> None:
    """Against one forward pass per token."""
    tokenizer = CharTokenizer("abcdé")
    tokens = torch.randint(5, (length,), generator=torch.Generator().manual_seed(length))
    model = tiny(5)
    found = report_on(tokens, tokenizer, stride)
    with torch.no_grad():
        apart = [plain_loss(model, tokens, (t - 1) // T * T, t) for t in range(1, length)]
        starts = [max(0, -(-(t - T) // stride)) * stride for t in range(1, length)]
        slid = [plain_loss(model, tokens, start, t) for start, t in zip(starts, range(1, length), strict=True)]
    half = (length - 1) // 2
    for name, losses in {
        "whole": apart,
        "first": apart[:half],
        "second": apart[half:],
        "sliding": slid,
    }.items():
        assert found[name].loss == pytest.approx(sum(losses) / len(losses), rel=1e-6), name
    if stride == T:
        assert found["sliding"].loss == pytest.approx(found["whole"].loss)


def test_bits_count_characters_and_the_bytes_of_utf_8() -> None:
    """A text of two-byte characters has half as many bits per byte as per character."""
    tokenizer = CharTokenizer("éüñß")
    found = report_on(torch.tensor([0, 1, 2, 3] * 10), tokenizer, 4)
    for measure in found.values():
        assert measure.bits_per_character == pytest.approx(measure.loss / math.log(2))
        assert measure.bits_per_byte == pytest.approx(measure.bits_per_character / 2)


def test_the_estimate_is_the_mean_of_200_random_batches_with_its_standard_error() -> None:
    """Against the same batches one by one."""
    tokenizer = CharTokenizer("abcde")
    tokens = torch.randint(5, (200,), generator=torch.Generator().manual_seed(3))
    estimate = report_on(tokens, tokenizer, 4)["random"]
    model, chunks = tiny(5), RandomChunks(tokens, T, 4, seed=5)
    with torch.no_grad():
        batches = (chunks[ESTIMATE_STREAM + number] for number in range(RANDOM_BATCHES))
        losses = torch.tensor([F.cross_entropy(model(x).flatten(0, 1).float(), y.flatten()).item() for x, y in batches])
    assert estimate.loss == pytest.approx(losses.mean().item(), rel=1e-5)
    assert estimate.standard_error == pytest.approx(losses.std().item() / math.sqrt(RANDOM_BATCHES), rel=1e-4)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run."""
    folder = tmp_path_factory.mktemp("report")
    answer = gptlit("fit", "--config", write_config(folder, trainer__max_steps=6), "--run_dir", folder / "run")
    assert answer.code == 0, answer.err
    return folder / "run"


def metrics(answer: Answer) -> dict[str, str]:
    return dict(re.findall(r"^(val/\w+) (\S+)$", answer.out, flags=re.MULTILINE))


def test_the_report_leaves_the_metrics_as_they_are_and_its_first_row_is_the_loss(run: Path) -> None:
    """Sliding windows and random batches never enter `val/loss`."""
    plain = gptlit("validate", "--ckpt_path", run)
    full = gptlit("validate", "--ckpt_path", run, "--report", "full", "--report_stride", "4")
    assert full.code == 0, full.err
    assert "|" not in plain.out
    assert metrics(full) == metrics(plain)
    rows = re.findall(
        r"^\| (.*?) \| (\d+\.\d+)( ± \d\.\d+)? \| (\d+\.\d+) \| (\d+\.\d+) \|$", full.out, flags=re.MULTILINE
    )
    assert [bool(row[2]) for row in rows] == [False, False, False, False, True]
    assert "sliding window of 16, stride 4" in rows[3][0]
    assert "200 random batches of 8 × 16" in rows[4][0]
    assert float(rows[0][1]) == pytest.approx(float(metrics(plain)["val/loss"]), abs=2e-4)
    assert float(rows[0][3]) == pytest.approx(float(metrics(plain)["val/bpc"]), abs=2e-4)
    assert float(rows[0][4]) == pytest.approx(float(metrics(plain)["val/bpb"]), abs=2e-4)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--report_stride", "17"), "--report_stride is 17: it must be at most block_size (16), or 0 for half of it"),
        (("--report_stride", "-1"), "--report_stride is -1: it must be at most block_size (16), or 0 for half of it"),
        (("--trainer.devices", "2"), "--trainer.devices is 2: it must be 1 for --report full"),
    ],
)
def test_a_report_that_cannot_be_made_is_refused_in_one_line(run: Path, flags: tuple[str, str], line: str) -> None:
    """Before anything is computed."""
    answer = gptlit("validate", "--ckpt_path", run, "--report", "full", *flags)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err == f"gptlit: {line}\n"


@pytest.mark.parametrize(
    ("verb", "flags", "setting"),
    [
        ("validate", ("--trainer.limit_val_batches", 1), "limit_val_batches"),
        ("validate", ("--trainer.fast_dev_run", "true"), "fast_dev_run"),
        ("test", ("--trainer.limit_test_batches", 0.5), "limit_test_batches"),
        ("validate", (), None),
        ("test", ("--trainer.limit_test_batches", 1000), None),
    ],
)
def test_metrics_of_a_part_are_announced(run: Path, verb: str, flags: tuple[Any, ...], setting: str | None) -> None:
    """On stderr, with the setting; a limit that leaves nothing out is not one."""
    answer = gptlit(verb, "--ckpt_path", run, "--data.eval_batch_size", 16, *flags)
    assert answer.code == 0, answer.err
    found = re.search(
        r"the metrics are those of (\d+) of (\d+) batches of the validation part: trainer\.(\w+) is set", answer.err
    )
    assert (found and found[3]) == setting
    assert found is None or 0 < int(found[1]) < int(found[2])


@pytest.mark.parametrize("verb", ["fit", "validate", "test"])
def test_a_setting_that_the_checkpoint_fixes_is_refused_with_advice_for_every_verb(run: Path, verb: str) -> None:
    """Only fit resumes, and only fit starts a new run."""
    answer = gptlit(verb, "--ckpt_path", run, "--model.gpt.n_layer", 3)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err == (
        "gptlit: model.gpt.n_layer is 3, but the checkpoint was trained with 1: "
        "leave it out, or train a new model with gptlit fit, without --ckpt_path\n"
    )


@pytest.mark.parametrize(("verb", "setting"), [("validate", "limit_val_batches"), ("test", "limit_test_batches")])
def test_a_share_below_one_batch_is_refused_in_one_line(run: Path, verb: str, setting: str) -> None:
    """Lightning's advice is 1.0; smaller batches serve too."""
    answer = gptlit(verb, "--ckpt_path", run, f"--trainer.{setting}", 0.5, "--data.eval_batch_size", 1000)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err == (
        f"gptlit: --trainer.{setting} is 0.5: less than one batch of the validation part: "
        "a smaller --data.eval_batch_size makes more batches\n"
    )


@pytest.mark.parametrize("limit", [2, 0.5, 1.0, 0])
def test_a_run_that_validates_on_a_part_says_so_at_its_end(limit: float, tmp_path: Path) -> None:
    """The losses of its closing table are not those that the documents state."""
    config = write_config(tmp_path, data__eval_batch_size=16)
    answer = gptlit("fit", "--config", config, "--run_dir", tmp_path / "part", "--trainer.limit_val_batches", limit)
    assert answer.code == 0, answer.err
    said = "batches of the validation part: trainer.limit_val_batches is set"
    assert (said in answer.err) == (limit in (2, 0.5))


def test_a_text_of_one_character_has_no_loss() -> None:
    """Every measure is 0, and none of them a division by it."""
    tokenizer = CharTokenizer.train("a")
    for measure in report_on(torch.zeros(50, dtype=torch.int64), tokenizer, stride=4).values():
        assert (measure.loss, measure.bits_per_character, measure.bits_per_byte) == (0.0, 0.0, 0.0)


def test_the_smallest_text_has_one_half() -> None:
    """Of two tokens one is predicted."""
    model = random_gpt(GPTConfig(vocab_size=2, block_size=1, n_layer=1, n_head=1, n_embd=8))
    tokens = torch.tensor([0, 1])
    measures = full_report(model, tokens, CharTokenizer("ab"), batch_size=4, stride=1, seed=5, rows=3)
    assert [measure.name for measure in measures][1:3] == ["second half", "sliding window of 1, stride 1"]
    assert measures[0].loss == measures[1].loss > 0


def test_a_part_in_which_no_character_begins_has_no_bits_per_character() -> None:
    """A token of a BPE may be the second byte of a character."""
    tokenizer = BPETokenizer.train("é", 256)
    tokens = torch.tensor(tokenizer.encode("é"))
    assert len(tokens) == 2
    model = random_gpt(GPTConfig(vocab_size=tokenizer.vocab_size, block_size=1, n_layer=1, n_head=1, n_embd=8))
    whole, *others = full_report(model, tokens, tokenizer, batch_size=4, stride=1, seed=5, rows=3)
    assert math.isnan(whole.bits_per_character)
    assert whole.bits_per_byte == pytest.approx(whole.loss / math.log(2))
    row = to_markdown([whole, *others]).splitlines()[2]
    assert row == f"| {whole.name} | {whole.loss:.4f} |  | {whole.bits_per_byte:.4f} |"
