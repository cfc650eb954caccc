"""The KV heads of one layer that keep the same: one dense block, written in place.

Keys are cached after rotation, so their order is irrelevant to attention. A bounded head is therefore `sinks` slots
that never move and a ring of `window` slots: column c of the text lies in slot c while the block fills, and from then
on in slot s + (c - s) mod w, over the column that leaves the window. An unbounded head is one row of slots that grows.

Padding: a *column* counts padded tokens, a *position* real ones. All rows share the ring's slots, because the last w
columns are the same for all rows; only the sinks lie at other columns in each row. A column that is a row's sink also
lies in the ring until it leaves the window; `positions` reports that second copy, and pads, as -1.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress.cache.padding import Padding
from kvcompress.cache.storage import Block, Meter, allocated_slots, storage_bytes
from kvcompress.core.errors import CacheUseError
from kvcompress.core.retention import Retention

RECORDED = 512  # columns that can be taken back at most: decoding that goes on without a crop must not grow


@dataclass
class Overwritten:
    """What lay in the ring under the columns `start...` before they were written: one slot a column."""

    start: int
    block: Block


class Group:
    """Storage of the KV heads `heads`, which all keep `kept`; `seen` counts columns.

    With `recording`, what the ring overwrites is kept until the next `crop`.
    """

    def __init__(self, kept: Retention, heads: Iterable[int], meter: Meter) -> None:
        self.kept, self.heads = kept, list(heads)
        self.capacity = kept.capacity
        self.block = Block(meter)
        self.seen = 0
        self.recording = False
        self._log: list[Overwritten] = []

    @property
    def filled(self) -> int:
        """Slots in use."""
        return self.kept.held(self.seen)

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor that this group keeps alive."""
        return storage_bytes(self.block.tensors) + sum(storage_bytes(entry.block.tensors) for entry in self._log)

    def read(self) -> tuple[Tensor, Tensor]:
        """K and V of the slots in use, `[batch, head, slot, head_dim]`."""
        return self.block.read(self.filled)

    def append(self, keys: Tensor, values: Tensor, padding: Padding) -> None:
        """Store the next columns, `[batch, head, column, head_dim]`; a bounded head forgets what leaves its window."""
        new = keys.shape[2]
        sinks, window = self.kept[:2]
        if self.recording and self.capacity is not None and new > window:
            # Within one write no ring slot may be met twice, or the record could not tell what was there in between.
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

    def takes_plainly(self, padding: Padding) -> bool:
        """Whether the next column belongs in one slot, the same in every row, with nothing to be recorded."""
        if self.recording:
            return False
        return self.capacity is None or not padding.longest or self.seen >= self.kept.sinks + padding.longest

    def make_room(self, keys: Tensor, values: Tensor) -> None:
        """Count one more column, like these, without storing it: who calls this does, where the group `takes_plainly`."""
        self._reserve(self.seen + 1, keys, values)
        self.count()

    def count(self, columns: int = 1) -> None:
        """Count columns that someone else stores, or has stored, where there is room for them."""
        self._forget_log()
        self.seen += columns

    def reserve(self, columns: int) -> None:
        """Make room for `columns` columns in all, so that the block does not move before; contents stay."""
        slots = self.kept.held(columns)
        if self.block.tensors and slots > self.block.slots:
            self.block.reserve(slots, *self.block.tensors)

    def replace(self, keys: Tensor, values: Tensor, spare: int) -> None:
        """Hold just these keys and values of an unbounded group, in the block there is if it is at most `spare` slots
        larger than they need."""
        slots = allocated_slots(self.kept, keys.shape[2])
        if self.block.slots > slots + spare:
            self.block.free()
            self.block.reserve(slots, keys, values)
        self.block.write(0, keys, values)
        self.seen = keys.shape[2]

    def columns(self, device: torch.device) -> Tensor:
        """The column in each slot in use, `[slot]`, where no row is padded."""
        slots = torch.arange(self.filled, device=device)
        if self.capacity is None:
            return slots
        sinks, window = self.kept[:2]
        last = self.seen - 1
        return torch.where(slots < sinks, slots, last - (last - slots) % window)

    def positions(self, padding: Padding, device: torch.device) -> Tensor:
        """The real position in each slot in use, `[batch or 1, slot]`; -1 where the slot holds nothing of its own."""
        sinks, columns, pads = self.kept.sinks, self.columns(device), padding.on(device)
        if pads is None:
            return columns[None]
        slots, positions = torch.arange(len(columns), device=device), columns - pads
        if self.capacity is None:
            return torch.where(positions >= 0, positions, -1)
        ring = torch.where(positions >= sinks, positions, -1)
        return torch.where(slots < sinks, torch.where(slots + pads < self.seen, slots, -1), ring)

    def held_positions(self, row: int, padding: Padding) -> list[list[int]]:
        """Real positions that each head holds in one row of the batch, ascending, `[head][...]`."""
        at = self.positions(padding, torch.device("cpu"))
        of_row = at[row if at.shape[0] > 1 else 0]
        return [sorted(of_row[of_row >= 0].tolist())] * len(self.heads)

    def settled(self, padding: Padding) -> bool:
        """Whether every slot in use holds a key of its own in every row, so that reading it needs no mask."""
        if not padding.longest:
            return True
        return self.capacity is not None and self.seen >= self.capacity + padding.longest

    def can_crop(self, tokens: int) -> bool:
        """Whether the last `tokens` columns can be taken back exactly."""
        if self.capacity is None or self.seen <= self.capacity:
            return True
        recorded_from = self._log[0].start if self._log else self.seen
        return max(self.seen - tokens, self.capacity) >= recorded_from

    def crop(self, tokens: int) -> None:
        """Take back the last `tokens` columns and forget the record of what they overwrote."""
        if not self.can_crop(tokens):
            raise CacheUseError(f"a KV head that keeps {self.capacity} keys cannot take back {tokens} tokens")
        target = self.seen - tokens
        for entry in reversed(self._log):
            # Slots of one entry are distinct, and later entries are undone first: what remains is what was there.
            keys, values = entry.block.read(entry.block.slots)
            for column in range(max(entry.start, target), entry.start + entry.block.slots):
                at = column - entry.start
                self.block.write(self._slot(column), keys[:, :, at : at + 1], values[:, :, at : at + 1])
        self.seen = target
        self._forget_log()

    def reset(self) -> None:
        """Forget everything and free the storage."""
        self._forget_log()
        self.block.free()
        self.seen = 0

    def select_rows(self, rows: Tensor) -> None:
        """Replace the batch by the rows at these indices, `[new batch]`."""
        for block in (self.block, *(entry.block for entry in self._log)):
            block.select_rows(rows)

    def _reserve(self, columns: int, keys: Tensor, values: Tensor) -> None:
        if columns > self.block.slots != self.capacity:
            self.block.reserve(allocated_slots(self.kept, columns), keys, values)

    def _slot(self, column: int) -> int:
        sinks, window = self.kept[:2]
        return column if column < sinks else sinks + (column - sinks) % window

    def _write_sinks(self, start: int, keys: Tensor, values: Tensor, padding: Padding) -> None:
        count, new = min(self.kept.sinks, self.block.slots), keys.shape[2]
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
