"""Text sampled during training."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from rich.text import Text

from gptlit.callbacks.console import console
from gptlit.checkpoint.atomic import atomic_write_text
from gptlit.errors import settings_under
from gptlit.generation.generate import Sampling, generate
from gptlit.training.strategies import holds_whole_model

INDENT = " " * 4  # of a sample on the terminal


class SampleText(pl.Callback):
    """Samples text after each validation: to stderr, to TensorBoard (TEXT) and to `samples/step-….txt`.

    Prompt and seed are always the same, so that only the model differs from sample to sample.

    Args:
        run_dir: folder of the run.
        prompt: text to continue; characters that are not in the vocabulary are left out. null is the start of a
            document, or a newline where the text is one document.
        max_new_tokens: tokens to sample; 0 turns samples off.
        temperature: as in `gptlit predict`; 0 takes the most probable token.
        top_k: as in `gptlit predict`: sample from the k most probable tokens; null keeps all.
        seed: seed of the sample.
        show: characters of the sample that are printed; the files hold all of it. 0 prints nothing.
    """

    def __init__(
        self,
        run_dir: str | Path,
        prompt: str | None = None,
        max_new_tokens: int = 500,
        temperature: float = 0.8,
        top_k: int | None = None,
        seed: int = 1337,
        show: int = 200,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.prompt = prompt
        self.max_new_tokens = max_new_tokens
        with settings_under("sample_text"):
            self.sampling = Sampling(temperature=temperature, top_k=top_k)
        self.seed = seed
        self.show = show

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Sample on rank 0, unless the model is sharded."""
        first = trainer.is_global_zero and not trainer.sanity_checking and trainer.state.fn == "fit"
        if not (first and self.max_new_tokens and holds_whole_model(trainer)):
            return
        corpus = getattr(getattr(trainer, "datamodule", None), "corpus", None)
        text = self.sample(pl_module, getattr(corpus, "document_start", None) or "\n")
        atomic_write_text(self.run_dir / "samples" / f"step-{trainer.global_step:06d}.txt", text)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("sample", as_markdown(text), trainer.global_step)
        if self.show:
            console().print(Text(f"  sample after step {trainer.global_step:,}:", style="dim"))
            for line in Text(text[: self.show].strip()).wrap(console(), console().width - len(INDENT)):
                console().print(INDENT + line.plain.rstrip())

    def sample(self, module: Any, document_start: str = "\n") -> str:
        """Return prompt and continuation; without a prompt, a new document."""
        tokenizer = module.tokenizer
        prompt = document_start if self.prompt is None else self.prompt
        start = tokenizer.encode(prompt, unknown="skip") or [0]
        ids = torch.tensor([start], device=module.device)  # (1, T)
        sampled = generate(module.network, ids, self.max_new_tokens, self.sampling, seed=self.seed)
        return tokenizer.decode([*start, *(int(token) for (token,) in sampled)])


def as_markdown(text: str) -> str:
    """Indent every line by four, which TensorBoard's TEXT tab shows as it is."""
    return "\n".join(f"    {line}" for line in text.splitlines())
