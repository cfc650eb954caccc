"""Storage of KV heads that hold selected keys; `scores.selection_rule` defines the strategy.

To a reader or writer it is a head group of s + k sinks and a window of w. The selected keys lie in the last k of the
slots that the ring never overwrites. The only addition happens between two passes: a selection swaps rows of those slots
with rows of the ring. `positions` still returns what a slot would hold without selection, which determines how long a
row of the ring is visible; `slot_positions` returns what the slot really holds.
"""

from collections.abc import Hashable, Iterable

import torch
from torch import Tensor

from kvcompress.cache.head_group import HeadGroup
from kvcompress.cache.padding import Padding
from kvcompress.cache.select.records import SelectionInputs, SelectionRecord, SlotState, SlotSwap
from kvcompress.cache.storage import Meter, gather_slots, storage_bytes
from kvcompress.core.errors import CacheUseError
from kvcompress.core.retention import Retention
from kvcompress.scores.inputs import AttentionTotals
from kvcompress.scores.selection_rule import SelectionRule


class SelectGroup(HeadGroup):
    """Storage of the KV heads `heads`, all with `requested`.

    `due` is the column before which they select next, `selected_at` the column of the last selection, and `state` the
    state of the slots right after it.
    """

    def __init__(self, requested: Retention, heads: Iterable[int], meter: Meter, rule: SelectionRule) -> None:
        super().__init__(Retention(requested.sinks + requested.chosen, requested.window), heads, meter)
        self.requested, self.score = requested, rule.score(requested.score)
        self.every = min(rule.every, requested.window)
        self.record: list[SelectionRecord] | None = None
        self._start()

    def _start(self) -> None:
        assert self.capacity is not None
        self.due = self.capacity
        self.selected_at = 0
        self.state: SlotState | None = None

    @property
    def state_nbytes(self) -> int:
        """Bytes kept besides K and V."""
        return storage_bytes(self.state.tensors) if self.state else 0

    def layout_key(self, inputs: SelectionInputs) -> Hashable:
        """Return a key that is equal for groups that can select together."""
        keys, values = self.block.tensors
        queries = () if inputs.queries is None else tuple(inputs.queries.shape[2:])
        shape = keys.shape[0], keys.shape[3], values.shape[3], *queries
        counts = self.seen, self.selected_at, self.every, self.state is None
        return self.requested, self.score, *counts, *shape, keys.dtype, keys.device, inputs.scaling

    def slot_positions(self, before: Tensor | None, padding: Padding, device: torch.device) -> Tensor:
        """Return the real position of the key in each slot in use, int64 `[batch or 1, head or 1, slot]`.

        -1 as in `positions`. `before` are the positions right after the last selection, None without one.
        """
        expected = self.positions(padding, device)[:, None]
        if before is None:
            return expected
        old = self.columns(device) < self.selected_at
        return torch.where(old, before.to(device).long(), expected).masked_fill(expected < 0, -1)

    def held_positions(self, row: int, padding: Padding) -> list[list[int]]:
        if self.state is None:
            return super().held_positions(row, padding)
        positions = self.slot_positions(self.state.positions, padding, torch.device("cpu"))
        return [sorted(of_head[of_head >= 0].tolist()) for of_head in positions[row]]

    def next_slots(self, device: torch.device) -> Tensor:
        """Return the slots that the next columns overwrite until the next selection but one, in order, `[slot]`."""
        sinks, window, chosen, _ = self.requested
        end = sinks + chosen
        return (torch.arange(self.every, device=device) + (self.seen - window - end)) % window + end

    def expect(self, keys: Tensor, values: Tensor) -> None:
        """Allocate room for a prompt `[batch, any heads, column, head_dim]` and count it; `hold` fills the slots."""
        heads = slice(len(self.heads))
        self._reserve(keys.shape[2], keys[:, heads], values[:, heads])
        self.seen = keys.shape[2]

    def hold(
        self, keys: Tensor, values: Tensor, source: Tensor, received: AttentionTotals | None, row: int | None = None
    ) -> None:
        """Fill slot i with the column `source[.., i]` of a prompt without pads, `[batch, head, column, head_dim]`.

        With `row` only that row of the batch, which then has a `state` already.
        """
        self.block.write(0, gather_slots(keys, source), gather_slots(values, source), row)
        if row is None:
            self.state = SlotState(source.int(), received)
            return
        assert self.state is not None
        self.state.positions[row] = source[0]
        if received is not None and self.state.received is not None:
            self.state.received.total[row] = received.total[0]
            self.state.received.queries[row] = received.queries[0]

    def swap(self, swap: SlotSwap) -> None:
        """Swap rows as a selection says."""
        self.block.move(swap.source, swap.into)
        self.state = swap.after

    def close_selection(self) -> None:
        """Record the selection and set the next one's column."""
        assert self.state is not None
        if self.record is not None:
            (sinks, _, chosen, _), now = self.requested, self.state.positions.clone()
            leaving = now[..., self.next_slots(now.device)]
            self.record.append(SelectionRecord(self.seen, tuple(self.heads), now[..., sinks : sinks + chosen], leaving))
        self.selected_at, self.due = self.seen, self.seen + self.every

    def can_crop(self, tokens: int) -> bool:
        return tokens == 0 or (self.state is None and super().can_crop(tokens))

    def crop(self, tokens: int) -> None:
        if not self.can_crop(tokens):
            raise CacheUseError(f"a KV head that has selected among its keys cannot take back {tokens} tokens")
        super().crop(tokens)

    def reset(self) -> None:
        super().reset()
        self._start()

    def select_rows(self, rows: Tensor) -> None:
        super().select_rows(rows)
        if self.state is not None:
            self.state = self.state.rows(rows)
