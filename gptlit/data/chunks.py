"""From tokens to batches: `RandomChunks` (step -> batch), the windows of validation, and the loss estimates.

A batch is a pure function of (seed, step). Exact resume, and equal batches for any number of devices or accumulation
steps, follow from that without any state to save.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from gptlit.data.tokens import StoredTokens
from gptlit.errors import UserError, counted

Tokens = Tensor | np.ndarray | StoredTokens
Batch = tuple[Tensor, Tensor]
IGNORED = -100  # target that cross-entropy leaves out (torch's default)
EVAL_TOKENS = 16_384  # tokens of one validation batch when no size is given: fills two cores, fits any GPU
ESTIMATE_STREAM = 1 << 62  # step numbers of the loss estimates, apart from those of training


def take(tokens: Tokens, starts: np.ndarray, length: int) -> Tensor:
    """Read `length` tokens from each start on; positions past the end repeat the last token.

    Args:
        tokens: (N,) ids.
        starts: (rows,) int64.
        length: tokens of each row.

    Returns:
        (rows, length) int64, on the device of the tokens.
    """
    last = len(tokens) - 1
    if isinstance(tokens, Tensor):
        # Only the starts are copied: so few bytes reach a GPU without a synchronisation.
        on_device = torch.from_numpy(starts).to(tokens.device, non_blocking=True)
        spans = on_device[:, None] + torch.arange(length, device=tokens.device)
        return tokens[spans.clamp_(max=last)].long()
    return torch.from_numpy(tokens[np.minimum(starts[:, None] + np.arange(length), last)].astype(np.int64))


class RandomChunks:
    """Random chunks of a text: `chunks[i]` is batch i, (inputs, targets), each (B, T) int64, targets one further.

    The offsets come from Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), a generator
    that is a function of (key, counter): key = seed, counter = i.

    Args:
        tokens: (N,) integer tensor, or a NumPy array (which may be memory-mapped).
        block_size: T, tokens of one chunk.
        batch_size: B, chunks of the whole batch of a step, over all devices and accumulation steps.
        seed: any integer.

    Raises:
        UserError: the text holds fewer than block_size + 1 tokens.
    """

    def __init__(self, tokens: Tokens, block_size: int, batch_size: int, seed: int) -> None:
        if len(tokens) < block_size + 1:
            raise UserError(
                f"the training part has {counted(len(tokens), 'token')}, but a chunk of block_size {block_size} needs "
                f"{block_size + 1}: give a longer text, or a smaller model.gpt.block_size"
            )
        self.tokens = tokens
        self.block_size = block_size
        self.batch_size = batch_size
        self.seed = seed

    def offsets(self, step: int) -> np.ndarray:
        """Return where the chunks of a step begin: (B,) int64, each in [0, N - block_size)."""
        philox = np.random.Philox(key=self.seed % 2**64, counter=(0, 0, step, 0))
        return (philox.random_raw(self.batch_size) % (len(self.tokens) - self.block_size)).astype(np.int64)

    def __getitem__(self, step: int) -> Batch:
        return self.rows(step, slice(None))

    def rows(self, step: int, rows: slice) -> Batch:
        """Return some rows of batch `step`: inputs and targets, (rows, T) each, on the device of the tokens."""
        offsets = self.offsets(step)[rows]
        chunk = take(self.tokens, offsets, self.block_size + 1)  # (rows, T + 1)
        return chunk[:, :-1], chunk[:, 1:]


def share_of_batch(batch_size: int, accumulate: int, world_size: int) -> int:
    """Return how many rows of a step's batch one process gets at a time.

    Args:
        batch_size: rows of the whole batch.
        accumulate: micro-batches of a step.
        world_size: number of processes.

    Raises:
        UserError: the parts would not be equal.
    """
    parts = accumulate * world_size
    if batch_size % parts:
        raise UserError(
            f"is {batch_size}, the whole batch of a step, which cannot be cut into {accumulate} "
            f"(trainer.accumulate_grad_batches) × {world_size} (devices) equal parts: make it a multiple of {parts}",
            "batch_size",
        )
    return batch_size // parts


class TrainingBatches:
    """The micro-batches of one process, from the step that the run has reached on.

    Step i is cut into `accumulate` micro-batches and each of these into `world_size` slices; rank r takes slice r.

    Args:
        chunks: batches by step.
        max_steps: number of steps of the run.
        accumulate: micro-batches of a step.
        rank: of this process.
        world_size: number of processes.
        done: returns the number of steps made.

    Raises:
        UserError: the batch cannot be cut into equal parts.
    """

    def __init__(
        self,
        chunks: RandomChunks,
        max_steps: int,
        accumulate: int,
        rank: int,
        world_size: int,
        done: Callable[[], int],
        distinct: int | None = None,
    ) -> None:
        self.chunks, self.max_steps, self.accumulate = chunks, max_steps, accumulate
        self.rank, self.world_size, self.done = rank, world_size, done
        self.distinct = distinct  # only so many batches, over and over
        self.micro = share_of_batch(chunks.batch_size, accumulate, world_size)

    def __len__(self) -> int:
        return self.max_steps * self.accumulate

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.done(), self.max_steps):
            for part in range(self.accumulate):
                first = (part * self.world_size + self.rank) * self.micro
                yield self.chunks.rows(step % (self.distinct or self.max_steps), slice(first, first + self.micro))


class ValidationWindows:
    """The whole text once, in windows that do not overlap: every token but the first is predicted exactly once.

    Windows are (rows, T); targets past the end of the text are -100 and do not count. Window i belongs to rank
    i mod world_size, and every rank gets the same number of batches, as collective calls require.

    Args:
        tokens: (N,) ids.
        block_size: T, tokens of a window.
        batch_size: windows of a batch of one process.
        rank: of this process.
        world_size: number of processes.

    Raises:
        UserError: the text holds fewer than block_size + 1 tokens.
    """

    def __init__(self, tokens: Tokens, block_size: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        if len(tokens) < block_size + 1:
            raise UserError(
                f"the validation part has {counted(len(tokens), 'token')}, but a window of block_size {block_size} "
                f"needs {block_size + 1}: give a longer text, a larger data.val_fraction, or a smaller "
                "model.gpt.block_size"
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
        """Return inputs and targets, (rows, T) each, of numbered windows; of none one row without counted targets."""
        if not windows:
            inputs, targets = self.batch(range(1))
            return inputs, torch.full_like(targets, IGNORED)
        starts = np.array(windows, dtype=np.int64) * self.block_size
        chunk = take(self.tokens, starts, self.block_size + 1)  # (rows, T + 1)
        targets = chunk[:, 1:]
        missing = int(starts[-1]) + self.block_size + 1 - len(self.tokens)  # only the last window can be incomplete
        if missing > 0:
            targets = targets.clone()
            targets[-1, -missing:] = IGNORED
        return chunk[:, :-1], targets


class LossEstimate:
    """Random batches of a text, the same every time: the lecture's `estimate_loss`.

    Args:
        chunks: batches by number.
        count: batches over all processes.
        rank: of this process.
        world_size: number of processes.
    """

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
