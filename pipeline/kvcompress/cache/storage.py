"""Memory for the keys and values of some KV heads: two dense tensors that grow in steps, with an exact byte count.

Allocation follows a formula of the retention and the tokens seen (`allocated_slots`). The surplus over the slots in use
is at most 1/16, or 15 slots, and never more than 255. Growing copies the block. From 4,096 slots on this happens once
every 256 tokens and costs a decode step 1/256 of what its attention reads; `torch.cat` would copy the block every token.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from kvcompress.core.retention import Retention

SMALLEST_STEP, LARGEST_STEP = 16, 256


def allocated_slots(retention: Retention, seen: int) -> int:
    """Return the slots allocated for a head once it has stored `seen` tokens (columns of a padded batch).

    Below the capacity, `seen` is rounded up to a multiple of a sixteenth of the power of two below it.
    """
    step = min(max(SMALLEST_STEP, 2 ** max(seen.bit_length() - 1, 0) // 16), LARGEST_STEP)
    whole = -(-seen // step) * step
    return whole if retention.capacity is None else min(retention.capacity, whole)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the memory behind tensors; a view counts with all the memory it keeps alive."""
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def writable_zeros(*shape: int, like: Tensor) -> Tensor:
    """Return zeros with the dtype and device of `like`, created outside inference mode.

    A tensor created in inference mode can be written only in inference mode.
    """
    with torch.inference_mode(False):
        return torch.zeros(shape, dtype=like.dtype, device=like.device)


def take_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """Return the rows of the batch at indices `rows`, `[new batch]`, as a tensor that stays writable."""
    with torch.inference_mode(False):
        return tensor.index_select(0, rows.to(tensor.device).clone())


def gather_slots(tensor: Tensor, slots: Tensor) -> Tensor:
    """Return slots `[batch, head, n]` of a tensor `[batch, head, slot, head_dim]`."""
    return tensor.gather(2, slots[..., None].expand(-1, -1, -1, tensor.shape[3]))


class Meter:
    """Bytes of K and V that one cache holds now (`held`) and the maximum so far (`peak`), copies of growth included."""

    def __init__(self) -> None:
        self.held = self.peak = 0

    def change(self, by: int) -> None:
        self.held += by
        self.peak = max(self.peak, self.held)


class Block:
    """Keys and values, `[batch, head, slot, head_dim]` each; their head sizes may differ. Empty before the first write."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self._pair: tuple[Tensor, Tensor] | None = None

    @property
    def slots(self) -> int:
        return self._pair[0].shape[2] if self._pair else 0

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self._pair or ()

    def reserve(self, slots: int, keys: Tensor, values: Tensor) -> None:
        """Grow to `slots` slots and keep the contents; batch, heads, head sizes and dtype follow `keys` and `values`."""
        grown = []
        for i, like in enumerate((keys, values)):
            # Zeros: a masked slot enters the sum with weight 0, and 0 times uninitialised memory may be NaN.
            room = writable_zeros(like.shape[0], like.shape[1], slots, like.shape[3], like=like)
            self.meter.change(storage_bytes([room]))
            if self._pair:
                room.narrow(2, 0, self.slots).copy_(self._pair[i])
            grown.append(room)
        self.free()
        self._pair = (grown[0], grown[1])

    def read(self, slots: int) -> tuple[Tensor, Tensor]:
        """Return K and V of the first `slots` slots: views, or the tensors themselves for all slots."""
        assert self._pair is not None
        keys, values = self._pair
        if slots == keys.shape[2]:
            return keys, values
        return keys.narrow(2, 0, slots), values.narrow(2, 0, slots)

    def write(self, slot: int, keys: Tensor, values: Tensor, row: int | None = None) -> None:
        """Overwrite the slots from `slot` on, in all rows of the batch or in one."""
        assert self._pair is not None
        for tensor, new in zip(self._pair, (keys, values), strict=True):
            target = tensor if row is None else tensor[row : row + 1]
            target.narrow(2, slot, new.shape[2]).copy_(new)

    def move(self, source: Tensor, into: Tensor) -> None:
        """Copy slots `source` into slots `into`, `[batch, head, n]` each; no slot may occur twice in a head's `into`."""
        assert self._pair is not None
        for tensor in self._pair:
            rows = gather_slots(tensor, source)
            tensor.scatter_(2, into[..., None].expand(-1, -1, -1, tensor.shape[3]), rows)

    def take(self, slots: list[int]) -> "Block":
        """Return a copy of some slots as a block of its own."""
        assert self._pair is not None
        index = torch.tensor(slots, device=self._pair[0].device)
        copy = Block(self.meter)
        copy._pair = (self._pair[0].index_select(2, index), self._pair[1].index_select(2, index))
        self.meter.change(storage_bytes(copy._pair))
        return copy

    def select_rows(self, rows: Tensor) -> None:
        """Replace the batch by the rows at indices `rows`, `[new batch]`."""
        if self._pair:
            selected = take_rows(self._pair[0], rows), take_rows(self._pair[1], rows)
            self.meter.change(storage_bytes(selected))
            self.free()
            self._pair = selected

    def free(self) -> None:
        self.meter.change(-storage_bytes(self.tensors))
        self._pair = None
