"""The last queries of a layer, for scores that rank keys by them: column c lies in slot c mod size.

Not K and V, so not in `nbytes`; `size` times query heads times head size elements a row of the batch.
"""

import torch
from torch import Tensor


class RecentQueries:
    """`size` queries, grouped by KV head: `[batch, kv_head, group, size, head_dim]`; no memory before the first."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._ring: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return () if self._ring is None else (self._ring,)

    def store(self, query: Tensor, first: int) -> None:
        """Take the queries `[batch, kv_head, group, query, head_dim]` of the columns `first...`."""
        ring, new = self._room(query), query.shape[3]
        if new > self.size:
            query, first = query[:, :, :, -self.size :], first + new - self.size
        slot, new = first % self.size, min(new, self.size)
        room = min(self.size - slot, new)
        ring[:, :, :, slot : slot + room] = query[:, :, :, :room]
        if room < new:
            ring[:, :, :, : new - room] = query[:, :, :, room:]

    def store_at(self, query: Tensor, column: Tensor) -> None:
        """Take the query of one column, which only the device knows: int64 `[1]`."""
        self._room(query).index_copy_(3, column % self.size, query)

    def before(self, column: int) -> Tensor:
        """Queries of the last columns before `column`, all that are left, in order."""
        assert self._ring is not None
        count = min(self.size, column)
        at = torch.arange(column - count, column, device=self._ring.device) % self.size
        return self._ring.index_select(3, at)

    def select_rows(self, rows: Tensor) -> None:
        if self._ring is not None:
            with torch.inference_mode(False):
                self._ring = self._ring.index_select(0, rows.to(self._ring.device).clone())

    def free(self) -> None:
        self._ring = None

    def _room(self, query: Tensor) -> Tensor:
        if self._ring is None:
            shape = *query.shape[:3], self.size, query.shape[4]
            with torch.inference_mode(False):  # made in inference mode, it could be written nowhere else
                self._ring = torch.zeros(shape, dtype=query.dtype, device=query.device)
        return self._ring
