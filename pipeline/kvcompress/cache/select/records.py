"""Inputs, state and result of a selection, for one head group or for several of equal layout."""

from dataclasses import dataclass, replace

from torch import Tensor

from kvcompress.cache.padding import Padding
from kvcompress.cache.storage import take_rows
from kvcompress.models.rotary import Rotation
from kvcompress.scores.inputs import AttentionTotals


@dataclass(frozen=True)
class SelectionInputs:
    """Inputs of a score other than keys and values.

    Parameters
    ----------
    queries : queries of the columns just before the selection, `[batch, kv_head, group, query, head_dim]`; None for
        scores that need none
    scaling : factor of the products of queries and keys
    padding : left padding of the batch
    rotation : the model's rotary embedding, if known
    """

    queries: Tensor | None
    scaling: float
    padding: Padding
    rotation: Rotation | None

    def of_heads(self, heads: slice | Tensor) -> "SelectionInputs":
        """Return the inputs of some KV heads."""
        return self if self.queries is None else replace(self, queries=self.queries[:, heads])

    def of_row(self, row: int, columns: int) -> "SelectionInputs":
        """Return the inputs of the last `columns` columns of one row, as those of an unpadded batch of 1."""
        queries = None if self.queries is None else self.queries[row : row + 1, :, :, -columns:]
        return SelectionInputs(queries, self.scaling, Padding(), self.rotation)


@dataclass(frozen=True)
class SlotState:
    """State of every slot right after a selection.

    `positions`: position of the key in the slot, int32 `[batch, head, slot]`. `received`: attention the key has received
    so far, None for scores that do not accumulate.
    """

    positions: Tensor
    received: AttentionTotals | None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.positions, self.received.total, self.received.queries) if self.received else (self.positions,)

    def rows(self, rows: Tensor) -> "SlotState":
        """Return the state of rows `rows` of the batch."""
        positions, *totals = (take_rows(tensor, rows) for tensor in self.tensors)
        return SlotState(positions, AttentionTotals(*totals) if totals else None)

    def heads(self, heads: slice) -> "SlotState":
        """Return a copy of the state of some heads."""
        positions, *totals = (tensor[:, heads].clone() for tensor in self.tensors)
        return SlotState(positions, AttentionTotals(*totals) if totals else None)


@dataclass(frozen=True)
class SlotSwap:
    """Result of a selection: slots `into` get the contents of slots `source`, `[batch, head, n]` each; then `after`."""

    source: Tensor
    into: Tensor
    after: SlotState


@dataclass(frozen=True)
class SelectionRecord:
    """Selection of the heads `heads` of one layer after `column` columns; positions count real tokens.

    `chosen`: `[batch, head, k]`. `leaving`: `[batch, head, r]`, -1 for pads and second copies; the i-th is overwritten
    by column `column + i`, and invisible from there on. Slots that a padded row has not reached yet are listed in
    `chosen` with the position they will hold.
    """

    column: int
    heads: tuple[int, ...]
    chosen: Tensor
    leaving: Tensor


SelectionRecords = list[list[SelectionRecord]]  # [layer], in order of time
