"""Texts drawn from prompts: what `LitGPT.predict_step` gives, from ids to pieces of text and back."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from gptlit.model import GPT
from gptlit.sampling import Sampling, TextStream, generate
from gptlit.tokenizer import Tokenizer


@dataclass(frozen=True)
class Drawing:
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


class TextDraw:
    """The texts of a group of prompts, drawn while `steps` is read; `rows` holds what there is of each.

    Row p · num_samples + k is sample k of prompt p.
    """

    def __init__(self, network: GPT, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], drawing: Drawing) -> None:
        self.drawing, self.tokenizer = drawing, tokenizer
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
        streams = [TextStream(self.tokenizer, self.drawing.stop) for _ in self.rows]
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
