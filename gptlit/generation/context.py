"""The context of the rows that are being generated: their newest ids, and the key-value cache.

Shapes: B rows (one for each sample of each prompt), P prompts, T positions, V tokens.
"""

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from gptlit.generation.engine.choose import Window, make_step, make_window
from gptlit.generation.engine.decoder import Decoder
from gptlit.generation.engine.small_weights import WeightsDtype
from gptlit.model.gpt import GPT
from gptlit.model.kv_cache import KVCache

FEW_ROWS = 4  # reading half a window again now and then does not pay for weights laid out for it


class DecodingContext:
    """The newest ids of B rows, and the cache of the positions before them.

    Every prompt is read once and shared by its `num_samples` rows. What happens to a row that is longer than
    `block_size` is the `context` of `gptlit.generation.generate.generate`.

    Args:
        model: the model.
        prompts: ids of P prompts, of any lengths above 0; the last `block_size` ids of each are read.
        num_samples: rows per prompt.
        max_new_tokens: ids that will be generated for each row.
        rolling: `context="rolling"`, otherwise `exact`.
        weights_dtype: type of the large weight matrices; None for that of the model.
    """

    def __init__(
        self,
        model: GPT,
        prompts: Sequence[Sequence[int]],
        num_samples: int,
        max_new_tokens: int,
        rolling: bool,
        weights_dtype: WeightsDtype | None = None,
    ) -> None:
        self.block_size, self.rolling = model.config.block_size, rolling
        self.half = max(self.block_size // 2, 1)  # ids that remain in view after a rolling row has started again
        lengths = [min(len(prompt), self.block_size) for prompt in prompts]
        longest, B = max(lengths), len(prompts) * num_samples
        last = max_new_tokens - 1  # the last id is generated but never read
        self.ids_after_all_are_full = min(lengths) + last - self.block_size
        self.decoder = Decoder(model, B * self.positions_at_once(longest + last, B), weights_dtype)
        through_cache = longest + last if rolling else min(longest + last, self.block_size)
        self.step = make_step(self.decoder, B, ids_to_come=through_cache - longest)
        self.full_window: Window | None = None
        device = self.decoder.device
        window = torch.zeros(len(prompts), longest, dtype=torch.long)  # (P, T), padded on the left
        for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            window[row, longest - length :] = torch.tensor(prompt[-length:])
        window = window.to(device)
        rows = torch.arange(len(prompts), device=device).repeat_interleave(num_samples)  # (B,)

        cache = self.decoder.new_cache(len(prompts), longest + last)
        self.logits = self.decoder(*padded_right(window, lengths), cache=cache)[rows]  # (B, V) after the prompts
        self.cache: KVCache | None = cache if num_samples == 1 else cache.expand(rows)
        self.lengths = [lengths[row] for row in rows.tolist()]  # ids in each row's window
        self.newest = deque(window[rows].unbind(1), maxlen=self.block_size)  # (B,) each

    def positions_at_once(self, longest: int, rows: int) -> int:
        """Return how many positions of a row most matmuls will read, for texts of up to `longest` ids."""
        if longest <= self.block_size:
            return 1
        if not self.rolling:
            return self.block_size
        return self.half if rows > FEW_ROWS else 1

    def read(self, ids: Tensor) -> Tensor:
        """Append one id to each row (B,) and return the logits (B, V) of the next; the next call may overwrite them."""
        if self.full_window is not None:
            return self.full_window(ids)
        self.newest.append(ids)
        full = [row for row, length in enumerate(self.lengths) if length == self.block_size]
        if full and not self.rolling:
            self.cache = None  # rows never get shorter again
        elif self.cache is not None and len(full) == len(self.lengths):
            self.cache.clear()
            self.lengths = [self.half] * len(full)
            return self.decoder(self.window(self.half), cache=self.cache)
        elif full and self.cache is not None:
            self.roll(self.cache, full)
        self.lengths = [min(length + 1, self.block_size) for length in self.lengths]
        if self.cache is not None:
            return self.step(ids, self.cache)
        window, lengths = padded_right(self.window(max(self.lengths)), self.lengths)
        if min(self.lengths) == self.block_size:
            self.step = self.decoder.step  # its memory is not needed any more
            self.full_window = make_window(self.decoder, window, self.ids_after_all_are_full)
        return self.decoder(window, lengths)

    def roll(self, cache: KVCache, full: list[int]) -> None:
        """Keep the newest half of the window of the `full` rows in the cache, without the id that is read next."""
        rows = torch.tensor(full, device=self.decoder.device)
        kept = self.decoder.new_cache(len(full), self.half - 1)
        if self.half > 1:
            self.decoder(self.window(self.half)[rows, :-1], cache=kept)
        cache.replace(rows, kept)
        for row in full:
            self.lengths[row] = self.half - 1

    def window(self, size: int) -> Tensor:
        """Return the newest `size` ids of each row, (B, size)."""
        return torch.stack(list(self.newest)[-size:], 1)


def padded_right(window: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Move the last `lengths[i]` ids of each row of a window (B, T) to its start.

    Returns:
        The window, padded on the right with the last ids, and the lengths (B,), or None if all are T.
    """
    T = window.size(1)
    if min(lengths) == T:
        return window, None
    kept = torch.tensor(lengths, device=window.device)  # (B,)
    columns = torch.arange(T, device=window.device) + (T - kept)[:, None]  # (B, T)
    return window.gather(1, columns.clamp(max=T - 1)), kept
