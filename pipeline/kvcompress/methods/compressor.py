"""What every compression method can do: make a cache, compress one, and let a model read it.

```python
with compressor.attached(model):
    cache = compressor.new_cache(model.config)
    model.generate(**inputs, past_key_values=cache)
```
or, a pass at a time, `past = compressor.compress(model(ids, past_key_values=past, use_cache=True).past_key_values)`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvcompress.cache import dispatch
from kvcompress.cache.convert import convert
from kvcompress.cache.layer import CompressedLayer, Prefill, Shared
from kvcompress.cache.ragged_cache import RaggedCache
from kvcompress.cache.ragged_layer import RaggedLayer
from kvcompress.cache.select.layer import ChoosingLayer
from kvcompress.core.errors import CacheUseError, InputError
from kvcompress.core.retention import FULL, Retention
from kvcompress.models.architecture import Architecture
from kvcompress.models.rotary import Rotation
from kvcompress.models.tensor_parallel import shard_of
from kvcompress.scores.selection_rule import SelectionRule

Positions = Literal["original", "cache"]


class Compressor(ABC):
    """A compression method. `skip_layers` stay full (and are counted in the cache's bytes).

    `positions`: "original" keeps every key at its place in the text, "cache" counts places inside the cache. Raises
    `InputError` for another word.
    """

    def __init__(self, skip_layers: Iterable[int] = (), positions: Positions = "original") -> None:
        if positions not in ("original", "cache"):
            raise InputError(f"positions is {positions!r}, expected 'original' or 'cache'")
        self.skip_layers = frozenset(skip_layers)
        self.positions: Positions = positions

    @property
    def needs_queries(self) -> bool:
        """Whether it chooses by queries, so that it can make a cache but not `compress` one that was filled without it."""
        return False

    @abstractmethod
    def layers(self, shape: Architecture, shared: Shared) -> Sequence[CompressedLayer]:
        """Empty layers for a model, of the heads that are this process's (`shared.shard`, nearly always all).

        Raises `InputError` where the method was made for another architecture.
        """

    def new_cache(self, config: Any, prefill: Prefill = "exact", prompt_length: int | None = None) -> RaggedCache:
        """An empty cache for the model with this config.

        `prefill="exact"`: the prompt attends in full, then every head forgets; the prompt is the first forward pass,
        or the first `prompt_length` tokens (padded columns) where it is fed in chunks. `"streaming"`: every query sees
        its head's keys alone, and memory is bounded at any length. Of a model split among processes (`kvcompress.models.tensor_parallel`)
        it is for this process's heads.
        """
        shared = self._shared(config, prefill, prompt_length)
        return self._cache(Architecture.of_config(config), shared)

    def compress(self, past_key_values: Cache, attention_mask: Tensor | None = None, config: Any = None) -> RaggedCache:
        """A `DynamicCache` -> the compressed cache with what this method keeps of it; idempotent.

        A cache that this method made already forgets by itself at every pass and comes back as it is. A left-padded
        batch needs its `attention_mask` over the tokens seen; `positions="cache"` and a model split among processes need
        the model's `config`. Raises `CacheUseError` for any other kind of cache, `InputError` for one of another
        architecture.
        """
        if isinstance(past_key_values, RaggedCache):
            if past_key_values.maker is not self:
                self._require_own(past_key_values)
            return past_key_values
        if config is None and self.positions == "cache":
            raise InputError('positions="cache" has to know the rotary embedding: pass config=model.config to compress')
        shared = self._shared(config)
        shape = Architecture.of_cache(past_key_values, shared.shard.count)
        cache = self._cache(shape, shared)
        return convert(past_key_values, cache, attention_mask)

    @contextmanager
    def attached(self, model: PreTrainedModel) -> Iterator[PreTrainedModel]:
        """Let `model` read compressed caches here; see `kvcompress.cache.dispatch.attached`.

        Raises `InputError` or `UnsupportedModelError` if this method cannot serve the model.
        """
        self._cache(Architecture.of_config(model.config), self._shared(model.config))
        with dispatch.attached(model):
            yield model

    def _cache(self, shape: Architecture, shared: Shared) -> RaggedCache:
        for layer in self.skip_layers:
            if not 0 <= layer < shape.num_layers:
                raise InputError(f"skip_layers names layer {layer}, the model has layers 0 to {shape.num_layers - 1}")
        return RaggedCache(self.layers(shape, shared), shared, maker=self)

    def _shared(self, config: Any, prefill: Prefill = "exact", prompt_length: int | None = None) -> Shared:
        rotation, choosing = self._rotation(config), self._choosing(config)
        return Shared(prefill, prompt_length, rotation, choosing=choosing, shard=shard_of(config))

    def _rotation(self, config: Any) -> Rotation | None:
        return Rotation.of(config) if self.positions == "cache" else None

    def _choosing(self, config: Any) -> SelectionRule:
        """How heads that select do it, for the model with this config (None: not known)."""
        return SelectionRule()

    def _require_own(self, cache: RaggedCache) -> None:
        """Raise unless `cache` keeps what this method would keep."""
        layers, shard = cache.compressed_layers, cache.shared.shard
        limits = tuple(layer.limit for layer in layers)
        shape = Architecture(len(layers), layers[0].heads * shard.count, limits)
        wanted = self._cache(shape, Shared(choosing=self._choosing(None), shard=shard)).compressed_layers
        renumbered = cache.shared.rotation is not None
        same = all(layer.keeps_like(other) for layer, other in zip(layers, wanted, strict=True))
        if not same or renumbered != (self.positions == "cache"):
            raise CacheUseError("this cache was already compressed by another method, which cannot be undone")


class PlanCompressor(Compressor):
    """A method that says beforehand what each KV head keeps, or how many keys it may choose.

    `choosing`: how heads that select choose; the model's rotary embedding is added to it where a score needs that.
    """

    choosing = SelectionRule()

    @abstractmethod
    def kept(self, shape: Architecture) -> Sequence[Sequence[Retention]]:
        """`[layer][kv_head]`, before `skip_layers`."""

    def retention(self, shape: Architecture) -> list[list[Retention]]:
        """What each KV head of a model keeps, `[layer][kv_head]`, skipped layers full."""
        kept = self.kept(shape)
        return [
            [FULL] * shape.num_key_value_heads if i in self.skip_layers else list(layer) for i, layer in enumerate(kept)
        ]

    def layers(self, shape: Architecture, shared: Shared) -> Sequence[CompressedLayer]:
        own = shared.shard.own(shape.num_key_value_heads)
        rows = zip((kept[own] for kept in self.retention(shape)), shape.sliding_windows, strict=True)
        return [self.layer(kept, shared, limit) for kept, limit in rows]

    def layer(self, kept: Sequence[Retention], shared: Shared, limit: int | None) -> CompressedLayer:
        """An empty layer whose heads keep this; `limit` is the model's own sliding window, None without one."""
        choosing = any(head.chosen for head in kept)
        return ChoosingLayer(kept, shared, limit) if choosing else RaggedLayer(kept, shared, limit)

    def scores(self) -> set[str]:
        """Names of the scores that heads select by."""
        return set()

    @property
    def needs_queries(self) -> bool:
        return any(self.choosing.score(name).needs_queries for name in self.scores())

    def _choosing(self, config: Any) -> SelectionRule:
        for name in sorted(self.scores()):
            if self.choosing.score(name).needs_rotation and config is not None:
                return replace(self.choosing, rotation=Rotation.of(config, f"score {name!r}"))
        return self.choosing


class UniformCompressor(PlanCompressor):
    """Every KV head keeps the same."""

    def __init__(self, uniform: Retention, skip_layers: Iterable[int] = (), positions: Positions = "original") -> None:
        super().__init__(skip_layers, positions)
        self.uniform = uniform

    def kept(self, shape: Architecture) -> Sequence[Sequence[Retention]]:
        return [[self.uniform] * shape.num_key_value_heads] * shape.num_layers

    def scores(self) -> set[str]:
        return {self.uniform.score} - {""}


def require_count(name: str, value: int, least: int) -> int:
    """`value` if it is an int of at least `least`. Raises `InputError` otherwise."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{name} is {value!r}, expected a whole number of at least {least}")
    return value


def require_share(name: str, value: float) -> float:
    """`value` if it is in [0, 1]. Raises `InputError` otherwise."""
    if not 0 <= value <= 1:
        raise InputError(f"{name} is {value!r}, expected a number from 0 to 1")
    return value
