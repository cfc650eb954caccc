"""Decoding with one kernel launch a layer instead of one attention call a head group.

`FusedDecode` belongs to a cache and holds the state that its launches share. `HeadTable` belongs to a layer and tells
the kernel where its heads lie in memory. Both ways to decode give the same result.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress.cache.attend import AttendOptions, sees_all
from kvcompress.cache.head_group import HeadGroup
from kvcompress.ops.ragged_decode import GroupSlots, Scratch, can_decode, decode, table_of


@dataclass
class LaunchState:
    """State that the launches on one device share: the device's count of columns, and scratch memory.

    All layers of a step have seen the same number of columns, so the count is written once a step.
    """

    seen: Tensor  # int32 [1], on the device
    written: int  # the same count on the host
    scratch: Scratch | None = None
    stores: int = 0  # launches that stored their own column
    _last: Tensor | None = None

    def write(self, seen: int) -> None:
        """Set the device's count to `seen` columns."""
        self.seen.fill_(seen)
        self.written, self._last = seen, None

    def advance(self, on_device: bool = True) -> None:
        """Count one more column; `on_device=False` after the replay of a graph, which has counted on the device."""
        self.written += 1
        if on_device:
            self.seen.add_(1)
            self._last = None

    def last_column(self) -> Tensor:
        """Return the last column seen, int64 `[1]` on the device; computed once a step."""
        if self._last is None:
            self._last = self.seen.long() - 1
        return self._last


class HeadTable:
    """Kernel's table of the heads of one layer, rewritten only after a block has moved."""

    def __init__(self, heads: int) -> None:
        self.heads = heads
        self._places: list[object] = []
        self._table: Tensor | None = None

    def table(self, groups: Sequence[HeadGroup]) -> tuple[Tensor, bool]:
        """Return the table, and whether it is unchanged since the last call."""
        places = [(tensor.data_ptr(), tensor.shape) for group in groups for tensor in group.block.tensors]
        unchanged = self._table is not None and places == self._places
        if self._table is None or not unchanged:
            parts = [GroupSlots(g.heads, *g.block.read(g.block.slots), g.capacity, g.retention.sinks) for g in groups]
            self._table, self._places = table_of(parts, self.heads), list(places)
        return self._table, unchanged


class FusedDecode:
    """Decodes the layers of one cache with one launch each; `enabled=False` makes every layer decode group by group."""

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._states: dict[torch.device, LaunchState] = {}

    def serves(
        self,
        groups: Sequence[HeadGroup],
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        position: int,
        options: AttendOptions,
    ) -> bool:
        """Return whether the kernel can serve the next query; shapes as in `attend`."""
        return (
            self.enabled
            and query.shape[3] == 1
            and bool(groups)
            and not options.dropout
            and can_decode(query, keys, values)
            and all(sees_all(group, position, options) for group in groups)
        )

    def attend(
        self,
        heads: HeadTable,
        groups: Sequence[HeadGroup],
        query: Tensor,
        seen: int,
        options: AttendOptions,
        new: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attend from one query a row to all `seen` columns, its own key among them.

        `new` is that key and its value, `[batch, kv_head, 1, head_dim]`, if the groups have only made room for it.
        """
        # A write here precedes the launch directly, so the launch must wait for it.
        before = self._states.get(query.device)
        counted = before is not None and before.written == seen
        state = self.state(query.device, seen)
        table, unchanged = heads.table(groups)
        masked = any(group.needs_mask(options.padding) for group in groups)
        pads = options.padding.on(query.device) if masked else None
        values = groups[0].block.tensors[1]
        out, state.scratch = decode(
            query.squeeze(3).flatten(1, 2),
            table,
            values.shape[3],
            state.seen,
            None if pads is None else pads[:, 0],
            options.scale,
            state.scratch,
            new=None if new is None else (new[0].squeeze(2), new[1].squeeze(2)),
            settled=counted and unchanged and pads is None,
        )
        state.stores += new is not None
        return out.view(*query.shape[:-1], values.shape[3])

    def state(self, device: torch.device, seen: int) -> LaunchState:
        """Return the state of a device after making it count `seen` columns."""
        state = self._states.get(device)
        if state is None:
            with torch.inference_mode(False):  # a tensor made in inference mode can be written only there
                state = LaunchState(torch.full((1,), seen, dtype=torch.int32, device=device), seen)
            self._states[device] = state
        if state.written != seen:
            state.write(seen)
        return state

    def advance(self, device: torch.device, seen: int, on_device: bool = True) -> None:
        """Count the column after `seen`; see `LaunchState.advance`."""
        self.state(device, seen).advance(on_device)

    def last_column(self, device: torch.device, seen: int) -> Tensor | None:
        """Return the last of `seen` columns, int64 `[1]` on the device, or None if the device does not count."""
        return self.state(device, seen).last_column() if device in self._states else None
