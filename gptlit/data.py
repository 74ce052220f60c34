"""From text to batches: `RandomChunks` (step number -> batch) and the DataModule around it.

A batch is a pure function of (seed, step). Exact resume, and equal batches for any number of devices or accumulation
steps, follow from that without any state to save.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from gptlit.corpus import Corpus, load_corpus
from gptlit.errors import UserError
from gptlit.tokenizer import BPETokenizer, CharTokenizer, Tokenizer

Batch = tuple[Tensor, Tensor]
IGNORED = -100  # target that cross-entropy leaves out (torch's default)
EVAL_TOKENS = 16_384  # tokens of one validation batch when no size is given: fills two cores, fits any GPU
ESTIMATE_STREAM = 1 << 62  # step numbers of the loss estimates, far from every training step


def take(tokens: Tensor | np.ndarray, spans: np.ndarray) -> Tensor:
    """Tokens at the positions `spans`, int64 and of the same shape, on the device where the tokens lie."""
    if isinstance(tokens, Tensor):
        return tokens[torch.from_numpy(spans).to(tokens.device, non_blocking=True)].long()
    return torch.from_numpy(tokens[spans].astype(np.int64))


class RandomChunks:
    """Batch `i` of random chunks of a text: `chunks[i]` is (inputs, targets), each (B, T) int64, targets shifted by one.

    The offsets come from Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), a generator
    that is itself a function of (key, counter): key = seed, counter = i.

    Args:
        tokens: (N,) integer tensor, or a NumPy array (which may be memory-mapped).
        block_size: T, tokens of one chunk.
        batch_size: B, chunks of the whole batch of a step, over all devices and accumulation steps.
        seed: any integer.

    Raises:
        UserError: when the text holds fewer than block_size + 1 tokens.
    """

    def __init__(self, tokens: Tensor | np.ndarray, block_size: int, batch_size: int, seed: int) -> None:
        if len(tokens) < block_size + 1:
            raise UserError(
                f"the training part has {len(tokens)} tokens, but a chunk of model.gpt.block_size {block_size} needs "
                f"{block_size + 1}: give a longer text, or a smaller block_size"
            )
        self.tokens = tokens
        self.block_size = block_size
        self.batch_size = batch_size
        self.seed = seed

    def offsets(self, step: int) -> np.ndarray:
        """Where the chunks of a step begin: (B,) int64, each in [0, N - block_size)."""
        philox = np.random.Philox(key=self.seed % 2**64, counter=(0, 0, step, 0))
        return (philox.random_raw(self.batch_size) % (len(self.tokens) - self.block_size)).astype(np.int64)

    def __getitem__(self, step: int) -> Batch:
        return self.rows(step, slice(None))

    def rows(self, step: int, rows: slice) -> Batch:
        """The chosen rows of batch `step`: two (rows, T) tensors, on the device of the tokens."""
        offsets = self.offsets(step)[rows]
        spans = offsets[:, None] + np.arange(self.block_size + 1)  # (rows, T + 1)
        chunk = take(self.tokens, spans)
        return chunk[:, :-1], chunk[:, 1:]


def share_of_batch(batch_size: int, accumulate: int, world_size: int) -> int:
    """How many rows of a step's batch one process gets at a time.

    Raises:
        UserError: when they do not all get the same.
    """
    parts = accumulate * world_size
    if batch_size % parts:
        raise UserError(
            f"data.batch_size {batch_size} is the whole batch of a step and cannot be cut into "
            f"{accumulate} (trainer.accumulate_grad_batches) × {world_size} (devices) equal parts: "
            f"make it a multiple of {parts}"
        )
    return batch_size // parts


class TrainingBatches:
    """The micro-batches that one process trains on, beginning at the step the run has reached.

    Step i is cut into `accumulate` micro-batches and each of these into `world_size` slices; the process of rank r
    takes slice r.
    """

    def __init__(
        self, chunks: RandomChunks, max_steps: int, accumulate: int, rank: int, world_size: int, done: Callable[[], int]
    ) -> None:
        self.chunks, self.max_steps, self.accumulate = chunks, max_steps, accumulate
        self.rank, self.world_size, self.done = rank, world_size, done
        self.micro = share_of_batch(chunks.batch_size, accumulate, world_size)

    def __len__(self) -> int:
        return self.max_steps * self.accumulate

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.done(), self.max_steps):
            for part in range(self.accumulate):
                first = (part * self.world_size + self.rank) * self.micro
                yield self.chunks.rows(step, slice(first, first + self.micro))


class ValidationWindows:
    """The whole text once, in windows of block_size that do not overlap; every token but the first is predicted once.

    Windows are (rows, T); what lies behind the end of the text has target -100 and does not count. Every process
    gets the same number of batches, the rows dealt out in turn, so that collective calls always meet.

    Raises:
        UserError: when the text holds fewer than block_size + 1 tokens.
    """

    def __init__(
        self, tokens: Tensor | np.ndarray, block_size: int, batch_size: int, rank: int = 0, world_size: int = 1
    ) -> None:
        if len(tokens) < block_size + 1:
            raise UserError(
                f"the validation part has {len(tokens)} tokens, but a window of model.gpt.block_size {block_size} "
                f"needs {block_size + 1}: give a longer text, a larger data.val_fraction, or a smaller block_size"
            )
        self.tokens, self.block_size, self.batch_size = tokens, block_size, batch_size
        self.rank, self.world_size = rank, world_size
        self.windows = -(-(len(tokens) - 1) // block_size)

    def __len__(self) -> int:
        return -(-self.windows // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[Batch]:
        stride = self.batch_size * self.world_size
        for first in range(0, self.windows, stride):
            yield self.batch(range(first + self.rank, min(first + stride, self.windows), self.world_size))

    def batch(self, windows: range) -> Batch:
        """Inputs and targets (rows, T) of the numbered windows; one row that counts nothing when there are none."""
        if not windows:
            inputs, targets = self.batch(range(1))
            return inputs, torch.full_like(targets, IGNORED)
        spans = np.array(windows)[:, None] * self.block_size + np.arange(self.block_size + 1)  # (rows, T + 1)
        last = len(self.tokens) - 1
        chunk = take(self.tokens, np.minimum(spans, last))
        inside = torch.from_numpy(spans[:, 1:] <= last).to(chunk.device)  # (rows, T)
        return chunk[:, :-1], torch.where(inside, chunk[:, 1:], IGNORED)


class LossEstimate:
    """`count` random batches of a text, the same ones every time: the lecture's `estimate_loss`."""

    def __init__(self, chunks: RandomChunks, count: int, rank: int = 0, world_size: int = 1) -> None:
        self.chunks, self.count, self.rank, self.world_size = chunks, count, rank, world_size

    def __len__(self) -> int:
        return -(-self.count // self.world_size)

    def __iter__(self) -> Iterator[Batch]:
        for first in range(0, self.count, self.world_size):
            inputs, targets = self.chunks[ESTIMATE_STREAM + min(first + self.rank, self.count - 1)]
            if first + self.rank >= self.count:
                targets = torch.full_like(targets, IGNORED)
            yield inputs, targets


def make_tokenizer(kind: str, corpus: Corpus, vocab_size: int) -> Tokenizer:
    """The tokenizer named by `data.tokenizer`: `char`, `bpe`, or the path of a tokenizer.json."""
    if kind == "char":
        return CharTokenizer.train(corpus.train + corpus.val, source=corpus.name)
    if kind == "bpe":
        return BPETokenizer.train([corpus.train], vocab_size, source=corpus.name)
    path = Path(kind)
    if not path.is_file():
        raise UserError(f"data.tokenizer is {kind!r}: it must be char, bpe, or the path of a tokenizer.json")
    return BPETokenizer.from_file(path)


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
        tokenizer: `char`, `bpe`, or the path of a tokenizer.json.
        vocab_size: symbols of a BPE tokenizer trained here.
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
        self.corpus_spec, self.val_corpus, self.val_fraction = corpus, val_corpus, val_fraction
        self.fallback, self.text_column = fallback, text_column
        self.tokenizer_kind, self.vocab_size = tokenizer, vocab_size
        self.block_size, self.batch_size, self.eval_batch_size = block_size, batch_size, eval_batch_size
        self.estimate_batches, self.seed = estimate_batches, seed
        self.tokenizer: Tokenizer | None = None
        self.corpus: Corpus | None = None
        self.train_tokens: Tensor | None = None
        self.val_tokens: Tensor | None = None

    def prepare_data(self) -> None:
        """Brings the text to this machine, once."""
        self.corpus = self.load()

    def load(self) -> Corpus:
        return load_corpus(
            self.corpus_spec,
            fallback=self.fallback,
            val=self.val_corpus,
            val_fraction=self.val_fraction,
            text_column=self.text_column,
        )

    def setup(self, stage: str | None = None) -> None:
        """Reads the text and encodes both parts, with the model's tokenizer if it has one already."""
        if self.train_tokens is not None:
            return
        self.corpus = self.corpus or self.load()
        module = self.trainer.lightning_module if self.trainer is not None else None
        self.tokenizer = (
            self.tokenizer
            or getattr(module, "tokenizer", None)
            or make_tokenizer(self.tokenizer_kind, self.corpus, self.vocab_size)
        )
        self.train_tokens = encode(self.tokenizer, self.corpus.train)
        self.val_tokens = encode(self.tokenizer, self.corpus.val)
        # Both parts are checked here, before anything is trained.
        RandomChunks(self.train_tokens, self.block_size, self.batch_size, self.seed)
        ValidationWindows(self.val_tokens, self.block_size, 1)

    def fingerprint(self) -> dict[str, str | int]:
        """What tells this text, and where it is split, from any other; kept in the checkpoints trained on it."""
        if self.corpus is None:
            raise RuntimeError("the DataModule is not set up yet: call setup() first")
        return {"name": self.corpus.name, "sha256": self.corpus.sha256, "train_characters": len(self.corpus.train)}

    @property
    def chars_per_train_token(self) -> float:
        """Characters of the training part per token of it: 1 for a character tokenizer."""
        if self.corpus is None or self.train_tokens is None:
            return 1.0
        return len(self.corpus.train) / len(self.train_tokens)

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
        """The windows of the validation part, then, when asked for, the estimates on the training and validation part."""
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

    def _on_device(self, tokens: Tensor | None) -> Tensor:
        if tokens is None:
            raise RuntimeError("the DataModule is not set up yet: call setup() first")
        return tokens.to(self._trainer().strategy.root_device)


def encode(tokenizer: Tokenizer, text: str) -> Tensor:
    """Token ids (N,) int32 of a text."""
    return torch.from_numpy(np.asarray(tokenizer.encode_array(text)).astype(np.int32))
