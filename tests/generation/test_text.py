"""Text from ids: pieces as soon as they are final, stop texts, and the sink that receives them."""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from conftest import DIALECTS, random_gpt
from hypothesis import given, settings
from hypothesis import strategies as st

from gptlit.errors import UserError
from gptlit.generation.generate import generate
from gptlit.generation.text import GeneratedText, GenerationConfig, TextStream, generate_texts
from gptlit.model.config import GPTConfig
from gptlit.tokenizer import BPETokenizer, CharTokenizer

ALPHABET = CharTokenizer("abc")
LETTERS = CharTokenizer("".join(chr(ord("0") + i) for i in range(65)))


class Pieces:
    """A tokenizer whose tokens are several letters long."""

    tokens = ("a", "b", "c", "ab", "bca", "cc", "abcab")

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.tokens[i] for i in ids)


def before_first_stop(text: str, stop: Sequence[str]) -> str:
    """Letter by letter: the text up to where it first ends with a stop text."""
    for end in range(1, len(text) + 1):
        met = [len(s) for s in stop if text[:end].endswith(s)]
        if met:
            return text[: end - max(met)]
    return text


def streamed(stream: TextStream, ids: Iterable[int]) -> list[str]:
    return [*(stream.push(i) for i in ids), stream.close()]


@given(
    ids=st.lists(st.integers(0, 6), max_size=30),
    stop=st.lists(st.text("abc", min_size=1, max_size=6), max_size=3),
)
def test_the_text_ends_before_the_first_stop_text_however_it_is_split_into_tokens(
    ids: list[int], stop: list[str]
) -> None:
    text = Pieces().decode(ids)
    assert "".join(streamed(TextStream(Pieces(), stop), ids)) == before_first_stop(text, stop)


@given(
    prompt=st.text("abc", max_size=8),
    ids=st.lists(st.integers(0, 6), max_size=30),
    stop=st.lists(st.text("abc", min_size=1, max_size=6), max_size=3),
)
@settings(deadline=None)
def test_a_stop_text_may_begin_in_the_prompt(prompt: str, ids: list[int], stop: list[str]) -> None:
    """Character by character: the text ends where prompt and text end in a stop text that the prompt did not end in."""
    text, whole, kept = Pieces().decode(ids), prompt, None
    for count, character in enumerate(text, 1):
        whole += character
        found = [s for s in stop if whole.endswith(s) and (len(s) <= count or not prompt.endswith(s))]
        if found:
            kept = text[: max(0, count - max(map(len, found)))]
            break
    assert "".join(streamed(TextStream(Pieces(), stop, prompt), ids)) == (text if kept is None else kept)


def test_only_text_that_may_start_a_stop_text_is_held_back() -> None:
    """Other text must not wait, or the output would stutter."""
    stream = TextStream(ALPHABET, ["abc"])
    assert streamed(stream, ALPHABET.encode("cabab")) == ["c", "", "", "ab", "", "ab"]
    assert not stream.stopped
    stream = TextStream(ALPHABET, ["abc"])
    assert streamed(stream, ALPHABET.encode("cababca")) == ["c", "", "", "ab", "", "", "", ""]
    assert stream.stopped


def test_without_a_stop_text_every_character_comes_at_once() -> None:
    assert streamed(TextStream(ALPHABET), [0, 1, 2]) == ["a", "b", "c", ""]


VERSE = "naïve 日本語 😀 \ufffd end"


@given(text=st.text(max_size=20) | st.text(VERSE, max_size=20), cut=st.integers(0, 20))
@settings(deadline=None)
def test_half_a_character_is_never_written(text: str, cut: int) -> None:
    """A byte-level token may end inside a character: written at once it would be U+FFFD, and stay so."""
    tokenizer = BPETokenizer.train([VERSE], vocab_size=256, source="verse")
    ids = tokenizer.encode(text)
    pieces = streamed(TextStream(tokenizer), ids)
    assert "".join(pieces) == text
    broken = ids[:cut]  # ends anywhere, as a text of max_new_tokens does
    assert "".join(streamed(TextStream(tokenizer), broken)) == tokenizer.decode(broken)


# ---------------------------------------------------------------- a batch of texts


class Recorder:
    """A sink that keeps everything it receives, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def begin(self, batch: Sequence[Any]) -> None:
        self.calls.append(("begin", list(batch)))

    def write(self, row: int, text: str) -> None:
        self.calls.append(("write", row, text))

    def end(self, batch: Sequence[Any], rows: Sequence[GeneratedText]) -> None:
        self.calls.append(("end", [row.text for row in rows]))


def test_the_sink_receives_the_texts_while_they_are_sampled() -> None:
    model, sink = random_gpt(GPTConfig(**DIALECTS["nanogpt"])), Recorder()
    config = GenerationConfig(max_new_tokens=20, num_samples=2, seed=3)
    rows = generate_texts(model, LETTERS, [[1, 2], [3]], config, sink)
    ids = torch.stack(list(generate(model, [[1, 2], [3]], 20, num_samples=2, seed=3, context=config.context)), 1)
    assert [row.text for row in rows] == [LETTERS.decode(row) for row in ids.tolist()]
    assert [row.tokens for row in rows] == [20] * 4
    assert sink.calls[0] == ("begin", [[1, 2], [3]])
    assert sink.calls[-1] == ("end", [row.text for row in rows])
    for number, row in enumerate(rows):
        assert "".join(call[2] for call in sink.calls[1:-1] if call[1] == number) == row.text
    assert [call[1] for call in sink.calls[1:9]] == [0, 1, 2, 3] * 2  # step by step, not row by row


def test_generation_ends_when_every_row_has_met_a_stop_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens and log-probabilities are counted up to the stop text of each row."""
    model = random_gpt(GPTConfig(**DIALECTS["nanogpt"]))
    plain = generate_texts(model, LETTERS, [[1]], GenerationConfig(max_new_tokens=40, num_samples=2, seed=3))
    stop = (plain[0].text[5], plain[1].text[9])
    config = GenerationConfig(max_new_tokens=40, num_samples=2, seed=3, stop=stop, log_probabilities=True)
    steps: list[object] = []
    original = generate

    def spy(*args: Any, **options: Any) -> Iterable[torch.Tensor]:
        for ids in original(*args, **options):
            steps.append(ids)
            yield ids

    monkeypatch.setattr("gptlit.generation.text.generate", spy)
    rows = generate_texts(model, LETTERS, [[1]], config)
    for row, whole in zip(rows, plain, strict=True):
        assert row.text == before_first_stop(whole.text, stop)
        assert row.tokens == len(row.log_probabilities) == len(row.text)
    assert len(steps) == 1 + max(row.tokens for row in rows) < 40


def test_a_replacement_character_of_a_vocabulary_is_no_half_of_a_character() -> None:
    """As a stop text it ends the text when it is sampled: no further token is counted."""
    tokenizer = CharTokenizer("ab\ufffd")
    assert TextStream(tokenizer).push(2) == "\ufffd"
    stream = TextStream(tokenizer, ["\ufffd"])
    assert [stream.push(token) for token in (0, 1, 2)] == ["a", "b", ""]
    assert stream.stopped
    bytes_of_a_character = BPETokenizer.train("é", 256)
    first, second = bytes_of_a_character.encode("é")
    stream = TextStream(bytes_of_a_character)
    assert [stream.push(first), stream.push(second)] == ["", "é"]


def test_a_stop_text_is_found_across_the_end_of_the_prompt() -> None:
    """Each row of a batch has the end of its own prompt."""
    model = random_gpt(GPTConfig(**DIALECTS["nanogpt"]))
    prompts = [[1, 2], [3]]
    plain = generate_texts(model, LETTERS, prompts, GenerationConfig(max_new_tokens=20, seed=3))
    stop = LETTERS.decode([1, 2]) + plain[0].text[:3]
    rows = generate_texts(model, LETTERS, prompts, GenerationConfig(max_new_tokens=20, seed=3, stop=(stop,)))
    assert rows[0].text == ""
    assert rows[1].text == before_first_stop(plain[1].text, [stop])


def test_an_empty_batch_gives_no_texts_and_still_ends() -> None:
    """A rank without prompts must take part in the end of the batch."""
    sink = Recorder()
    assert generate_texts(random_gpt(GPTConfig(**DIALECTS["nanogpt"])), LETTERS, [], GenerationConfig(), sink) == []
    assert sink.calls == [("begin", []), ("end", [])]


@pytest.mark.parametrize(
    ("options", "setting"), [({"max_new_tokens": 0}, "max_new_tokens"), ({"num_samples": 0}, "num_samples")]
)
def test_a_count_out_of_range_names_its_field(options: dict[str, int], setting: str) -> None:
    with pytest.raises(UserError, match=f"{setting} is 0: it must be 1 or more") as caught:
        GenerationConfig(**options)
    assert caught.value.setting == setting


def test_an_empty_stop_text_is_refused() -> None:
    """It would stop before the first character."""
    with pytest.raises(UserError, match="stop is empty"):
        GenerationConfig(stop=("a", ""))
