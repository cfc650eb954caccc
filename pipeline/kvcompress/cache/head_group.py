"""KV heads of one layer with the same retention: one dense block, written in place.

Keys are cached after rotation, so their order does not matter to attention. A bounded head is `sinks` slots that never
move and a ring of `window` slots. Column c of the text lies in slot c while the block fills, and from then on in slot
s + (c - s) mod w, where it replaces the column that leaves the window. An unbounded head is a row of slots that grows.

Padding: a *column* counts padded tokens, a *position* real ones. All rows share the ring's slots, because the last w
columns are the same for all rows; only the sinks lie in other columns in each row. A column that is a row's sink also
lies in the ring until it leaves the window. `positions` reports this second copy, and pads, as -1.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from kvcompress.cache.padding import Padding
from kvcompress.cache.storage import Block, Meter, allocated_slots, storage_bytes
from kvcompress.core.errors import CacheUseError
from kvcompress.core.retention import Retention

RECORDED = 512  # most columns that can be taken back: the record must not grow in decoding without a crop


@dataclass
class Overwritten:
    """Former contents of the ring slots of columns `start...`, one slot a column."""

    start: int
    block: Block


class HeadGroup:
    """Storage of the KV heads `heads`, all with `retention`; `seen` counts columns.

    With `recording`, overwritten ring slots are kept until the next `crop`.
    """

    def __init__(self, retention: Retention, heads: Iterable[int], meter: Meter) -> None:
        self.retention, self.heads = retention, list(heads)
        self.capacity = retention.capacity
        self.block = Block(meter)
        self.seen = 0
        self.recording = False
        self._log: list[Overwritten] = []
        adjacent = all(after == before + 1 for before, after in pairwise(self.heads))
        # A slice for adjacent heads, so that indexing copies nothing.
        self._index: slice | Tensor = slice(self.heads[0], self.heads[-1] + 1) if adjacent else torch.tensor(self.heads)

    def index(self, device: torch.device) -> slice | Tensor:
        """Return the index that takes this group's heads out of a layer's tensor `[batch, kv_head, ...]`."""
        if isinstance(self._index, Tensor) and self._index.device != device:
            self._index = self._index.to(device, non_blocking=True)
        return self._index

    @property
    def filled(self) -> int:
        """Slots in use."""
        return self.retention.held(self.seen)

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor of K and V that this group keeps alive."""
        return storage_bytes(self.block.tensors) + sum(storage_bytes(entry.block.tensors) for entry in self._log)

    def read(self) -> tuple[Tensor, Tensor]:
        """Return K and V of the slots in use, `[batch, head, slot, head_dim]`."""
        return self.block.read(self.filled)

    def append(self, keys: Tensor, values: Tensor, padding: Padding) -> None:
        """Store the next columns, `[batch, head, column, head_dim]`; a bounded head evicts what leaves its window."""
        new = keys.shape[2]
        sinks, window = self.retention[:2]
        if self.recording and self.capacity is not None and new > window:
            # One write must not use a ring slot twice, or the record would miss the contents in between.
            for begin in range(0, new, window):
                piece = slice(begin, begin + window)
                self.append(keys[:, :, piece], values[:, :, piece], padding)
            return
        if self._log and not self.recording:
            self._forget_log()
        start, end = self.seen, self.seen + new
        self._reserve(end, keys, values)
        self.seen = end
        if self.capacity is None:
            self.block.write(start, keys, values)
            return
        if start < sinks + padding.longest:
            self._write_sinks(start, keys, values, padding)
        first = max(start, sinks, end - window)
        if first >= end:
            return
        if first > start:
            keys, values = keys[:, :, first - start :], values[:, :, first - start :]
        if self.recording and end > self.capacity:
            columns = range(max(first, self.capacity), end)
            self._log.append(Overwritten(columns.start, self.block.take([self._slot(column) for column in columns])))
            while end - self._log[0].start - self._log[0].block.slots > RECORDED:
                self._log.pop(0).block.free()
        slot = self._slot(first)
        room = sinks + window - slot
        if end - first <= room:
            self.block.write(slot, keys, values)
        else:
            self.block.write(slot, keys[:, :, :room], values[:, :, :room])
            self.block.write(sinks, keys[:, :, room:], values[:, :, room:])

    def takes_one_slot(self, padding: Padding) -> bool:
        """Return whether the next column goes to one slot, the same in every row, with nothing to record."""
        if self.recording:
            return False
        return self.capacity is None or not padding.longest or self.seen >= self.retention.sinks + padding.longest

    def make_room(self, keys: Tensor, values: Tensor) -> None:
        """Count one more column, like these, without storing it; requires `takes_one_slot`. The caller stores it."""
        self._reserve(self.seen + 1, keys, values)
        self.count()

    def count(self, columns: int = 1) -> None:
        """Count columns that the caller stores, or has stored, in slots that exist already."""
        self._forget_log()
        self.seen += columns

    def reserve(self, columns: int) -> None:
        """Allocate slots for `columns` columns in all, so that the block does not move until then."""
        slots = self.retention.held(columns)
        if self.block.tensors and slots > self.block.slots:
            self.block.reserve(slots, *self.block.tensors)

    def replace(self, keys: Tensor, values: Tensor, spare: int) -> None:
        """Replace the contents of an unbounded group; the block is kept if at most `spare` slots too large."""
        slots = allocated_slots(self.retention, keys.shape[2])
        if self.block.slots > slots + spare:
            self.block.free()
            self.block.reserve(slots, keys, values)
        self.block.write(0, keys, values)
        self.seen = keys.shape[2]

    def columns(self, device: torch.device) -> Tensor:
        """Return the column in each slot in use, `[slot]`, for rows without padding."""
        slots = torch.arange(self.filled, device=device)
        if self.capacity is None:
            return slots
        sinks, window = self.retention[:2]
        last = self.seen - 1
        return torch.where(slots < sinks, slots, last - (last - slots) % window)

    def positions(self, padding: Padding, device: torch.device) -> Tensor:
        """Return the real position in each slot in use, `[batch or 1, slot]`; -1 for pads and second copies."""
        sinks, columns, pads = self.retention.sinks, self.columns(device), padding.on(device)
        if pads is None:
            return columns[None]
        slots, positions = torch.arange(len(columns), device=device), columns - pads
        if self.capacity is None:
            return torch.where(positions >= 0, positions, -1)
        ring = torch.where(positions >= sinks, positions, -1)
        return torch.where(slots < sinks, torch.where(slots + pads < self.seen, slots, -1), ring)

    def held_positions(self, row: int, padding: Padding) -> list[list[int]]:
        """Return the real positions that each head holds in one row of the batch, ascending, `[head][...]`."""
        at = self.positions(padding, torch.device("cpu"))
        of_row = at[row if at.shape[0] > 1 else 0]
        return [sorted(of_row[of_row >= 0].tolist())] * len(self.heads)

    def needs_mask(self, padding: Padding) -> bool:
        """Return whether some slot in use is a pad or a second copy in some row."""
        if not padding.longest:
            return False
        return self.capacity is None or self.seen < self.capacity + padding.longest

    def can_crop(self, tokens: int) -> bool:
        """Return whether the last `tokens` columns can be taken back exactly."""
        if self.capacity is None or self.seen <= self.capacity:
            return True
        recorded_from = self._log[0].start if self._log else self.seen
        return max(self.seen - tokens, self.capacity) >= recorded_from

    def crop(self, tokens: int) -> None:
        """Take back the last `tokens` columns and drop the record of what they overwrote."""
        if not self.can_crop(tokens):
            raise CacheUseError(f"a KV head with {self.capacity} slots cannot take back {tokens} tokens")
        target = self.seen - tokens
        for entry in reversed(self._log):
            # The slots of one entry are distinct and later entries are undone first, so the oldest contents remain.
            keys, values = entry.block.read(entry.block.slots)
            for column in range(max(entry.start, target), entry.start + entry.block.slots):
                at = column - entry.start
                self.block.write(self._slot(column), keys[:, :, at : at + 1], values[:, :, at : at + 1])
        self.seen = target
        self._forget_log()

    def reset(self) -> None:
        """Drop the contents and free the storage."""
        self._forget_log()
        self.block.free()
        self.seen = 0

    def select_rows(self, rows: Tensor) -> None:
        """Replace the batch by the rows at indices `rows`, `[new batch]`."""
        for block in (self.block, *(entry.block for entry in self._log)):
            block.select_rows(rows)

    def _reserve(self, columns: int, keys: Tensor, values: Tensor) -> None:
        if columns > self.block.slots != self.capacity:
            self.block.reserve(allocated_slots(self.retention, columns), keys, values)

    def _slot(self, column: int) -> int:
        sinks, window = self.retention[:2]
        return column if column < sinks else sinks + (column - sinks) % window

    def _write_sinks(self, start: int, keys: Tensor, values: Tensor, padding: Padding) -> None:
        count, new = min(self.retention.sinks, self.block.slots), keys.shape[2]
        pads = padding.on(keys.device)
        if pads is None:
            count = min(count - start, new)
            self.block.write(start, keys[:, :, :count], values[:, :, :count])
            return
        source = pads + torch.arange(count, device=keys.device) - start  # [batch, sink]: index into the new columns
        arrived = ((source >= 0) & (source < new))[:, None, :, None]
        source = source.clamp(0, new - 1)[:, None, :, None]
        fronts = [
            torch.where(arrived, fresh.gather(2, source.expand_as(front)), front)
            for front, fresh in zip(self.block.read(count), (keys, values), strict=True)
        ]
        self.block.write(0, fronts[0], fronts[1])

    def _forget_log(self) -> None:
        for entry in self._log:
            entry.block.free()
        self._log = []
