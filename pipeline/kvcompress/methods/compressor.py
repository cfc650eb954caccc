"""Common interface of the compression methods: make a cache, compress one, and let a model read it.

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
from kvcompress.cache.evicting_layer import EvictingLayer, KeepRule
from kvcompress.cache.layer import CacheState, CompressedLayer, Prefill
from kvcompress.cache.ragged_cache import RaggedCache
from kvcompress.cache.ragged_layer import RaggedLayer
from kvcompress.cache.select.layer import SelectLayer
from kvcompress.core.errors import CacheUseError, InputError
from kvcompress.core.retention import FULL, Retention
from kvcompress.models.architecture import Architecture
from kvcompress.models.rotary import Rotation
from kvcompress.models.tensor_parallel import shard_of
from kvcompress.scores.selection_rule import SelectionRule

Positions = Literal["original", "cache"]


class Compressor(ABC):
    """A compression method.

    Parameters
    ----------
    skip_layers : layers that stay full; the cache's bytes include them [default: none]
    positions : "original" keeps the positions of the text, "cache" counts positions inside the cache
        [default: "original"]

    Raises `InputError` for another value of `positions`.
    """

    selection_rule = SelectionRule()

    def __init__(self, skip_layers: Iterable[int] = (), positions: Positions = "original") -> None:
        if positions not in ("original", "cache"):
            raise InputError(f"positions is {positions!r}; expected 'original' or 'cache'")
        self.skip_layers = frozenset(skip_layers)
        self.positions: Positions = positions

    @abstractmethod
    def build_layers(self, architecture: Architecture, shared: CacheState) -> Sequence[CompressedLayer]:
        """Return empty layers for a model, with the heads of this process (`shared.shard`, usually all).

        Raises `InputError` if the method was made for another architecture.
        """

    @property
    def scores(self) -> set[str]:
        """Names of the scores that heads select by."""
        return set()

    @property
    def needs_queries(self) -> bool:
        """True if keys are ranked by queries; then `compress` cannot serve a cache filled without this method."""
        return any(self.selection_rule.score(name).needs_queries for name in self.scores)

    def new_cache(self, config: Any, prefill: Prefill = "exact", prompt_length: int | None = None) -> RaggedCache:
        """Return an empty cache for the model with this config.

        With `prefill="exact"` the prompt attends in full, then every head evicts. The prompt is the first forward pass,
        or the first `prompt_length` tokens (padded columns) if it is fed in chunks. With `"streaming"` every query sees
        only the keys its head holds, and memory is bounded at any length. For a model split among processes
        (`kvcompress.models.tensor_parallel`) the cache has the heads of this process.
        """
        return self._new_cache(Architecture.of_config(config), self._state(config, prefill, prompt_length))

    def compress(self, past_key_values: Cache, attention_mask: Tensor | None = None, config: Any = None) -> RaggedCache:
        """Compress a `DynamicCache`; idempotent.

        A cache made by this method evicts at every pass by itself and is returned unchanged. A left-padded batch needs
        its `attention_mask` over the tokens seen; `positions="cache"` and a model split among processes need the model's
        `config`. Raises `CacheUseError` for any other kind of cache, `InputError` for another architecture.
        """
        if isinstance(past_key_values, RaggedCache):
            if past_key_values.maker is not self:
                self._require_own(past_key_values)
            return past_key_values
        if config is None and self.positions == "cache":
            raise InputError('positions="cache" needs the rotary embedding: pass config=model.config to compress')
        shared = self._state(config)
        architecture = Architecture.of_cache(past_key_values, shared.shard.count)
        return RaggedCache.from_dynamic(past_key_values, self._new_cache(architecture, shared), attention_mask)

    @contextmanager
    def attached(self, model: PreTrainedModel) -> Iterator[PreTrainedModel]:
        """Make `model` read compressed caches in this context; see `kvcompress.cache.dispatch.attached`.

        Raises `InputError` or `UnsupportedModelError` if this method cannot serve the model.
        """
        self._new_cache(Architecture.of_config(model.config), self._state(model.config))
        with dispatch.attached(model):
            yield model

    def _new_cache(self, architecture: Architecture, shared: CacheState) -> RaggedCache:
        for layer in self.skip_layers:
            if not 0 <= layer < architecture.num_layers:
                raise InputError(
                    f"skip_layers names layer {layer}; the model has layers 0 to {architecture.num_layers - 1}"
                )
        return RaggedCache(self.build_layers(architecture, shared), shared, maker=self)

    def _state(self, config: Any, prefill: Prefill = "exact", prompt_length: int | None = None) -> CacheState:
        """Return the shared state of a cache for the model with this config, None if unknown."""
        rotation, rule = Rotation.of(config) if self.positions == "cache" else None, self.selection_rule
        for name in sorted(self.scores):
            if rule.score(name).needs_rotation and config is not None:
                rule = replace(rule, rotation=Rotation.of(config, f"score {name!r}"))
                break
        return CacheState(prefill, prompt_length, rotation, rule, shard_of(config))

    def _require_own(self, cache: RaggedCache) -> None:
        """Raise `CacheUseError` unless `cache` keeps what this method would keep."""
        layers, shard = cache.compressed_layers, cache.shared.shard
        windows = tuple(layer.sliding_window for layer in layers)
        architecture = Architecture(len(layers), layers[0].heads * shard.count, windows)
        state = CacheState(selection_rule=self.selection_rule, shard=shard)
        own = self._new_cache(architecture, state).compressed_layers
        renumbered = cache.shared.rotation is not None
        same = all(layer.keeps_like(other) for layer, other in zip(layers, own, strict=True))
        if not same or renumbered != (self.positions == "cache"):
            raise CacheUseError("this cache was already compressed by another method, which cannot be undone")


class PlanCompressor(Compressor):
    """A method with a retention for each KV head, fixed before the text is known."""

    @abstractmethod
    def plan_for(self, architecture: Architecture) -> Sequence[Sequence[Retention]]:
        """Return the retention `[layer][kv_head]`; `skip_layers` are applied later."""

    def build_layers(self, architecture: Architecture, shared: CacheState) -> Sequence[CompressedLayer]:
        own, layers = shared.shard.own(architecture.num_key_value_heads), []
        for index, (row, window) in enumerate(
            zip(self.plan_for(architecture), architecture.sliding_windows, strict=True)
        ):
            heads = [FULL] * len(row[own]) if index in self.skip_layers else row[own]
            layer = SelectLayer if any(head.chosen for head in heads) else RaggedLayer
            layers.append(layer(heads, shared, window))
        return layers


class UniformCompressor(PlanCompressor):
    """A method with the same retention, `uniform`, for every KV head."""

    def __init__(self, uniform: Retention, skip_layers: Iterable[int] = (), positions: Positions = "original") -> None:
        super().__init__(skip_layers, positions)
        self.uniform = uniform

    def plan_for(self, architecture: Architecture) -> Sequence[Sequence[Retention]]:
        return [[self.uniform] * architecture.num_key_value_heads] * architecture.num_layers

    @property
    def scores(self) -> set[str]:
        return {self.uniform.score} - {""}


class EvictingCompressor(Compressor):
    """A method that keeps the keys that `rule` picks after every forward pass."""

    def __init__(self, rule: KeepRule, skip_layers: Iterable[int]) -> None:
        super().__init__(skip_layers)
        self.rule = rule

    def build_layers(self, architecture: Architecture, shared: CacheState) -> Sequence[CompressedLayer]:
        heads = architecture.num_key_value_heads // shared.shard.count
        return [
            RaggedLayer([FULL] * heads, shared, window)
            if index in self.skip_layers
            else EvictingLayer(heads, shared, self.rule, window)
            for index, window in enumerate(architecture.sliding_windows)
        ]

    def new_cache(self, config: Any, prefill: Prefill = "exact", prompt_length: int | None = None) -> RaggedCache:
        if prefill != "exact" or prompt_length is not None:
            raise InputError(
                "a method that ranks keys after every forward pass has no streaming prefill and no prompt_length:"
                f" got prefill={prefill!r} and prompt_length={prompt_length}"
            )
        return super().new_cache(config, prefill)


def require_count(name: str, value: int, least: int) -> int:
    """Return `value` if it is an int of at least `least`. Raises `InputError` otherwise."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{name} is {value!r}, expected a whole number of at least {least}")
    return value


def require_share(name: str, value: float) -> float:
    """Return `value` if it is in [0, 1]. Raises `InputError` otherwise."""
    if not 0 <= value <= 1:
        raise InputError(f"{name} is {value!r}, expected a number from 0 to 1")
    return value
