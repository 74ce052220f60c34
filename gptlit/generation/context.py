"""Reading while writing: what generation remembers of each row, and how a row goes on once its window is full.

Shapes: B rows (one for each sample of each prompt), P prompts, T positions, and V symbols.
"""

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gptlit.generation.engine.cpu_step import FEW_ROWS, CpuStep
from gptlit.generation.engine.cuda_step import RECORDING_PAYS_FROM, CudaGraphStep, CudaGraphWindow
from gptlit.generation.engine.decoder import Decoder
from gptlit.model.gpt import GPT
from gptlit.model.kv_cache import KVCache

Step = Callable[[Tensor, KVCache], Tensor]  # ids (B,), and the cache they go into; logits (B, V)


class DecodingContext:
    """What generation remembers: the newest ids of B rows, and the cache behind them.

    The prompts are read once, and shared by `num_samples` rows each. `logits` (B, V) follow them. A row whose window
    of `block_size` ids is full goes on as `gptlit.generation.generate.generate` says of its `context`.
    """

    def __init__(
        self, model: GPT, prompts: Sequence[Sequence[int]], num_samples: int, max_new_tokens: int, rolling: bool
    ) -> None:
        self.block_size = model.config.block_size
        self.rolling = rolling
        lengths = [min(len(prompt), self.block_size) for prompt in prompts]
        longest = max(lengths)
        capacity = longest + max_new_tokens - 1  # the last id drawn is never read
        beyond = max(capacity - self.block_size, 0)  # ids drawn when the longest row is full
        self.half = max(self.block_size // 2, 1)  # ids that are seen when a full row has begun anew
        B = len(prompts) * num_samples
        tokens = 1  # of each row, that the weights are laid out to be read for
        if beyond and not rolling:
            tokens = self.block_size
        elif beyond and B > FEW_ROWS:  # of fewer rows, what halves of the window gain by it is lost in between
            tokens = self.half
        self.decoder = Decoder(model, rows=B * tokens)
        self.step: Step = self.decoder.step
        if CpuStep.serves(self.decoder):
            self.step = CpuStep(self.decoder, B)
        elif self.records((capacity if rolling else min(capacity, self.block_size)) - longest):
            self.step = CudaGraphStep(self.decoder, B)
        self.reread: CudaGraphWindow | None = None
        self.may_reread = not rolling and self.records(min(lengths) + max_new_tokens - 1 - self.block_size)
        device = self.decoder.tokens.device
        window = torch.zeros(len(prompts), longest, dtype=torch.long)  # (P, T), aligned at the right
        for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            window[row, longest - length :] = torch.tensor(prompt[-length:])
        window = window.to(device)
        rows = torch.arange(len(prompts), device=device).repeat_interleave(num_samples)  # (B,)

        cache = self.decoder.new_cache(len(prompts), capacity)
        self.logits = self.decoder(*aligned_left(window, lengths), cache=cache)[rows]  # (B, V)
        self.cache: KVCache | None = cache if num_samples == 1 else cache.expand(rows)
        self.lengths = [lengths[row] for row in rows.tolist()]  # ids in each row's window
        self.newest = deque(window[rows].unbind(1), maxlen=self.block_size)  # (B,) each

    def records(self, ids: int) -> bool:
        """Whether so many ids, all read alike, are better read by a recording."""
        return ids >= RECORDING_PAYS_FROM and CudaGraphStep.serves(self.decoder)

    def read(self, ids: Tensor) -> Tensor:
        """Logits (B, V) of what follows one more id of each row (B,); they may be overwritten by the next call."""
        if self.reread is not None:
            return self.reread(ids)
        self.newest.append(ids)
        full = [row for row, length in enumerate(self.lengths) if length == self.block_size]
        if full and not self.rolling:
            self.cache, self.step = None, self.decoder.step  # rows never get shorter, so their memory may go
        elif self.cache is not None and len(full) == len(self.lengths):
            self.cache.clear()
            self.lengths = [self.half] * len(full)
            return self.decoder(self.window(self.half), cache=self.cache)
        elif full and self.cache is not None:
            self.roll(self.cache, full)
        self.lengths = [min(length + 1, self.block_size) for length in self.lengths]
        if self.cache is not None:
            return self.step(ids, self.cache)
        window, lengths = aligned_left(self.window(max(self.lengths)), self.lengths)
        if self.may_reread and min(self.lengths) == self.block_size:
            self.reread = CudaGraphWindow(self.decoder, window)
        return self.decoder(window, lengths)

    def roll(self, cache: KVCache, full: list[int]) -> None:
        """Leaves the newest half of the window, without the id that is read next, in the cache of the `full` rows."""
        rows = torch.tensor(full, device=self.decoder.tokens.device)
        kept = self.decoder.new_cache(len(full), self.half - 1)
        if self.half > 1:
            self.decoder(self.window(self.half)[rows, :-1], cache=kept)
        cache.replace(rows, kept)
        for row in full:
            self.lengths[row] = self.half - 1

    def window(self, size: int) -> Tensor:
        """The newest `size` ids of each row, (B, size)."""
        return torch.stack(list(self.newest)[-size:], 1)


def aligned_left(window: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Moves the last `lengths[i]` ids of each row of a window (B, T) to its beginning; the lengths, if they differ."""
    T = window.size(1)
    if min(lengths) == T:
        return window, None
    kept = torch.tensor(lengths, device=window.device)  # (B,)
    columns = torch.arange(T, device=window.device) + (T - kept)[:, None]  # (B, T)
    return window.gather(1, columns.clamp(max=T - 1)), kept
