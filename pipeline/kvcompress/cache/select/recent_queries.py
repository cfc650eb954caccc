"""The last queries of a layer, for scores that rank keys by them: column c lies in slot c mod size.

Not part of `nbytes`, which counts K and V.
"""

import torch
from torch import Tensor

from kvcompress.cache.storage import take_rows, writable_zeros


class RecentQueries:
    """Ring of `size` queries, `[batch, kv_head, group, size, head_dim]`; no memory before the first."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._ring: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return () if self._ring is None else (self._ring,)

    def store(self, query: Tensor, first: int) -> None:
        """Store the queries `[batch, kv_head, group, query, head_dim]` of the columns `first...`."""
        ring, new = self._room(query), query.shape[3]
        if new > self.size:
            query, first = query[:, :, :, -self.size :], first + new - self.size
        slot, new = first % self.size, min(new, self.size)
        room = min(self.size - slot, new)
        ring[:, :, :, slot : slot + room] = query[:, :, :, :room]
        if room < new:
            ring[:, :, :, : new - room] = query[:, :, :, room:]

    def store_at(self, query: Tensor, column: Tensor) -> None:
        """Store the query of one column whose number is on the device, int64 `[1]`."""
        self._room(query).index_copy_(3, column % self.size, query)

    def before(self, column: int) -> Tensor:
        """Return the stored queries of the columns before `column`, in order."""
        assert self._ring is not None
        count = min(self.size, column)
        at = torch.arange(column - count, column, device=self._ring.device) % self.size
        return self._ring.index_select(3, at)

    def select_rows(self, rows: Tensor) -> None:
        """Replace the batch by the rows at indices `rows`, `[new batch]`."""
        if self._ring is not None:
            self._ring = take_rows(self._ring, rows)

    def free(self) -> None:
        self._ring = None

    def _room(self, query: Tensor) -> Tensor:
        if self._ring is None:
            batch, heads, group, _, size = query.shape
            self._ring = writable_zeros(batch, heads, group, self.size, size, like=query)
        return self._ring
