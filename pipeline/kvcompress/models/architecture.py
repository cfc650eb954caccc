"""The shape of a model as a cache needs it, read from its config or from a cache that it filled."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from kvcompress.core.errors import CacheUseError, UnsupportedModelError

FULL_ATTENTION, SLIDING_ATTENTION = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class ModelShape:
    """Layers, KV heads, query heads (None where a cache does not tell), and each layer's own sliding window or None."""

    layers: int
    kv_heads: int
    query_heads: int | None
    limits: tuple[int | None, ...]

    @classmethod
    def of_config(cls, config: Any) -> "ModelShape":
        """Raises `UnsupportedModelError` for models without an ordinary KV cache in every layer."""
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedModelError(f"{config.model_type} is an encoder-decoder model, expected a causal LM")
        config = config.get_text_config(decoder=True)
        if getattr(config, "num_kv_shared_layers", 0):
            raise UnsupportedModelError(
                f"{config.model_type} lets {config.num_kv_shared_layers} layers read other layers' keys: not supported"
            )
        if getattr(config, "kv_lora_rank", None):
            raise UnsupportedModelError(
                f"{config.model_type} caches one latent for all its heads (multi-head latent attention): not supported"
            )
        layers, heads = getattr(config, "num_hidden_layers", None), getattr(config, "num_attention_heads", None)
        if not isinstance(layers, int) or not isinstance(heads, int):
            raise UnsupportedModelError(f"{config.model_type} does not describe its layers and attention heads")
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        if getattr(config, "multi_query", False):
            kv_heads = 1
        window = getattr(config, "sliding_window", None)
        if not getattr(config, "use_sliding_window", True):
            window = None
        kinds: Sequence[str] | None = getattr(config, "layer_types", None)
        if kinds is None:
            kinds = [SLIDING_ATTENTION if window else FULL_ATTENTION] * layers
        for index, kind in enumerate(kinds):
            if kind not in (FULL_ATTENTION, SLIDING_ATTENTION):
                raise UnsupportedModelError(f"layer {index} of {config.model_type} is {kind}: not supported")
        return cls(layers, kv_heads, heads, tuple(window if kind == SLIDING_ATTENTION else None for kind in kinds))

    @classmethod
    def of_cache(cls, cache: Any, parts: int = 1) -> "ModelShape":
        """Of a model in so many `parts`, one of which filled this cache.

        Raises `CacheUseError` unless `cache` is a plain, filled `DynamicCache`, which alone can be compressed.
        """
        if not isinstance(cache, Cache):
            raise CacheUseError(
                f"compress takes a transformers Cache, got a {type(cache).__name__}: transformers 5 has no other form"
            )
        if getattr(cache, "offloading", False):
            raise CacheUseError("an offloaded cache cannot be compressed, expected a plain DynamicCache")
        for index, layer in enumerate(getattr(cache, "layers", ())):
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
                raise CacheUseError(
                    f"layer {index} of the cache is a {type(layer).__name__}, expected a plain DynamicCache"
                )
            if not layer.is_initialized or layer.keys.numel() == 0:
                raise CacheUseError(f"layer {index} of the cache holds no tokens yet: start with new_cache instead")
        if not getattr(cache, "layers", ()):
            raise CacheUseError(f"{type(cache).__name__} holds no tokens yet: start with new_cache instead")
        limits = tuple(getattr(layer, "sliding_window", None) for layer in cache.layers)
        return cls(len(cache.layers), cache.layers[0].keys.shape[1] * parts, None, limits)
