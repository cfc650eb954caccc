"""A layer that evicts by key content: after every forward pass a rule picks the keys that stay, head by head.

All heads of a row keep equally many keys, so the layer is one dense block; keys stay in time order. The queries of a
pass see all held keys and, causally, each other. The rule acts after the pass.
"""

from collections.abc import Callable

from torch import Tensor

from kvcompress.cache.attend import AttendOptions, attend_full, attend_group
from kvcompress.cache.head_group import HeadGroup
from kvcompress.cache.layer import CacheState, CompressedLayer
from kvcompress.cache.storage import LARGEST_STEP, gather_slots
from kvcompress.core.errors import CacheUseError, UnsupportedModelError
from kvcompress.core.retention import FULL

# Held keys [batch, kv_head, slot, head_dim] -> slots that stay, ascending [batch, kv_head, kept], or None for all.
KeepRule = Callable[[Tensor], Tensor | None]


class EvictingLayer(CompressedLayer):
    """Layer of `heads` KV heads whose keys are kept by `rule`. Serves neither left padding nor a sliding window."""

    def __init__(self, heads: int, shared: CacheState, rule: KeepRule, sliding_window: int | None = None) -> None:
        super().__init__(heads, shared)
        if sliding_window is not None:
            self.learn_sliding_window(sliding_window)
        self.rule = rule
        self._group = HeadGroup(FULL, range(heads), shared.meter)

    def learn_sliding_window(self, sliding_window: int) -> None:
        raise UnsupportedModelError(
            f"evicting by key content is not supported with this model's sliding window of {sliding_window}: kept keys"
            " would leave it"
        )

    @property
    def groups(self) -> list[HeadGroup]:
        return [self._group]

    def keeps_like(self, other: CompressedLayer) -> bool:
        return isinstance(other, EvictingLayer) and self.rule == other.rule

    def fill(self, keys: Tensor, values: Tensor, first: int = 0) -> None:
        self._require_unpadded()
        self._begin(keys)
        self.seen = keys.shape[2]
        self._group.append(*self._kept(keys, values), self.shared.padding)

    def _kept(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values that stay; the same tensors if all do."""
        slots = self.rule(keys)
        return (keys, values) if slots is None else (gather_slots(keys, slots), gather_slots(values, slots))

    def reserve(self, tokens: int) -> None:
        raise CacheUseError("reserve: a layer that evicts by key content rewrites its storage after every pass")

    def can_crop(self, tokens: int) -> bool:
        return tokens == 0 or self.seen == self._group.seen  # evicted keys cannot come back

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, options: AttendOptions) -> Tensor:
        self._require_unpadded()
        if not self.seen:  # of the first pass only the kept keys are ever stored
            out = attend_full(query, keys, values, 0, options)
            self.fill(keys, values)
            return out
        out = attend_group(self._group, query, keys, values, options)
        self.seen += keys.shape[2]
        held = self._group.read()
        kept = self._kept(*held)
        if kept[0] is not held[0]:
            self._group.replace(*kept, spare=LARGEST_STEP)
        return out

    def _require_unpadded(self) -> None:
        if self.shared.padding.longest:
            raise CacheUseError("evicting by key content needs rows of equal length; this batch is padded")
