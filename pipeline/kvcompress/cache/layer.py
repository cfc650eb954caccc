"""One layer of a compressed cache, as transformers sees it.

What transformers calls `update` only wraps the new keys up (`Pending`); the attention function calls `attend`, which
reads and stores. Sequence length is always tokens *seen*: transformers derives positions from it, and tokens *held*
there would give every later token one and the same rotation.
"""

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvcompress.cache.attend import Reading
from kvcompress.cache.deferred_kv import Pending
from kvcompress.cache.fused_decode import Fused
from kvcompress.cache.head_group import Group
from kvcompress.cache.padding import MaskLength, Padding
from kvcompress.cache.select.head_group import ChoosingGroup
from kvcompress.cache.select.side_stream import Beside
from kvcompress.cache.select.types import Evidence
from kvcompress.cache.storage import Meter
from kvcompress.core.errors import CacheUseError, InputError
from kvcompress.models.rotary import Rotation
from kvcompress.models.tensor_parallel import WHOLE, HeadShard
from kvcompress.scores.selection_rule import SelectionRule

Prefill = Literal["exact", "streaming"]


@dataclass
class Shared:
    """What the layers of one cache have in common.

    `prefill`: with "exact" the prompt attends in full and every head forgets after it; with "streaming" every query
    sees its head's keys alone. The prompt is the first forward pass, or the first `prompt_length` tokens where that is
    given (a prompt fed in chunks). `part`: which of the model's heads the layers hold, where it is split among processes.
    """

    prefill: Prefill = "exact"
    prompt_length: int | None = None
    rotation: Rotation | None = None
    padding: Padding = field(default_factory=Padding)
    meter: Meter = field(default_factory=Meter)
    fused: Fused = field(default_factory=Fused)
    choosing: SelectionRule = field(default_factory=SelectionRule)
    shard: HeadShard = WHOLE
    beside: Beside = field(default_factory=Beside)

    def __post_init__(self) -> None:
        if self.prefill not in ("exact", "streaming"):
            raise InputError(f"prefill is {self.prefill!r}, expected 'exact' or 'streaming'")
        if self.prompt_length is not None and (self.prefill != "exact" or self.prompt_length < 1):
            raise InputError(f"prompt_length is {self.prompt_length}, expected at least 1, and only with exact prefill")


class CompressedLayer(CacheLayerMixin):
    """A layer that reads and stores its KV heads itself; `limit` is the model's own sliding window, if any.

    `groups` are the dense blocks it holds now. A subclass says how new keys are seen and which stay.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False
    last = False  # of its cache

    def __init__(self, heads: int, shared: Shared, limit: int | None = None) -> None:
        super().__init__()
        self.heads, self.shared, self.limit = heads, shared, limit
        self.seen = 0
        self._record_past = False
        self.like: tuple[int, torch.dtype, torch.device] | None = None

    @property
    @abstractmethod
    def groups(self) -> list[Group]: ...

    def _all_groups(self) -> list[Group]:
        """Also those that hold nothing now."""
        return self.groups

    @abstractmethod
    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, reading: Reading) -> Tensor:
        """Shapes as in `reading`; counts `seen` up."""

    @abstractmethod
    def fill(self, keys: Tensor, values: Tensor, first: int = 0) -> None:
        """Take over the columns `first...` of another cache, `[batch, kv_head, column, head_dim]`, and forget."""

    def fill_from_prompt(self, query: Tensor, keys: Tensor, values: Tensor, scale: float | None) -> None:
        """Fill an empty layer as an exact prefill would, without computing the prompt's attention.

        query `[batch, query_head, token, head_dim]`, keys and values `[batch, kv_head, token, head_dim]`: of the whole
        prompt, without padding. scale: of the attention, None for the usual one.
        """
        self.fill(keys, values)

    @abstractmethod
    def keeps_like(self, other: "CompressedLayer") -> bool:
        """Whether another layer keeps by the same rule."""

    def learn_limit(self, limit: int) -> None:
        """Hear of the model's own sliding window only with the first pass."""
        self.limit = limit

    @property
    def nbytes(self) -> int:
        """Bytes of K and V that this layer holds now: the size of the real storage."""
        return sum(group.nbytes for group in self.groups)

    @property
    def evidence_nbytes(self) -> int:
        """Bytes of what is kept besides K and V to choose keys by."""
        return 0

    @property
    def standing_tensors(self) -> tuple[Tensor, ...]:
        """Tensors besides the groups' that a decode step writes."""
        return ()

    def due(self) -> Iterable[tuple[ChoosingGroup, Evidence]]:
        """Groups that have to choose keys before the next pass, and what by."""
        return ()

    def require_whole(self) -> None:
        """Raise `CacheUseError` where an earlier pass ended in an error between two of the layer's groups."""

    def require_recordable(self) -> None:
        """Raise `CacheUseError` where what the rings overwrite cannot be kept."""

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens in all (columns, where the batch is padded)."""
        for group in self.groups:
            group.reserve(tokens)

    def count(self, columns: int = 1) -> None:
        """Count columns that someone else stores, or has stored, in every group."""
        for group in self.groups:
            group.count(columns)
        self.seen += columns

    def held(self) -> list[int]:
        """Tokens held by every KV head (columns, where the batch is padded)."""
        held = [0] * self.heads
        for group in self.groups:
            for head in group.heads:
                held[head] += group.filled
        return held

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float | None, dropout: float) -> Tensor:
        """Attention of new queries `[batch, query_head, query, head_dim]` -> `[batch, query, query_head, ...]`."""
        keys, values = keys.detach(), values.detach()
        batch, heads, new, _ = keys.shape
        self._check(query, keys)
        reading = Reading(self.shared.padding, scale, dropout, self.limit, self.shared.rotation)
        grouped = query.view(batch, heads, query.shape[1] // heads, new, -1)
        out = self._attend(grouped, keys, values, reading)
        if self.last:
            self.shared.beside.join()
        if new == 1:
            return out.reshape(batch, 1, query.shape[1], -1)
        return out.reshape(batch, query.shape[1], new, -1).transpose(1, 2)

    def _check(self, query: Tensor, keys: Tensor) -> None:
        batch, heads = keys.shape[:2]
        if heads != self.heads or query.shape[1] % heads:
            raise CacheUseError(f"this cache was made for {self.heads} KV heads a layer, the model has {heads}")
        like = (batch, keys.dtype, keys.device)
        if self.seen and self.like not in (None, like):
            assert self.like is not None
            raise CacheUseError(
                "this cache holds batch {}, {} on {}, but got batch {}, {} on {}".format(*self.like, *like)
            )
        self.like = like

    # What transformers asks of a layer.

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Pending, Pending]:
        self.is_initialized = True
        pending = Pending(self, key_states, value_states)
        return pending, pending

    def get_seq_length(self) -> int:
        """Tokens seen (columns, where the batch is padded)."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return MaskLength(self.seen + query_length, self.shared.padding), 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.20

    @property
    def record_past(self) -> bool:
        """Whether what the rings overwrite is kept until the next `crop`, so that decoding can roll back exactly."""
        return self._record_past

    @record_past.setter
    def record_past(self, record: bool) -> None:
        self._record_past = record
        for group in self._all_groups():
            group.recording = record

    def activate_past_recording(self) -> None:
        self.record_past = True

    def can_crop(self, tokens: int) -> bool:
        return all(group.can_crop(tokens) for group in self.groups)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens. `RaggedCache.crop` checks all layers first."""
        tokens = abs(tokens_to_remove)
        for group in self.groups:
            group.crop(tokens)
        self.seen -= tokens

    def reset(self) -> None:
        self.record_past = False
        for group in self.groups:
            group.reset()
        self.seen, self.like, self.is_initialized = 0, None, False

    def select_rows(self, rows: Tensor) -> None:
        for group in self.groups:
            group.select_rows(rows)
        if self.like is not None:
            self.like = (rows.shape[0], *self.like[1:])

    def offload(self) -> None:
        raise CacheUseError("a compressed cache cannot be offloaded")

    prefetch = offload
