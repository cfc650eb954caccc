"""A layer that keeps keys for what they are: after every forward pass a rule chooses, head by head, which stay.

All heads of a row keep equally many, so the layer is one dense block; kept keys stay in time order. The queries of a
pass see everything held and, causally, each other; the rule acts after the pass.
"""

from collections.abc import Callable

from torch import Tensor

from kvcompress.cache.attend import Reading, attend_all, read
from kvcompress.cache.head_group import Group
from kvcompress.cache.layer import CompressedLayer, Shared
from kvcompress.cache.storage import LARGEST_STEP
from kvcompress.core.errors import CacheUseError, UnsupportedModelError
from kvcompress.core.retention import FULL

# Keys held `[batch, kv_head, slot, head_dim]` -> the slots that stay, ascending `[batch, kv_head, kept]`; None for all.
Chooser = Callable[[Tensor], Tensor | None]


class SelectingLayer(CompressedLayer):
    """`heads` KV heads whose keys are chosen by `choose`; no left padding and no sliding window of the model's own."""

    def __init__(self, heads: int, shared: Shared, choose: Chooser, limit: int | None = None) -> None:
        super().__init__(heads, shared)
        if limit is not None:
            self.learn_limit(limit)
        self.choose = choose
        self._block = Group(FULL, range(heads), shared.meter)

    def learn_limit(self, limit: int) -> None:
        raise UnsupportedModelError(
            f"keys chosen by content have no order to which this model's sliding window of {limit} could apply"
        )

    @property
    def groups(self) -> list[Group]:
        return [self._block]

    def keeps_like(self, other: CompressedLayer) -> bool:
        return isinstance(other, SelectingLayer) and self.choose == other.choose

    def fill(self, keys: Tensor, values: Tensor, first: int = 0) -> None:
        self._require_unpadded()
        self.like = (keys.shape[0], keys.dtype, keys.device)
        self.is_initialized = True
        self.seen = keys.shape[2]
        self._block.append(*self._chosen(keys, values), self.shared.padding)

    def select(self) -> None:
        """Let the rule act on what is held."""
        held = self._block.read()
        chosen = self._chosen(*held)
        if chosen[0] is not held[0]:
            self._block.replace(*chosen, spare=LARGEST_STEP)

    def _chosen(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What the rule keeps of these, the same tensors where that is all of them."""
        slots = self.choose(keys)
        if slots is None:
            return keys, values
        at = slots[..., None]
        return (
            keys.gather(2, at.expand(-1, -1, -1, keys.shape[-1])),
            values.gather(2, at.expand(-1, -1, -1, values.shape[-1])),
        )

    def reserve(self, tokens: int) -> None:
        raise CacheUseError(
            "reserve: what is chosen by content is stored anew with every pass, no room can be kept for it"
        )

    def can_crop(self, tokens: int) -> bool:
        return tokens == 0 or self.seen == self._block.seen  # once a key has been chosen away it cannot come back

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, reading: Reading) -> Tensor:
        self._require_unpadded()
        if not self.seen:  # of the first pass only what stays is ever stored
            out = attend_all(query, keys, values, 0, reading)
            self.fill(keys, values)
            return out
        out = read(self._block, query, keys, values, reading)
        self.seen += keys.shape[2]
        self.select()
        return out

    def _require_unpadded(self) -> None:
        if self.shared.padding.longest:
            raise CacheUseError("keys chosen by content need rows of equal length, this batch is padded")
