"""A layer whose KV heads each keep what their retention says.

KV heads with equal retention share one dense block. A decode step costs one attention call a block, or one launch for
all of them where the GPU kernel serves (`fused_decode`). A pruned head has no block, holds nothing and contributes
exactly zero. In an exact prefill the prompt attends in full before the heads evict; after it, and in a streaming prefill
from the start, every query sees only the keys its head holds.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompress.cache.attend import AttendOptions, attend_full, attend_group
from kvcompress.cache.fused_decode import HeadTable
from kvcompress.cache.head_group import HeadGroup
from kvcompress.cache.layer import CacheState, CompressedLayer
from kvcompress.core.errors import CacheUseError
from kvcompress.core.retention import FULL, Retention


def clip(retention: Retention, sliding_window: int | None) -> Retention:
    """Return the part of `retention` that is worth holding in a model with this sliding window of its own.

    Sinks are dropped only if the head's window reaches the sliding window; otherwise the mask hides them once they are
    out of sight. A selecting head with slots for everything in sight holds just that.
    """
    if sliding_window is None or retention.pruned:
        return retention
    capacity = retention.capacity
    if capacity is None or retention.window >= sliding_window or (retention.chosen and capacity >= sliding_window):
        return Retention(0, sliding_window)
    return retention


class RaggedLayer(CompressedLayer):
    """Layer whose KV heads keep `requested[kv_head]`; `retention` is the part of it within the model's sliding window."""

    def __init__(self, requested: Sequence[Retention], shared: CacheState, sliding_window: int | None = None) -> None:
        super().__init__(len(requested), shared, sliding_window)
        self.requested = list(requested)
        self._assign(requested)
        # A prompt that comes in several passes attends in full until its end, so all of it is staged until then.
        self._staged = HeadGroup(FULL, range(self.heads), shared.meter) if shared.prompt_length else None
        self._in_prompt = shared.prefill == "exact"

    def _assign(self, retentions: Sequence[Retention]) -> None:
        """Create empty groups for heads with these retentions."""
        self.retention = [clip(retention, self.sliding_window) for retention in retentions]
        heads_of: dict[Retention, list[int]] = {}
        for head, retention in enumerate(self.retention):
            if not retention.pruned:
                heads_of.setdefault(retention, []).append(head)
        self._groups = [self._new_group(retention, heads) for retention, heads in heads_of.items()]
        self._table = HeadTable(self.heads)

    def _new_group(self, retention: Retention, heads: list[int]) -> HeadGroup:
        return HeadGroup(retention, heads, self.shared.meter)

    @property
    def groups(self) -> list[HeadGroup]:
        """Groups that hold the keys now: the staged prompt until it is complete, the heads' own groups from then on."""
        return [self._staged] if self._staged is not None and self._in_prompt else self._groups

    def _all_groups(self) -> list[HeadGroup]:
        return [*self._groups, *([self._staged] if self._staged else [])]

    def positions(self, row: int = 0) -> list[list[int]]:
        """Return the real positions that every KV head holds in one row of the batch, ascending."""
        positions: list[list[int]] = [[] for _ in range(self.heads)]
        for group in self.groups:
            for head, held in zip(group.heads, group.held_positions(row, self.shared.padding), strict=True):
                positions[head] = held
        return positions

    def require_whole(self) -> None:
        for group in self.groups:
            if group.seen != self.seen:
                raise CacheUseError(
                    f"an earlier forward pass broke off within a layer that saw {self.seen} tokens: heads {group.heads}"
                    f" have stored {group.seen}; `reset` the cache and run the text again"
                )

    def keeps_like(self, other: CompressedLayer) -> bool:
        return isinstance(other, RaggedLayer) and self.requested == other.requested

    def fill(self, keys: Tensor, values: Tensor, first: int = 0) -> None:
        self._begin(keys)
        for group in self._groups:
            group.seen = first
        self._store(keys, values)
        self.seen, self._in_prompt = first + keys.shape[2], False

    def reserve(self, tokens: int) -> None:
        if self._in_prompt:
            raise CacheUseError(f"reserve: the prompt is not complete, {self.seen} tokens of it were seen")
        super().reserve(tokens)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if not self.seen:
            self._in_prompt = self.shared.prefill == "exact"

    def reset(self) -> None:
        super().reset()
        self._in_prompt = self.shared.prefill == "exact"

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, options: AttendOptions) -> Tensor:
        left = (self.shared.prompt_length or 0) - self.seen
        if self._in_prompt and 0 < left < keys.shape[2]:  # the prompt ends within this pass
            head = query[:, :, :, :left], keys[:, :, :left], values[:, :, :left]
            tail = query[:, :, :, left:], keys[:, :, left:], values[:, :, left:]
            return torch.cat([self._attend(*part, options) for part in (head, tail)], dim=3)
        if self._in_prompt:
            out = self._attend_prompt(query, keys, values, options)
        elif self.shared.fused.serves(self._groups, query, keys, values, self.seen, options):
            out = self._attend_fused(query, keys, values, options)
        elif len(self._groups) == 1 and len(self._groups[0].heads) == self.heads:
            out = self._attend_group(self._groups[0], query, keys, values, options)
        else:
            out = values.new_zeros(*query.shape[:-1], values.shape[-1])
            for group in self._groups:
                index = group.index(keys.device)
                of_group = query[:, index], keys[:, index], values[:, index]
                out[:, index] = self._attend_group(group, *of_group, options)
        self.seen += keys.shape[2]
        return out

    def _attend_group(
        self, group: HeadGroup, query: Tensor, keys: Tensor, values: Tensor, options: AttendOptions
    ) -> Tensor:
        return attend_group(group, query, keys, values, options)

    def _attend_prompt(self, query: Tensor, keys: Tensor, values: Tensor, options: AttendOptions) -> Tensor:
        held, length = self.seen, self.shared.prompt_length or 0
        if self._staged is not None and (held or keys.shape[2] < length):
            self._staged.append(keys, values, self.shared.padding)
            keys, values = self._staged.read()
        out = attend_full(query, keys, values, held, options)
        if keys.shape[2] >= length:
            self._store(keys, values)
            self._in_prompt = False
            if self._staged is not None:
                self._staged.reset()
        return out

    def _attend_fused(self, query: Tensor, keys: Tensor, values: Tensor, options: AttendOptions) -> Tensor:
        new = None
        if all(group.takes_one_slot(options.padding) for group in self._groups):
            new = keys, values
            for group in self._groups:
                group.make_room(keys[:, : len(group.heads)], values[:, : len(group.heads)])
        else:
            self._store(keys, values)
        return self.shared.fused.attend(self._table, self._groups, query, self.seen + 1, options, new)

    def _store(self, keys: Tensor, values: Tensor) -> None:
        for group in self._groups:
            index = group.index(keys.device)
            group.append(keys[:, index], values[:, index], self.shared.padding)
