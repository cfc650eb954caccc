"""Models with random weights and caches with random contents, as large as those people serve, made where they stay.

The speed of a decode step does not depend on the numbers, so no weights are needed beyond their shape: a model is made
on its device in its own precision, and a cache is filled in place, with nothing beside it but what it holds itself.
"""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, PreTrainedModel, StaticCache

from kvcompress.cache.ragged_cache import RaggedCache
from kvcompress.core.errors import InputError
from kvcompress.core.plan import RetentionPlan
from kvcompress.methods.head_aware_compress import HeadAwareCompressor
from kvcompress.models.architecture import Architecture


def config_of(name: str) -> Any:
    """The shape of a model: pythia-2.8b (32 heads of 80), llama-3-8b (32 query heads, 8 KV heads of 128), or tiny."""
    if name == "pythia-2.8b":
        return GPTNeoXConfig(
            vocab_size=50304, hidden_size=2560, intermediate_size=10240, num_hidden_layers=32, num_attention_heads=32,
            max_position_embeddings=2048, rotary_pct=0.25,
        )  # fmt: skip
    if name == "llama-3-8b":
        return LlamaConfig(
            vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=8, max_position_embeddings=8192, rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        )  # fmt: skip
    if name == "tiny":
        return LlamaConfig(
            vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8,
            num_key_value_heads=4,
        )  # fmt: skip
    raise InputError(f"model is {name!r}, expected pythia-2.8b, llama-3-8b or tiny")


def random_model(config: Any, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A model of this shape with random weights, never held in another precision or on another device."""
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def head_size(config: Any) -> int:
    """Elements of a key or value."""
    size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size


def kept_bytes(plan: RetentionPlan, config: Any, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of K and V, of one row, that a plan keeps of `tokens` tokens: no slack."""
    slots = sum(kept.held(tokens) for layer in plan.layers for kept in layer)
    return 2 * slots * head_size(config) * dtype.itemsize


def occupied(plan: RetentionPlan, model: PreTrainedModel, batch: int, seen: int, room: int) -> RaggedCache:
    """A cache that saw `seen` random tokens, with room for `room` more; its storage is all that it takes."""
    config = model.config
    cache = HeadAwareCompressor.from_plan(plan).new_cache(config, "streaming")
    one = (2, batch, Architecture.of_config(config).num_key_value_heads, 1, head_size(config))
    for layer in cache.compressed_layers:
        keys, values = torch.randn(one, dtype=model.dtype, device=model.device)
        layer.fill(keys, values)
        layer.reserve(seen + room)
        layer.count(seen - 1)
        for group in layer.groups:
            for tensor in group.block.tensors:
                tensor.normal_()
    return cache


def occupied_static(model: PreTrainedModel, batch: int, seen: int, room: int) -> StaticCache:
    """As `occupied`, transformers' own full cache; a multiple of 64 slots, which its masked attention reads in place."""
    config = model.config
    cache = StaticCache(config=config, max_cache_len=-(-(seen + room) // 64) * 64)
    one = torch.empty(
        batch,
        Architecture.of_config(config).num_key_value_heads,
        1,
        head_size(config),
        dtype=model.dtype,
        device=model.device,
    )
    for layer in cache.layers:
        layer.lazy_initialization(one, one)
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(seen)
    return cache
