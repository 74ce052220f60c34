"""The DataModule: a text, encoded, as batches to train and validate on."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from gptlit.data.chunks import EVAL_TOKENS, LossEstimate, RandomChunks, Tokens, TrainingBatches, ValidationWindows
from gptlit.data.encode import EncodedText, TextSpec, encode_text
from gptlit.errors import UserError
from gptlit.tokenizer import Tokenizer


class TextDataModule(pl.LightningDataModule):
    """A text, its tokenizer and its two parts: random chunks to train on, fixed windows to validate on.

    Args:
        corpus: `tinyshakespeare`, `sample` (the play in the package), a file, a glob, a folder, a URL or a hub id.
        block_size: tokens of a chunk; the command takes it from `model.gpt.block_size`.
        batch_size: chunks of the whole batch of one optimizer step, over all devices and accumulation steps.
        val_fraction: share of the text, at its end, that is held out for validation.
        val_corpus: a text of its own for validation, instead of the end of `corpus`.
        fallback: `sample` trains on the packaged play when the network is out of reach.
        text_column: column that holds the text, in JSONL, CSV, Parquet and hub data sets.
        streaming: keep only the text of a hub data set, while it arrives, instead of first bringing all of it here;
            what is kept is not asked for again.
        tokenizer: `char`, `bpe`, or the path of a tokenizer.json.
        vocab_size: tokens of a BPE that is learned from the training part.
        eval_batch_size: windows of a validation batch on one device; by default about 16,384 tokens.
        estimate_batches: random batches for `train/loss_estimate` and `val/loss_estimate`; 0 leaves them out.
        seed: fixes the batches; the command takes it from `seed_everything`.
    """

    def __init__(
        self,
        corpus: str | list[str] = "tinyshakespeare",
        block_size: int = 64,
        batch_size: int = 16,
        val_fraction: float = 0.1,
        val_corpus: str | list[str] | None = None,
        fallback: str | None = None,
        text_column: str = "text",
        streaming: bool = False,
        tokenizer: str = "char",
        vocab_size: int = 512,
        eval_batch_size: int | None = None,
        estimate_batches: int = 0,
        seed: int = 1337,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("estimate_batches", estimate_batches, 0),
            ("block_size", block_size, 1),
        ):
            if value is not None and value < least:
                raise UserError(f"data.{name} is {value}: it must be {least} or more")
        if not 0.0 < val_fraction < 1.0:
            raise UserError(f"data.val_fraction is {val_fraction}: it must lie between 0 and 1")
        if fallback not in (None, "sample"):
            raise UserError(f"data.fallback is {fallback!r}: it must be sample or null")
        self.text = TextSpec(corpus, val_corpus, val_fraction, fallback, text_column, streaming)
        self.tokenizer_kind, self.vocab_size = tokenizer, vocab_size
        self.block_size, self.batch_size, self.eval_batch_size = block_size, batch_size, eval_batch_size
        self.estimate_batches, self.seed = estimate_batches, seed
        self.tokenizer: Tokenizer | None = None
        self.corpus: EncodedText | None = None

    @property
    def corpus_spec(self) -> str | list[str]:
        """What the user named."""
        return self.text.corpus

    @property
    def train_tokens(self) -> Tokens | None:
        """The training part, (N,) ids; None before `setup`."""
        return None if self.corpus is None else self.corpus.train

    @property
    def val_tokens(self) -> Tokens | None:
        """The validation part, (N,) ids; None before `setup`."""
        return None if self.corpus is None else self.corpus.val

    def prepare_data(self) -> None:
        """Brings the text to this machine and encodes it, with the model's tokenizer if it has one already."""
        if self.corpus is not None:
            return
        module = self.trainer.lightning_module if self.trainer is not None else None
        given = self.tokenizer or getattr(module, "tokenizer", None)
        self.corpus = encode_text(self.text, given, self.tokenizer_kind, self.vocab_size)
        self.tokenizer = self.corpus.tokenizer

    def setup(self, stage: str | None = None) -> None:
        """Checks both parts before anything is trained."""
        self.prepare_data()  # Lightning calls it on the first process of a machine only
        RandomChunks(self._tokens(self.train_tokens), self.block_size, self.batch_size, self.seed)
        ValidationWindows(self._tokens(self.val_tokens), self.block_size, 1)

    def fingerprint(self) -> dict[str, str | int]:
        """What tells this text, and where it is split, from any other; kept in the checkpoints trained on it."""
        if self.corpus is None:
            raise RuntimeError("the DataModule is not set up yet: call setup() first")
        return {
            "name": self.corpus.name,
            "sha256": self.corpus.sha256,
            "train_characters": self.corpus.train_characters,
        }

    @property
    def chars_per_train_token(self) -> float:
        """Characters of the training part per token of it: 1 for a character tokenizer."""
        return 1.0 if self.corpus is None else self.corpus.train_characters / len(self.corpus.train)

    def train_dataloader(self) -> TrainingBatches:
        trainer = self._trainer()
        if trainer.max_steps < 1:
            raise UserError("trainer.max_steps is not set: the length of a run is counted in optimizer steps, give it")
        chunks = RandomChunks(self._on_device(self.train_tokens), self.block_size, self.batch_size, self.seed)
        return TrainingBatches(
            chunks,
            trainer.max_steps,
            trainer.accumulate_grad_batches,
            trainer.global_rank,
            trainer.world_size,
            done=lambda: trainer.global_step,
        )

    def val_dataloader(self) -> list[Any]:
        """The windows of the validation part; then, when asked for, the estimates on both parts."""
        trainer = self._trainer()
        place = (trainer.global_rank, trainer.world_size)
        rows = self.eval_batch_size or max(1, EVAL_TOKENS // self.block_size)
        val_tokens = self._on_device(self.val_tokens)
        loaders: list[Any] = [ValidationWindows(val_tokens, self.block_size, rows, *place)]
        if self.estimate_batches and trainer.state.fn == "fit":
            for tokens in (self._on_device(self.train_tokens), val_tokens):
                chunks = RandomChunks(tokens, self.block_size, self.batch_size, self.seed)
                loaders.append(LossEstimate(chunks, self.estimate_batches, *place))
        return loaders

    def test_dataloader(self) -> list[Any]:
        """The validation windows: the 90/10 split of the lecture has no third part."""
        return self.val_dataloader()

    def _trainer(self) -> pl.Trainer:
        if self.trainer is None:
            raise RuntimeError("the DataModule has no Trainer yet: hand it to Trainer.fit, validate or test")
        return self.trainer

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Batches read from a token file go through pinned memory, so that copying them does not wait."""
        if all(part.device == device for part in batch):
            return batch
        if device.type == "cuda":
            batch = tuple(part if part.is_cuda else part.pin_memory() for part in batch)
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def _on_device(self, tokens: Tokens | None) -> Tokens:
        """A text in memory lies on the device; a token file stays where it is."""
        tokens = self._tokens(tokens)
        return tokens.to(self._trainer().strategy.root_device) if isinstance(tokens, Tensor) else tokens

    def _tokens(self, tokens: Tokens | None) -> Tokens:
        if tokens is None:
            raise RuntimeError("the DataModule is not set up yet: call setup() first")
        return tokens
