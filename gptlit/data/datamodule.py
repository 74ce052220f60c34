"""The DataModule: a text, encoded, as batches for training and validation."""

import hashlib
import sys
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from gptlit.data.chunks import EVAL_TOKENS, LossEstimate, RandomChunks, Tokens, TrainingBatches, ValidationWindows, take
from gptlit.data.corpus.load import TextSpec
from gptlit.data.encode import EncodedText, encode_text
from gptlit.errors import UserError, require
from gptlit.tokenizer import Tokenizer

BEGINNING = 500  # characters by which another version of a text is recognised


class TextDataModule(pl.LightningDataModule):
    """A text, its tokenizer and its two parts: random chunks for training, fixed windows for validation.

    Batches are a function of (seed, step), each of shape (batch_size, block_size), int64: inputs, and targets one
    further.

    Args:
        corpus: `tinyshakespeare`, `sample` (the play in the package), a file, a glob, a folder, a URL or a hub id; or
            several of these. Files may be texts, JSON, JSON Lines, CSV, TSV, Parquet and Arrow, compressed or in
            archives.
        block_size: tokens of a chunk; the command takes it from `model.gpt.block_size`.
        batch_size: chunks of the whole batch of one optimizer step, over all devices and accumulation steps.
        val_fraction: share of the text that is held out for validation.
        val_corpus: a text of its own for validation, instead of a part of `corpus`.
        fallback: `sample` trains on the packaged play when the network is out of reach. It replaces only texts that are
            named together with it: the command drops it where a later file or flag names another text without it.
        text_column: column that holds the text in tables, `data.text` for one inside of another, or a number where CSV
            has no header; conversations (lists of messages) become lines `ROLE: TEXT`.
        streaming: keep only the text of a hub data set, while it arrives, instead of downloading all of it first.
        documents: what a document is: `lines`, `blank_lines` (what stands between them), `rows` of tables, `files`, or
            the `whole` text; null takes rows of tables, files where there are several, and else the whole text.
        separator: text between documents, at which a whole text is also cut, e.g. `<|endoftext|>`. null is one line
            end between lines and one-line rows, and a blank line between all others.
        split: what is held out: `tail`, the end of the text as in the lecture, or `documents`, whole ones at random.
        tokenizer: `char`, `bpe`, or the path of a tokenizer.json.
        vocab_size: tokens of a BPE that is learned from the training part.
        eval_batch_size: windows of a validation batch on one device; null for about 16,384 tokens.
        estimate_batches: random batches for `train/loss_estimate` and `val/loss_estimate`; 0 for none.
        seed: fixes the batches; the command takes it from `seed_everything`.
        split_seed: fixes which documents `split: documents` holds out. It does not follow `seed`, so that runs with
            other seeds are validated on the same documents, and teachers with another seed were not trained on them.

    Raises:
        UserError: a value is out of range.
    """

    def __init__(
        self,
        corpus: str | list[str] = "tinyshakespeare",
        block_size: int = 64,
        batch_size: int = 16,
        val_fraction: float = 0.1,
        val_corpus: str | list[str] | None = None,
        fallback: Literal["sample"] | None = None,
        text_column: str = "text",
        streaming: bool = False,
        documents: Literal["whole", "lines", "blank_lines", "rows", "files"] | None = None,
        separator: str | None = None,
        split: Literal["tail", "documents"] = "tail",
        tokenizer: str = "char",
        vocab_size: int = 512,
        eval_batch_size: int | None = None,
        estimate_batches: int = 0,
        seed: int = 1337,
        split_seed: int = 1337,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("estimate_batches", estimate_batches, 0),
            ("block_size", block_size, 1),
        ):
            require(value is None or value >= least, name, value, f"{least} or more")
        self.text = TextSpec(
            corpus, val_corpus, val_fraction, fallback, text_column, streaming, documents, separator, split, split_seed
        )
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
        """The validation part, (M,) ids; None before `setup`."""
        return None if self.corpus is None else self.corpus.val

    def prepare_data(self) -> None:
        """Read the text and encode it, with the model's tokenizer if it has one already.

        It is encoded again for a model with other tokens than the last one.

        Raises:
            UserError: the text cannot be read, or the tokenizer does not fit it.
        """
        module = self.trainer.lightning_module if self.trainer is not None else None
        wanted: Tokenizer | None = getattr(module, "tokenizer", None)
        if self.corpus is not None and wanted in (None, self.corpus.tokenizer):
            return
        self.corpus = encode_text(self.text, wanted or self.tokenizer, self.tokenizer_kind, self.vocab_size)
        self.tokenizer = self.corpus.tokenizer

    def setup(self, stage: str | None = None) -> None:
        """Check before training that both parts are long enough.

        Raises:
            UserError: one of them is shorter than block_size + 1 tokens.
        """
        self.prepare_data()  # Lightning calls it on the first process of a machine only
        train, val = self._encoded()
        RandomChunks(train, self.block_size, self.batch_size, self.seed)
        ValidationWindows(val, self.block_size, 1)

    def fingerprint(self) -> dict[str, str | int | None]:
        """Return what identifies the corpus and its split; kept in the checkpoints trained on it."""
        if self.corpus is None:
            raise RuntimeError("the DataModule is not set up yet: call setup() first")
        return {
            "name": self.corpus.name,
            "sha256": self.corpus.sha256,
            "train_characters": self.corpus.train_characters,
            "document_start": self.corpus.document_start,
            "beginning": hashlib.sha256(self._beginning().encode()).hexdigest(),
        }

    @property
    def chars_per_train_token(self) -> float:
        """Characters of the training part per token of it: 1 for a character tokenizer."""
        return 1.0 if self.corpus is None else self.corpus.train_characters / len(self.corpus.train)

    def train_dataloader(self) -> TrainingBatches:
        """Return the batches of a run; without a Trainer all batches from step 0 on, on the CPU.

        Raises:
            UserError: the Trainer has no max_steps.
        """
        trainer = self.trainer
        if trainer is None:
            self.setup()
            train, _ = self._encoded()
            chunks = RandomChunks(train, self.block_size, self.batch_size, self.seed)
            return TrainingBatches(chunks, sys.maxsize, 1, 0, 1, done=lambda: 0)
        if trainer.max_steps < 1:
            raise UserError("is not set: the length of a run is counted in optimizer steps", "trainer.max_steps")
        chunks = RandomChunks(self._on_device()[0], self.block_size, self.batch_size, self.seed)
        return TrainingBatches(
            chunks,
            trainer.max_steps,
            trainer.accumulate_grad_batches,
            trainer.global_rank,
            trainer.world_size,
            done=lambda: trainer.global_step,
            distinct=distinct_batches(trainer),
        )

    def val_dataloader(self) -> list[Any]:
        """Return the windows of the validation part; at fit also the estimates on both parts, if asked for."""
        trainer = self.trainer
        if trainer is None:
            self.setup()
        rank, world_size = (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
        rows = self.eval_batch_size or max(1, EVAL_TOKENS // self.block_size)
        train, val = self._on_device()
        loaders: list[Any] = [ValidationWindows(val, self.block_size, rows, rank, world_size)]
        if self.estimate_batches and trainer is not None and trainer.state.fn == "fit":
            for tokens in (train, val):
                chunks = RandomChunks(tokens, self.block_size, self.batch_size, self.seed)
                loaders.append(LossEstimate(chunks, self.estimate_batches, rank, world_size))
        return loaders

    def test_dataloader(self) -> list[Any]:
        """Return the validation windows: the 90/10 split of the lecture has no third part."""
        return self.val_dataloader()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Copy a batch of a token file through pinned memory, without a wait."""
        if all(part.device == device for part in batch):
            return batch
        if device.type == "cuda":
            batch = tuple(part if part.is_cuda else part.pin_memory() for part in batch)
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def _beginning(self) -> str:
        """The first characters of the training part."""
        train, _ = self._encoded()
        assert self.tokenizer is not None
        ids = take(train, np.zeros(1, np.int64), min(BEGINNING, len(train)))
        return self.tokenizer.decode(ids[0].tolist())[:BEGINNING]

    def _encoded(self) -> tuple[Tokens, Tokens]:
        if self.corpus is None:
            raise RuntimeError("the DataModule is not set up yet: call setup() first")
        return self.corpus.train, self.corpus.val

    def _on_device(self) -> tuple[Tokens, Tokens]:
        """Both parts: ids in memory on the device of the Trainer, a token file where it is."""
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        train, val = (ids.to(device) if isinstance(ids, Tensor) else ids for ids in self._encoded())
        return train, val


def distinct_batches(trainer: pl.Trainer) -> int | None:
    """Return on how many batches `overfit_batches` trains, over and over; None without it.

    The run stays one pass over `max_steps` batches, so the limit that Lightning derives from the option is lifted.
    """
    wanted: int | float = trainer.overfit_batches  # type: ignore[attr-defined]
    if not wanted:
        return None
    trainer.limit_train_batches = 1.0
    return wanted if isinstance(wanted, int) else max(1, int(wanted * trainer.max_steps))
