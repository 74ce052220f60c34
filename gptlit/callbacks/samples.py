"""Text drawn while the model learns."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from rich.console import Console

from gptlit.generation.generate import Sampling, generate


class SampleText(pl.Callback):
    """After each validation, draws from a fixed prompt: to stderr, to TensorBoard and to `samples/step-….txt`.

    The same seed every time, from a generator of its own: what changes from sample to sample is the model.

    Args:
        run_dir: folder of the run.
        prompt: text to begin with; characters that the vocabulary lacks are left out.
        max_new_tokens: tokens to draw; 0 turns samples off.
        temperature: see `gptlit predict --help`.
        top_k: see `gptlit predict --help`.
        seed: of the sample.
        show: characters of the sample that go to the terminal; the files hold it whole.
    """

    def __init__(
        self,
        run_dir: str | Path,
        prompt: str = "\n",
        max_new_tokens: int = 500,
        temperature: float = 0.8,
        top_k: int | None = None,
        seed: int = 1337,
        show: int = 200,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.prompt = prompt
        self.max_new_tokens = max_new_tokens
        self.sampling = Sampling(temperature=temperature, top_k=top_k)
        self.seed = seed
        self.show = show

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Draws one sample; on the first process only, and only where it holds the whole model."""
        whole = isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy)
        first = trainer.is_global_zero and not trainer.sanity_checking and trainer.state.fn == "fit"
        if not (whole and first and self.max_new_tokens):
            return
        text = self.draw(pl_module)
        folder = self.run_dir / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"step-{trainer.global_step:06d}.txt").write_text(text, encoding="utf-8")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("sample", as_markdown(text), trainer.global_step)
        if self.show:
            Console(stderr=True, highlight=False, markup=False).print(text[: self.show].strip(), style="dim")

    def draw(self, module: Any) -> str:
        """Prompt and continuation."""
        tokenizer = module.tokenizer
        start = tokenizer.encode(self.prompt, unknown="skip") or [0]
        ids = torch.tensor([start], device=module.device)  # (1, T)
        drawn = generate(module.network, ids, self.max_new_tokens, self.sampling, seed=self.seed)
        return tokenizer.decode([*start, *(int(token) for (token,) in drawn)])


def as_markdown(text: str) -> str:
    """Indented by four, which TensorBoard's text tab shows as it is, line by line."""
    return "\n".join(f"    {line}" for line in text.splitlines())
