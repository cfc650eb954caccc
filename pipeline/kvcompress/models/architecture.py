"""Architecture of a causal language model: layers, heads and sliding windows, from its config or a filled cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from kvcompress.core.errors import CacheUseError, UnsupportedModelError

FULL_ATTENTION, SLIDING_ATTENTION = "full_attention", "sliding_attention"
UNLIMITED = 2**31 - 1  # max_context of models whose config names none


@dataclass(frozen=True)
class Architecture:
    """Numbers of the whole model, also where tensor parallelism splits it among processes.

    sliding_windows: the model's own sliding window of each layer in tokens, None without one.
    num_attention_heads, max_context (tokens): 0 if read from a cache, which does not reveal them.
    """

    num_layers: int
    num_key_value_heads: int
    sliding_windows: tuple[int | None, ...]
    num_attention_heads: int = 0
    head_dim: int = 0
    max_context: int = 0

    @classmethod
    def of_config(cls, config: Any) -> "Architecture":
        """Read a transformers config.

        Raises `UnsupportedModelError` for a model without an ordinary KV cache in every layer.
        """
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedModelError(f"{config.model_type} is an encoder-decoder model, expected a causal LM")
        config = config.get_text_config(decoder=True)
        if getattr(config, "num_kv_shared_layers", 0):
            raise UnsupportedModelError(
                f"{config.model_type} shares the keys of other layers in {config.num_kv_shared_layers} layers:"
                " not supported"
            )
        if getattr(config, "kv_lora_rank", None):
            raise UnsupportedModelError(
                f"{config.model_type} caches one latent for all its heads (multi-head latent attention): not supported"
            )
        layers, heads = getattr(config, "num_hidden_layers", None), getattr(config, "num_attention_heads", None)
        if not isinstance(layers, int) or not isinstance(heads, int):
            raise UnsupportedModelError(f"{config.model_type} does not describe its layers and attention heads")
        head_dim = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 0) // heads
        if not head_dim:
            raise UnsupportedModelError(f"{config.model_type} does not describe the size of its attention heads")
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
        windows = tuple(window if kind == SLIDING_ATTENTION else None for kind in kinds)
        context = int(getattr(config, "max_position_embeddings", None) or UNLIMITED)
        return cls(layers, kv_heads, windows, heads, int(head_dim), context)

    @classmethod
    def of_cache(cls, cache: Any, shards: int = 1) -> "Architecture":
        """Read a plain, filled `DynamicCache`, the only cache that can be compressed.

        `shards`: number of processes that split the model by tensor parallelism; the cache has one process's heads.
        Raises `CacheUseError` for any other cache.
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
        windows = tuple(getattr(layer, "sliding_window", None) for layer in cache.layers)
        _, kv_heads, _, head_dim = cache.layers[0].keys.shape
        return cls(len(cache.layers), kv_heads * shards, windows, head_dim=head_dim)
