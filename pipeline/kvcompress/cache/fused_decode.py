"""How a cache decodes a token with one launch a layer instead of one attention a group of heads.

`Fused` belongs to a cache and holds what its launches share; `Heads` belongs to a layer and knows where its heads lie.
Both paths compute the same. `FUSED` turns this one on; without it every cache is read group by group.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress.cache.attend import Reading, sees_all
from kvcompress.cache.head_group import Group
from kvcompress.ops.ragged_decode import GroupSlots, Scratch, can_decode, decode, table_of

FUSED = True


@dataclass
class Desk:
    """What the launches on one device share: the device's own count of columns seen, and scratch memory.

    All layers of a step have seen as much, so the count is written once a step, not once a layer.
    """

    seen: Tensor  # int32 [1]
    written: int
    scratch: Scratch | None = None
    appended: int = 0  # launches that stored their own column
    _last: Tensor | None = None

    def advance(self) -> None:
        """Count one more column where the count is kept, so that a captured step goes on counting by itself."""
        self.seen.add_(1)
        self.written += 1
        self._last = None

    def write(self, seen: int) -> None:
        """Let the device count `seen` columns."""
        self.seen.fill_(seen)
        self.written, self._last = seen, None

    def last_column(self) -> Tensor:
        """The last column seen, int64 `[1]` on the device, made once a step."""
        if self._last is None:
            self._last = self.seen.long() - 1
        return self._last


class Heads:
    """The kernel's table of the heads of one layer, written anew only where a block has moved."""

    def __init__(self, heads: int) -> None:
        self.heads = heads
        self._places: list[object] = []
        self._table: Tensor | None = None

    def table(self, groups: Sequence[Group]) -> tuple[Tensor, bool]:
        """The table, and whether it was there before."""
        places = [(tensor.data_ptr(), tensor.shape) for group in groups for tensor in group.block.tensors]
        stood = self._table is not None and places == self._places
        if self._table is None or not stood:
            parts = [GroupSlots(g.heads, *g.block.read(g.block.slots), g.capacity, g.kept.sinks) for g in groups]
            self._table, self._places = table_of(parts, self.heads), list(places)
        return self._table, stood


class Fused:
    """What one cache needs to decode with one launch a layer."""

    def __init__(self) -> None:
        self._desks: dict[torch.device, Desk] = {}

    def serves(
        self, groups: Sequence[Group], query: Tensor, keys: Tensor, values: Tensor, position: int, reading: Reading
    ) -> bool:
        """Whether the next query, `[batch, kv_head, group, query, head_dim]`, can go this way; shapes as in `reading`."""
        return (
            FUSED
            and query.shape[3] == 1
            and bool(groups)
            and not reading.dropout
            and can_decode(query, keys, values)
            and all(sees_all(group, position, reading) for group in groups)
        )

    def attend(
        self,
        heads: Heads,
        groups: Sequence[Group],
        query: Tensor,
        seen: int,
        reading: Reading,
        new: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attention of one query a row over all that the groups hold, its own key among it: `seen` columns.

        `new` is that key and its value, `[batch, kv_head, 1, head_dim]`, where the groups have only made room for it.
        """
        # What is written here is written right before the launch, so that has to wait for it.
        before = self._desks.get(query.device)
        told = before is not None and before.written == seen
        desk = self.desk(query.device, seen)
        table, stood = heads.table(groups)
        pads = None if all(group.settled(reading.padding) for group in groups) else reading.padding.on(query.device)
        values = groups[0].block.tensors[1]
        out, desk.scratch = decode(
            query.squeeze(3).flatten(1, 2),
            table,
            values.shape[3],
            desk.seen,
            None if pads is None else pads[:, 0],
            reading.scale,
            desk.scratch,
            new=None if new is None else (new[0].squeeze(2), new[1].squeeze(2)),
            settled=told and stood and pads is None,
        )
        desk.appended += new is not None
        return out.view(*query.shape[:-1], values.shape[3])

    def desk(self, device: torch.device, seen: int) -> Desk:
        """The desk of a device, which there counts `seen` columns."""
        desk = self._desks.get(device)
        if desk is None:
            with torch.inference_mode(False):  # made in inference mode, it could be written nowhere else
                desk = Desk(torch.full((1,), seen, dtype=torch.int32, device=device), seen)
            self._desks[device] = desk
        if desk.written != seen:
            desk.write(seen)
        return desk

    def last_column(self, device: torch.device, seen: int) -> Tensor | None:
        """The last of `seen` columns, int64 `[1]` on a device that counts by itself, None on one that does not."""
        return self.desk(device, seen).last_column() if device in self._desks else None
