"""Key-value cache. Shapes as in `gptlit.model.gpt`."""

import torch
from torch import Tensor

from gptlit.model.config import GPTConfig


class KVCache:
    """Keys and values of the positions already read, so that a new token costs one position instead of T.

    The caller creates it and passes it to `GPT.forward`, which fills it; the model has no state. Rows may have prompts
    of different lengths: prefill them padded on the right, then call `truncate` with their true lengths.

    Args:
        config: architecture of the model.
        batch_size: B, the number of rows.
        device: of the model.
        dtype: of the model.
        capacity: positions that fit; at most, and by default, `block_size`.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        capacity: int | None = None,
    ) -> None:
        self.capacity = config.block_size if capacity is None else min(capacity, config.block_size)
        self.batch_size = batch_size
        shape = (2, config.n_layer, batch_size, config.n_head, self.capacity, config.head_dim)
        self.both = torch.empty(shape, device=device, dtype=dtype)
        # Not `unbind`: autograd forbids in-place writes to its views.
        self.keys, self.values = self.both[0], self.both[1]  # (n_layer, B, H, T, D) each
        # Inputs of the MLPs for token shift: position p in row token_shift + p, after rows of zeros.
        earlier = (config.n_layer, batch_size, config.token_shift + self.capacity, config.shifted_channels)
        self.earlier = torch.zeros(earlier, device=device, dtype=dtype) if config.token_shift else None
        self.length = 0  # positions filled in the longest row
        self.row_lengths: Tensor | None = None  # (B,), only when rows differ in length
        self._slots: tuple[Tensor, Tensor] | None = None  # where the next tokens go, the same in every layer

    def truncate(self, row_lengths: Tensor) -> None:
        """Set how many positions of each row are valid, (B,) int64; later tokens overwrite the rest."""
        longest = int(row_lengths.max())
        if longest > self.length:
            raise ValueError(f"a row cannot have {longest} positions: the cache holds {self.length}")
        self.length = longest
        self.row_lengths = None if bool((row_lengths == longest).all()) else row_lengths.clone()
        if self.row_lengths is not None:
            # Positions after a row's end get the weight 0; but 0 times uninitialised memory may be NaN.
            self.keys[:, :, :, longest:] = self.values[:, :, :, longest:] = 0

    def clear(self) -> None:
        """Remove all positions of all rows."""
        self.length, self.row_lengths, self._slots = 0, None, None

    def expand(self, rows: Tensor) -> "KVCache":
        """Return a cache whose row i is a copy of row `rows[i]` of this one: one prefilled prompt, many samples."""
        copy = object.__new__(KVCache)
        copy.batch_size, copy.capacity, copy.length, copy._slots = len(rows), self.capacity, self.length, None
        copy.both = self.both.new_empty((*self.both.shape[:2], len(rows), *self.both.shape[3:]))
        copy.both[:, :, :, :, : self.length] = self.both[:, :, rows, :, : self.length]
        copy.keys, copy.values = copy.both[0], copy.both[1]
        copy.earlier = None if self.earlier is None else self.earlier[:, rows]
        copy.row_lengths = None
        if self.row_lengths is not None:
            copy.truncate(self.row_lengths[rows])
        return copy

    def replace(self, rows: Tensor, other: "KVCache") -> None:
        """Overwrite row `rows[i]` (int64) with row i of `other`, which may hold fewer positions."""
        held = other.length
        self.keys[:, rows, :, :held] = other.keys[:, :, :, :held]
        self.values[:, rows, :, :held] = other.values[:, :, :, :held]
        if self.earlier is not None and other.earlier is not None:
            self.earlier[:, rows, : other.earlier.size(2)] = other.earlier
        row_lengths = self.row_lengths
        if row_lengths is None:
            row_lengths = torch.full((self.batch_size,), self.length, device=rows.device)
        row_lengths[rows] = held if other.row_lengths is None else other.row_lengths
        self.length = max(self.length, held)
        self.truncate(row_lengths)

    def positions(self, new: int, device: torch.device) -> Tensor:
        """Return the positions of the next `new` tokens: (new,), or (B, new) if rows differ in length."""
        if self.row_lengths is None:
            return torch.arange(self.length, self.length + new, device=device)
        # For one token no operation is needed; each one counts for sampling.
        return self.row_lengths[:, None] if new == 1 else self.row_lengths[:, None] + torch.arange(new, device=device)

    def mask(self, new: int, device: torch.device) -> Tensor | None:
        """Return the mask of the next `new` queries, broadcastable to (B, H, new, length + new); None if not needed.

        Not needed at position 0. After it `is_causal=True` is wrong: it aligns queries with the first keys.
        """
        if self.row_lengths is None:
            if new == 1 or self.length == 0:
                return None
            columns = torch.arange(self.length + new, device=device)
            return columns[None, :] <= self.positions(new, device)[:, None]  # (new, length + new)
        columns = torch.arange(self.length + new, device=device)
        return (columns[None, None, :] <= self.positions(new, device)[:, :, None])[:, None]  # (B, 1, new, length + new)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v (B, H, new, D) to a layer; return all of its keys and values (B, H, length + new, D)."""
        keys, values, new = self.keys[layer], self.values[layer], k.size(2)
        end = self.length + new
        if end > self.capacity:
            raise ValueError(f"the cache has capacity {self.capacity}, but {end} positions are needed")
        if self.row_lengths is None:
            keys.narrow(2, self.length, new).copy_(k)
            values.narrow(2, self.length, new).copy_(v)
        else:
            if self._slots is None:
                rows = torch.arange(self.batch_size, device=k.device)[:, None]
                self._slots = rows, self.positions(new, k.device)  # (B, 1), (B, new)
            rows, columns = self._slots
            keys[rows, :, columns] = k.transpose(1, 2)
            values[rows, :, columns] = v.transpose(1, 2)
        return keys.narrow(2, 0, end), values.narrow(2, 0, end)

    def remember(self, layer: int, x: Tensor) -> Tensor:
        """Append x (B, new, S), inputs of an MLP; return it with the `reach` positions before it, (B, reach + new, S).

        S is the number of shifted channels, and `reach` the model's `token_shift`.
        """
        assert self.earlier is not None
        kept, new = self.earlier[layer], x.size(1)  # (B, reach + capacity, S)
        reach = kept.size(1) - self.capacity
        if self.row_lengths is None:
            kept.narrow(1, reach + self.length, new).copy_(x)
            return kept.narrow(1, self.length, reach + new)
        rows = torch.arange(self.batch_size, device=x.device)[:, None]
        columns = self.row_lengths[:, None] + torch.arange(reach + new, device=x.device)  # (B, reach + new)
        kept[rows, columns[:, reach:]] = x
        return kept[rows, columns]

    def advance(self, new: int) -> None:
        """Count `new` more positions as filled."""
        self.length += new
        self._slots = None
        if self.row_lengths is not None:
            self.row_lengths += new
