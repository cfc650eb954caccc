"""One layer of a compressed cache, with the interface that transformers expects.

`update` only wraps the new keys in a placeholder (`DeferredKV`); the attention function calls `attend`, which reads and
stores. The sequence length is always the number of tokens *seen*: transformers derives positions from it, and the number
of tokens *held* would give all later tokens the same position.
"""

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvcompress.cache.attend import AttendOptions
from kvcompress.cache.fused_decode import FusedDecode
from kvcompress.cache.head_group import HeadGroup
from kvcompress.cache.padding import MaskLength, Padding
from kvcompress.cache.storage import Meter
from kvcompress.core.errors import CacheUseError, InputError
from kvcompress.models.rotary import Rotation
from kvcompress.models.tensor_parallel import WHOLE, HeadShard
from kvcompress.scores.selection_rule import SelectionRule

Prefill = Literal["exact", "streaming"]


@dataclass
class CacheState:
    """Options and state that the layers of one cache share.

    Parameters
    ----------
    prefill : "exact": the prompt attends in full and every head evicts after it; "streaming": every query sees only the
        keys its head still holds [default: "exact"]
    prompt_length : tokens (padded columns) of a prompt that is fed in chunks; None for a prompt that is the first
        forward pass [default: None]
    rotation : renumbers positions inside the cache; None keeps the positions of the text [default: None]
    selection_rule : options of strategy `select`
    shard : shard of the model's heads that the layers hold, if the model is split among processes

    Raises `InputError` for an unknown prefill, or a prompt length below 1 or with a streaming prefill.
    """

    prefill: Prefill = "exact"
    prompt_length: int | None = None
    rotation: Rotation | None = None
    selection_rule: SelectionRule = field(default_factory=SelectionRule)
    shard: HeadShard = WHOLE
    padding: Padding = field(default_factory=Padding)
    meter: Meter = field(default_factory=Meter)
    fused: FusedDecode = field(default_factory=FusedDecode)

    def __post_init__(self) -> None:
        if self.prefill not in ("exact", "streaming"):
            raise InputError(f"prefill is {self.prefill!r}; expected 'exact' or 'streaming'")
        if self.prompt_length is not None and (self.prefill != "exact" or self.prompt_length < 1):
            raise InputError(f"prompt_length is {self.prompt_length}; expected at least 1, and only with exact prefill")


def _refuse() -> NoReturn:
    raise CacheUseError(
        "a compressed cache was given to a model whose attention cannot read it: run the model inside"
        " `with compressor.attached(model):` and leave its attn_implementation alone there"
    )


class DeferredKV:
    """Placeholder for the new keys and values of one layer, `[batch, kv_head, query, head_dim]` each.

    A compressed layer has no single tensor of keys that a dense attention could read. The attention of this package
    unwraps the placeholder. Any other attention (`sdpa`, `eager`, flash) raises a `CacheUseError` at its first access.
    Nothing has been stored by then, so the cache is unchanged.
    """

    __slots__ = ("keys", "layer", "values")

    def __init__(self, layer: "CompressedLayer", keys: Tensor, values: Tensor) -> None:
        self.layer, self.keys, self.values = layer, keys, values

    def __getattr__(self, name: str) -> NoReturn:
        _refuse()

    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse()


class CompressedLayer(CacheLayerMixin):
    """Layer that attends to and stores its KV heads itself; `sliding_window` is the model's own, None without one.

    `groups` are the dense blocks it holds now. A subclass defines what new queries see and which keys stay.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, heads: int, shared: CacheState, sliding_window: int | None = None) -> None:
        super().__init__()
        self.heads, self.shared, self.sliding_window = heads, shared, sliding_window
        self.seen = 0
        self._record_past = False
        self.like: tuple[int, torch.dtype, torch.device] | None = None

    @property
    @abstractmethod
    def groups(self) -> list[HeadGroup]: ...

    @abstractmethod
    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, options: AttendOptions) -> Tensor:
        """Attend and store; shapes as in `attend`. Adds the new columns to `seen`."""

    @abstractmethod
    def fill(self, keys: Tensor, values: Tensor, first: int = 0) -> None:
        """Store the columns `first...` of another cache, `[batch, kv_head, column, head_dim]`, and evict."""

    def fill_from_prompt(self, query: Tensor, keys: Tensor, values: Tensor, scale: float | None) -> None:
        """Fill an empty layer as an exact prefill would, without computing the prompt's attention.

        query `[batch, query_head, token, head_dim]`, keys and values `[batch, kv_head, token, head_dim]`: of the whole
        prompt, without padding. scale: of the attention, None for the usual one.
        """
        self.fill(keys, values)

    @abstractmethod
    def keeps_like(self, other: "CompressedLayer") -> bool:
        """Return whether another layer keeps keys by the same rule."""

    def learn_sliding_window(self, sliding_window: int) -> None:
        """Set the model's own sliding window, for a cache made without the model's config."""
        self.sliding_window = sliding_window

    @property
    def nbytes(self) -> int:
        """Bytes of K and V held now: the size of the real storage."""
        return sum(group.nbytes for group in self.groups)

    @property
    def evidence_nbytes(self) -> int:
        """Bytes kept besides K and V."""
        return 0

    @property
    def tensors(self) -> list[Tensor]:
        """Tensors that a decode step reads or writes."""
        return [tensor for group in self.groups for tensor in group.block.tensors]

    def require_whole(self) -> None:
        """Raise `CacheUseError` if an earlier pass broke off between two of the layer's groups."""

    def require_recordable(self) -> None:
        """Raise `CacheUseError` if the layer cannot record what its rings overwrite."""

    def reserve(self, tokens: int) -> None:
        """Allocate room for `tokens` tokens in all (columns of a padded batch)."""
        for group in self.groups:
            group.reserve(tokens)

    def count(self, columns: int = 1) -> None:
        """Count columns that the caller stores, or has stored, in every group."""
        for group in self.groups:
            group.count(columns)
        self.seen += columns

    def held(self) -> list[int]:
        """Return the tokens held by every KV head (columns of a padded batch)."""
        held = [0] * self.heads
        for group in self.groups:
            for head in group.heads:
                held[head] += group.filled
        return held

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float | None, dropout: float) -> Tensor:
        """Attend from new queries `[batch, query_head, query, head_dim]` -> `[batch, query, query_head, head_dim]`."""
        keys, values = keys.detach(), values.detach()
        batch, heads, new, _ = keys.shape
        self._check(query, keys)
        options = AttendOptions(self.shared.padding, scale, dropout, self.sliding_window, self.shared.rotation)
        grouped = query.view(batch, heads, query.shape[1] // heads, new, -1)
        out = self._attend(grouped, keys, values, options)
        if new == 1:
            return out.reshape(batch, 1, query.shape[1], -1)
        return out.reshape(batch, query.shape[1], new, -1).transpose(1, 2)

    def _check(self, query: Tensor, keys: Tensor) -> None:
        batch, heads = keys.shape[:2]
        if heads != self.heads or query.shape[1] % heads:
            raise CacheUseError(f"this cache was made for {self.heads} KV heads a layer; the model has {heads}")
        like = (batch, keys.dtype, keys.device)
        if self.seen and self.like not in (None, like):
            assert self.like is not None
            raise CacheUseError(
                "this cache holds batch {}, {} on {}, but got batch {}, {} on {}".format(*self.like, *like)
            )
        self.like = like

    def _begin(self, keys: Tensor) -> None:
        """Prepare an empty layer to hold tensors like `keys`."""
        self.like = (keys.shape[0], keys.dtype, keys.device)
        self.is_initialized = True

    # Interface of transformers.

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[DeferredKV, DeferredKV]:
        self.is_initialized = True
        deferred = DeferredKV(self, key_states, value_states)
        return deferred, deferred

    def get_seq_length(self) -> int:
        """Return the tokens seen (columns of a padded batch)."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return MaskLength(self.seen + query_length, self.shared.padding), 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.20

    @property
    def record_past(self) -> bool:
        """True if overwritten ring slots are kept until the next `crop`, for an exact rollback."""
        return self._record_past

    @record_past.setter
    def record_past(self, record: bool) -> None:
        if record:
            self.require_recordable()
        self._record_past = record
        for group in self._all_groups():
            group.recording = record

    def _all_groups(self) -> list[HeadGroup]:
        """Return the groups of the layer, those that hold nothing now among them."""
        return self.groups

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
        for group in self._all_groups():
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
