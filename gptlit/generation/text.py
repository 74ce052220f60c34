"""Texts drawn from prompts: what `LitGPT.predict_step` gives, from ids to pieces of text and back."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from gptlit.generation.generate import Sampling, generate
from gptlit.model.gpt import GPT
from gptlit.tokenizer import Tokenizer


class Decodes(Protocol):
    """What text streaming needs of a tokenizer."""

    def decode(self, ids: Iterable[int]) -> str: ...


class TextStream:
    """Turns the ids of one row into text, piece by piece as it becomes certain.

    Joined, the pieces are the decoded text before the first stop text in it, or all of it. Held back is only what may
    still turn out to begin a stop text, or to be half of a character. No stop text may be empty.
    """

    def __init__(self, tokenizer: Decodes, stop: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.stopped = False  # a stop text was met; what comes after it is dropped
        self._tokens: list[int] = []  # those whose last character may be incomplete
        self._decoded = 0  # characters of them already passed on
        self._held = ""  # text that may begin a stop text

    def push(self, token: int) -> str:
        """The text that one more id makes certain."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        text = self.tokenizer.decode(self._tokens)
        # Bytes that do not make a character yet decode to U+FFFD at the end.
        certain = text.rstrip("\ufffd")
        new, self._decoded = certain[self._decoded :], len(certain)
        if certain == text:
            self._tokens, self._decoded = [], 0
        return self._before_stop(new)

    def close(self) -> str:
        """The text held back, once no more ids come."""
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
        ends = [(start + len(stop), start) for stop in self.stop if (start := text.find(stop)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)[1]]  # the one complete first, as if characters had come one by one
        held = max(stop_beginning(text, stop) for stop in self.stop)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def stop_beginning(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(frozen=True)
class GenerationConfig:
    """What `predict_step` draws from each prompt."""

    max_new_tokens: int = 500
    sampling: Sampling = Sampling()
    num_samples: int = 1
    seed: int = 1337
    context: Literal["exact", "rolling"] = "exact"
    stop: tuple[str, ...] = ()
    log_probabilities: bool = False


@dataclass
class DrawnText:
    """One text so far, without its prompt; log-probabilities (nats) of its tokens under the model, if asked for."""

    text: str = ""
    tokens: int = 0
    log_probabilities: list[float] = field(default_factory=list)


class BatchGeneration:
    """The texts of a group of prompts, drawn while `steps` is read; `rows` holds what there is of each.

    Row p · num_samples + k is sample k of prompt p.
    """

    def __init__(
        self, network: GPT, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], drawing: GenerationConfig
    ) -> None:
        self.generation_config, self.tokenizer = drawing, tokenizer
        self.rows = [DrawnText() for _ in range(len(prompts) * drawing.num_samples)]
        self._log_probabilities: list[Tensor] | None = [] if drawing.log_probabilities else None
        self._ids = (
            iter(())
            if not prompts
            else generate(
                network,
                prompts,
                drawing.max_new_tokens,
                drawing.sampling,
                num_samples=drawing.num_samples,
                seed=drawing.seed,
                context=drawing.context,
                log_probabilities=self._log_probabilities,
            )
        )

    def steps(self) -> Iterator[list[str]]:
        """One piece of text for each row, often empty, step by step; ends when every row has met a stop text."""
        streams = [TextStream(self.tokenizer, self.generation_config.stop) for _ in self.rows]
        for ids in self._ids:
            pieces = [stream.push(token) for stream, token in zip(streams, ids.tolist(), strict=True)]
            logs = self._log_probabilities.pop().tolist() if self._log_probabilities is not None else []
            for number, (row, stream) in enumerate(zip(self.rows, streams, strict=True)):
                row.text += pieces[number]
                if not stream.stopped:
                    row.tokens += 1
                    row.log_probabilities += logs[number : number + 1]
            yield pieces
            if all(stream.stopped for stream in streams):
                return
        rest = [stream.close() for stream in streams]
        for row, piece in zip(self.rows, rest, strict=True):
            row.text += piece
        yield rest
