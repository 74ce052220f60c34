"""Text generated from prompts: ids become pieces of text, which a sink receives as soon as they are final."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor

from gptlit.errors import UserError, require
from gptlit.generation.engine.small_weights import WeightsDtype, check_weights_dtype
from gptlit.generation.generate import Sampling, generate
from gptlit.model.gpt import GPT
from gptlit.tokenizer import Tokenizer


class Decodes(Protocol):
    """The part of a tokenizer that streaming needs."""

    def decode(self, ids: Iterable[int]) -> str: ...


class TextStream:
    """Turns the ids of one row into text, piece by piece.

    The joined pieces are the decoded text up to the first stop text, or all of it. Text is held back only while it may
    be the start of a stop text, or half of a character. No stop text may be empty.

    Args:
        tokenizer: of the ids.
        stop: texts to stop before.
        before: the prompt, or its end. A stop text may begin in it; one that it ends in is complete and stops nothing.
    """

    def __init__(self, tokenizer: Decodes, stop: Sequence[str] = (), before: str = "") -> None:
        self.tokenizer = tokenizer
        # What may be the beginning of each stop text, until the first text is returned.
        self.stop = {text: "" if before.endswith(text) else last(before, len(text) - 1) for text in stop}
        self.stopped = False  # a stop text was found; the rest is dropped
        self._by_characters = getattr(tokenizer, "kind", "") == "char"  # every token is a complete character
        self._tokens: list[int] = []  # whose last character may be incomplete
        self._decoded = 0  # characters of them already returned
        self._held = ""  # text that may start a stop text

    def push(self, token: int) -> str:
        """Add one id; return the text that is final now."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        text = self.tokenizer.decode(self._tokens)
        # Bytes that are not a complete character yet decode to U+FFFD at the end.
        complete = text if self._by_characters else text.rstrip("\ufffd")
        new, self._decoded = complete[self._decoded :], len(complete)
        if complete == text:
            self._tokens, self._decoded = [], 0
        return self._before_stop(new)

    def close(self) -> str:
        """Return the text held back, after the last id."""
        if self.stopped:
            return ""
        rest = self.tokenizer.decode(self._tokens)[self._decoded :] if self._tokens else ""
        text = self._before_stop(rest) + self._held
        self._tokens, self._held = [], ""
        return text

    def _before_stop(self, new: str) -> str:
        text = self._held + new
        if not self.stop:
            return text
        places = ((stop, (before + text).find(stop), len(before)) for stop, before in self.stop.items())
        ends = [(place + len(stop) - border, place - border) for stop, place, border in places if place >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: max(0, min(ends)[1])]  # the one that is complete first, as if characters came one by one
        held = max(min(len(text), length_of_start(before + text, stop)) for stop, before in self.stop.items())
        self._held = text[len(text) - held :]
        if held < len(text):
            self.stop = dict.fromkeys(self.stop, "")
        return text[: len(text) - held]


def last(text: str, count: int) -> str:
    """Return the last `count` characters, or all."""
    return text[max(0, len(text) - count) :]


def length_of_start(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` are the start of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(frozen=True)
class GenerationConfig:
    """What `LitGPT.predict_step` generates from each prompt.

    Raises:
        UserError: for a value out of range.
    """

    max_new_tokens: int = 500
    """Tokens to generate for each sample."""
    sampling: Sampling = Sampling()
    """How the next token is chosen."""
    num_samples: int = 1
    """Samples per prompt."""
    seed: int = 1337
    """Sample k depends only on the seed and k, not on the batch."""
    context: Literal["exact", "rolling"] = "rolling"
    """What the model sees after block_size tokens; see `gptlit.generate`."""
    weights_dtype: WeightsDtype | None = None
    """Type of the large weight matrices while sampling on a CPU; None for the model's own. See `gptlit.generate`."""
    stop: tuple[str, ...] = ()
    """Texts to stop before."""
    log_probabilities: bool = False
    """Whether to keep the log-probability of every token, in nats."""

    def __post_init__(self) -> None:
        require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "1 or more")
        require(self.num_samples >= 1, "num_samples", self.num_samples, "1 or more")
        if "" in self.stop:
            raise UserError("is empty: give the text to stop before, or leave it out", "stop")


@dataclass
class GeneratedText:
    """One sample, without its prompt. It grows while the batch is generated."""

    text: str = ""
    tokens: int = 0
    """Tokens sampled, without the one that completed a stop text."""
    log_probabilities: list[float] = field(default_factory=list)
    """Log-probability of each token under the model in nats, if asked for."""


class TextSink(Protocol):
    """Receives generated text while it is sampled.

    Row p · num_samples + k is sample k of prompt p of the batch.
    """

    def begin(self, batch: Sequence[Any]) -> None:
        """A batch of prompts begins; nothing of it was computed yet."""

    def write(self, row: int, text: str) -> None:
        """More text of a row is final."""

    def end(self, batch: Sequence[Any], rows: Sequence[GeneratedText]) -> None:
        """The batch is complete."""


def generate_texts(
    network: GPT,
    tokenizer: Tokenizer,
    batch: Sequence[Any],
    config: GenerationConfig,
    sink: TextSink | None = None,
) -> list[GeneratedText]:
    """Generate the samples of a batch of prompts; ends early when every row has met a stop text.

    Args:
        network: the model.
        tokenizer: its tokenizer.
        batch: prompts, as lists of ids or as objects with such a list in `ids`.
        config: what to generate.
        sink: receives the text of each row as soon as it is final.

    Returns:
        `num_samples` texts per prompt, prompt by prompt.

    Raises:
        UserError: before anything is written, if the device or the model does not take `weights_dtype`.
    """
    check_weights_dtype(network, config.weights_dtype)
    rows = [GeneratedText() for _ in range(len(batch) * config.num_samples)]
    if sink is not None:
        sink.begin(batch)
    if rows:
        prompts = [list(getattr(prompt, "ids", prompt)) for prompt in batch]
        for pieces in _pieces(network, tokenizer, prompts, config, rows):
            for number, piece in enumerate(pieces):
                rows[number].text += piece
                if piece and sink is not None:
                    sink.write(number, piece)
    if sink is not None:
        sink.end(batch, rows)
    return rows


def _pieces(
    network: GPT,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    config: GenerationConfig,
    rows: Sequence[GeneratedText],
) -> Iterator[list[str]]:
    """Yield a piece of text for each row, often empty, step by step; count the tokens in `rows`."""
    ends = 4 * max(map(len, config.stop), default=0)  # tokens: one may be a quarter of a character
    before = [tokenizer.decode(ids[max(0, len(ids) - ends) :]) for ids in prompts]
    streams = [TextStream(tokenizer, config.stop, text) for text in before for _ in range(config.num_samples)]
    kept: list[Tensor] | None = [] if config.log_probabilities else None
    for ids in generate(
        network,
        prompts,
        config.max_new_tokens,
        config.sampling,
        num_samples=config.num_samples,
        seed=config.seed,
        context=config.context,
        weights_dtype=config.weights_dtype,
        log_probabilities=kept,
    ):
        pieces = [stream.push(token) for stream, token in zip(streams, ids.tolist(), strict=True)]
        logs = kept.pop().tolist() if kept is not None else []
        for number, (row, stream) in enumerate(zip(rows, streams, strict=True)):
            if not stream.stopped:
                row.tokens += 1
                row.log_probabilities += logs[number : number + 1]
        yield pieces
        if all(stream.stopped for stream in streams):
            return
    yield [stream.close() for stream in streams]
