"""A layer that keeps what a plan says, head by head.

KV heads with equal retention share one dense block, so a decode step costs one attention call a block, or one launch
for all of them where the GPU's kernel serves (`fused`); a pruned head has no block, holds nothing and contributes
exactly zero. In an exact prefill the prompt attends in full before the heads forget; after it, and in a streaming
prefill from the start, every query sees its head's keys alone.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from kvcompress.cache.attend import Reading, attend_all, read
from kvcompress.cache.fused_decode import Heads
from kvcompress.cache.head_group import Group
from kvcompress.cache.layer import CompressedLayer, Shared
from kvcompress.core.errors import CacheUseError
from kvcompress.core.retention import FULL, Retention

# Which KV heads of a layer: a slice where they are neighbours, so that taking them copies nothing.
Index = slice | Tensor


def clipped(kept: Retention, limit: int | None) -> Retention:
    """What is worth holding where the model itself sees no further back than `limit` keys: nothing it cannot see.

    Sinks are given up only where the window reaches the limit; before that the reading hides them once they are out of
    the model's sight. A head that selects and has slots for all that the model sees holds just that.
    """
    if limit is None or kept.pruned:
        return kept
    if kept.unbounded or kept.window >= limit or (kept.chosen and kept.sinks + kept.window + kept.chosen >= limit):
        return Retention(0, limit)
    return kept


class RaggedLayer(CompressedLayer):
    """`kept[kv_head]` says what each KV head keeps; `limit` is the model's own sliding window, None without one."""

    def __init__(self, kept: Sequence[Retention], shared: Shared, limit: int | None = None) -> None:
        super().__init__(len(kept), shared, limit)
        self._keep(kept)
        # A prompt that comes in several passes attends in full until its end, so until then all of it is held.
        self._prompt = Group(FULL, range(self.heads), shared.meter) if shared.prompt_length else None
        self._in_prompt = shared.prefill == "exact"

    def _keep(self, kept: Sequence[Retention]) -> None:
        """Begin with heads that keep this and hold nothing."""
        self.wanted = list(kept)
        self.kept = [clipped(head, self.limit) for head in kept]
        alike: dict[Retention, list[int]] = {}
        for head, keeps in enumerate(self.kept):
            if not keeps.pruned:
                alike.setdefault(keeps, []).append(head)
        self._blocks = [self._group(keeps, heads) for keeps, heads in alike.items()]
        self._indices: list[Index] = [index_of(group.heads) for group in self._blocks]
        self._places = Heads(self.heads)
        self._whole = len(self._blocks) == 1 and len(self._blocks[0].heads) == self.heads

    def _group(self, keeps: Retention, heads: list[int]) -> Group:
        return Group(keeps, heads, self.shared.meter)

    @property
    def groups(self) -> list[Group]:
        """Where keys are now: the staged prompt until it is complete, the heads' own blocks from then on."""
        return [self._prompt] if self._prompt is not None and self._in_prompt else self._blocks

    def _all_groups(self) -> list[Group]:
        return [*self._blocks, *([self._prompt] if self._prompt else [])]

    def positions(self, row: int = 0) -> list[list[int]]:
        """Real positions that every KV head holds in one row of the batch, ascending."""
        self.shared.beside.join()
        positions: list[list[int]] = [[] for _ in range(self.heads)]
        for group in self.groups:
            for head, held in zip(group.heads, group.held_positions(row, self.shared.padding), strict=True):
                positions[head] = held
        return positions

    def require_whole(self) -> None:
        for group in self.groups:
            if group.seen != self.seen:
                raise CacheUseError(
                    f"an earlier forward pass broke off within a layer that saw {self.seen} tokens: heads {group.heads} have"
                    f" stored {group.seen}; `reset` the cache and run the text again"
                )

    def keeps_like(self, other: CompressedLayer) -> bool:
        return isinstance(other, RaggedLayer) and self.wanted == other.wanted

    def fill(self, keys: Tensor, values: Tensor, first: int = 0) -> None:
        self.like = (keys.shape[0], keys.dtype, keys.device)
        self.is_initialized = True
        for group in self._blocks:
            group.seen = first
        self._store(keys, values)
        self.seen, self._in_prompt = first + keys.shape[2], False

    def reserve(self, tokens: int) -> None:
        if self._in_prompt:
            raise CacheUseError(
                f"reserve: {self.seen} tokens of the prompt were seen, room can be made once it is complete"
            )
        super().reserve(tokens)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if not self.seen:
            self._in_prompt = self.shared.prefill == "exact"

    def reset(self) -> None:
        super().reset()
        for group in self._all_groups():
            group.reset()
        self._in_prompt = self.shared.prefill == "exact"

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, reading: Reading) -> Tensor:
        left = (self.shared.prompt_length or 0) - self.seen
        if self._in_prompt and 0 < left < keys.shape[2]:  # the prompt ends within this pass
            head = query[:, :, :, :left], keys[:, :, :left], values[:, :, :left]
            tail = query[:, :, :, left:], keys[:, :, left:], values[:, :, left:]
            return torch.cat([self._attend(*part, reading) for part in (head, tail)], dim=3)
        if self._in_prompt:
            out = self._attend_prompt(query, keys, values, reading)
        elif self.shared.fused.serves(self._blocks, query, keys, values, self.seen, reading):
            out = self._attend_at_once(query, keys, values, reading)
        elif self._whole:
            out = read(self._blocks[0], query, keys, values, reading)
        else:
            out = values.new_zeros(*query.shape[:-1], values.shape[-1])
            for i, group in enumerate(self._blocks):
                index = self._index_on(i, keys.device)
                out[:, index] = read(group, query[:, index], keys[:, index], values[:, index], reading)
        self.seen += keys.shape[2]
        return out

    def _attend_prompt(self, query: Tensor, keys: Tensor, values: Tensor, reading: Reading) -> Tensor:
        held, length = self.seen, self.shared.prompt_length or 0
        if self._prompt is not None and (held or keys.shape[2] < length):
            self._prompt.append(keys, values, self.shared.padding)
            keys, values = self._prompt.read()
        out = attend_all(query, keys, values, held, reading)
        if keys.shape[2] >= length:
            self._store(keys, values)
            self._in_prompt = False
            if self._prompt is not None:
                self._prompt.reset()
        return out

    def _attend_at_once(self, query: Tensor, keys: Tensor, values: Tensor, reading: Reading) -> Tensor:
        new = None
        if all(group.takes_plainly(reading.padding) for group in self._blocks):
            new = keys, values
            for group in self._blocks:
                group.make_room(keys[:, : len(group.heads)], values[:, : len(group.heads)])
        else:
            self._store(keys, values)
        return self.shared.fused.attend(self._places, self._blocks, query, self.seen + 1, reading, new)

    def _store(self, keys: Tensor, values: Tensor) -> None:
        for i in range(len(self._blocks)):
            self._append(i, keys, values)

    def _append(self, group: int, keys: Tensor, values: Tensor) -> None:
        index = self._index_on(group, keys.device)
        self._blocks[group].append(keys[:, index], values[:, index], self.shared.padding)

    def _index_on(self, group: int, device: torch.device) -> Index:
        index = self._indices[group]
        if isinstance(index, Tensor) and index.device != device:
            index = self._indices[group] = index.to(device, non_blocking=True)
        return index


def index_of(heads: list[int]) -> Index:
    """What takes these heads out of a tensor, without a copy where they lie together."""
    if all(after == before + 1 for before, after in pairwise(heads)):
        return slice(heads[0], heads[-1] + 1)
    return torch.tensor(heads)
