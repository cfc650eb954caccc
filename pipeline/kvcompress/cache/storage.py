"""Memory for K and V of some KV heads: two dense tensors that grow in steps, and an exact account of their bytes.

Blocks are allocated in steps and never above what the heads may keep, so what is held is a formula of the plan and the
tokens seen (`allocated_slots`): above the plan's own count by at most 1/16, or 15 slots, and never by more than 255. A
step copies the block; from 4,096 slots on that happens once every 256 tokens and costs a decode step 1/256 of what its
attention reads, where `torch.cat` per token copies all of it every time.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from kvcompress.core.retention import Retention

SMALLEST_STEP, LARGEST_STEP = 16, 256


def allocated_slots(kept: Retention, seen: int) -> int:
    """Slots that a head's storage has once `seen` tokens (columns, where padded) have been in it at most.

    Up to the capacity, `seen` is rounded up to a multiple of a sixteenth of the power of two below it.
    """
    step = min(max(SMALLEST_STEP, 2 ** max(seen.bit_length() - 1, 0) // 16), LARGEST_STEP)
    whole = -(-seen // step) * step
    return whole if kept.capacity is None else min(kept.capacity, whole)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind tensors: a view counts with all of what it keeps alive."""
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


class Meter:
    """Bytes of K and V that one cache holds, and the most it ever held, growth's second copy included."""

    def __init__(self) -> None:
        self.held = self.peak = 0

    def change(self, by: int) -> None:
        self.held += by
        self.peak = max(self.peak, self.held)


class Block:
    """K and V, `[batch, head, slot, head_dim]` each (their head sizes may differ); no slots before the first write."""

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
        """Make room for `slots` slots in all, alike in everything else to `keys` and `values`; contents stay."""
        grown = []
        for i, like in enumerate((keys, values)):
            batch, heads, _, size = like.shape
            # Zeros: a slot that a mask hides still enters the sum with weight 0, and 0 times garbage may be NaN.
            with torch.inference_mode(False):  # made in inference mode, it could be written nowhere else
                room = torch.zeros(batch, heads, slots, size, dtype=like.dtype, device=like.device)
            self.meter.change(storage_bytes([room]))
            if self._pair:
                room.narrow(2, 0, self.slots).copy_(self._pair[i])
            grown.append(room)
        self.free()
        self._pair = (grown[0], grown[1])

    def read(self, slots: int) -> tuple[Tensor, Tensor]:
        """K and V of the first `slots` slots: the tensors themselves where that is all of them, else views."""
        assert self._pair is not None
        keys, values = self._pair
        if slots == keys.shape[2]:
            return keys, values
        return keys.narrow(2, 0, slots), values.narrow(2, 0, slots)

    def write(self, slot: int, keys: Tensor, values: Tensor) -> None:
        """Overwrite the slots from `slot` on."""
        assert self._pair is not None
        self._pair[0].narrow(2, slot, keys.shape[2]).copy_(keys)
        self._pair[1].narrow(2, slot, values.shape[2]).copy_(values)

    def move(self, source: Tensor, into: Tensor) -> None:
        """Let the slots `into` hold what the slots `source` hold now, `[batch, head, slot]` each, all of `into` different."""
        assert self._pair is not None
        for tensor in self._pair:
            rows = tensor.gather(2, source[..., None].expand(-1, -1, -1, tensor.shape[3]))
            tensor.scatter_(2, into[..., None].expand(-1, -1, -1, tensor.shape[3]), rows)

    def take(self, slots: list[int]) -> "Block":
        """A copy of some slots as a block of its own."""
        assert self._pair is not None
        index = torch.tensor(slots, device=self._pair[0].device)
        copy = Block(self.meter)
        copy._hold(*(tensor.index_select(2, index) for tensor in self._pair))
        return copy

    def select_rows(self, rows: Tensor) -> None:
        """Replace the batch by the rows at these indices, `[new batch]`."""
        if self._pair:
            with torch.inference_mode(False):
                selected = [tensor.index_select(0, rows.to(tensor.device).clone()) for tensor in self._pair]
            self.meter.change(storage_bytes(selected))
            self.free()
            self._pair = (selected[0], selected[1])

    def free(self) -> None:
        self.meter.change(-storage_bytes(self.tensors))
        self._pair = None

    def _hold(self, keys: Tensor, values: Tensor) -> None:
        self._pair = (keys, values)
        self.meter.change(storage_bytes(self._pair))
