"""Models of full size with random weights, and caches with random contents, made in place on their device.

The time of a pass does not depend on the numbers, so no download is needed. Nothing here measures anything.
"""

import gc
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, PreTrainedModel, StaticCache

from kvcompress.cache.ragged_cache import RaggedCache
from kvcompress.core.plan import RetentionPlan
from kvcompress.methods.head_aware_compress import HeadAwareCompressor


def config_of(name: str) -> Any:
    """The configuration of pythia-2.8b, llama-3-8b, llama-1b or tiny."""
    if name == "pythia-2.8b":  # 32 heads of 80
        return GPTNeoXConfig(
            vocab_size=50304, hidden_size=2560, intermediate_size=10240, num_hidden_layers=32, num_attention_heads=32,
            max_position_embeddings=2048, rotary_pct=0.25,
        )  # fmt: skip
    if name == "llama-3-8b":  # 32 query heads, 8 KV heads of 128
        return LlamaConfig(
            vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=8, max_position_embeddings=8192, rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        )  # fmt: skip
    if name == "llama-1b":  # 1.1 billion parameters, 4.4 GB in float32
        return LlamaConfig(
            vocab_size=32000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
            num_key_value_heads=8, max_position_embeddings=4096,
        )  # fmt: skip
    return LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=16384,
    )  # fmt: skip


def random_model(config: Any, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A model with random weights, made in `dtype` on `device` without a copy elsewhere."""
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def model_of(folder: Path | None, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model of a folder in safetensors; without a folder, the tiny one with random weights."""
    if folder is None:
        return random_model(config_of("tiny"), dtype, device)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    return model.to(device).eval().requires_grad_(False)


def random_tokens(model: PreTrainedModel, length: int) -> Tensor:
    """Token ids `[token]` on the CPU, the same for every call."""
    vocabulary = model.get_input_embeddings().num_embeddings
    return torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(0))


def kv_heads(config: Any) -> int:
    """KV heads of a layer."""
    count: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return count


def head_size(config: Any) -> int:
    """Elements of a key or value."""
    size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size


def kept_bytes(plan: RetentionPlan, config: Any, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of K and V of one row that a plan keeps of `tokens` tokens, without slack."""
    slots = sum(kept.held(tokens) for layer in plan.layers for kept in layer)
    return 2 * slots * head_size(config) * dtype.itemsize


def filled(plan: RetentionPlan, model: PreTrainedModel, batch: int, seen: int, room: int) -> RaggedCache:
    """A compressed cache after `seen` random tokens, with room for `room` more and no memory beyond its storage."""
    config = model.config
    cache = HeadAwareCompressor.from_plan(plan).new_cache(config, "streaming")
    one = (2, batch, kv_heads(config), 1, head_size(config))
    for layer in cache.compressed_layers:
        keys, values = torch.randn(one, dtype=model.dtype, device=model.device)
        layer.fill(keys, values)
        layer.reserve(seen + room)
        layer.count(seen - 1)
        for group in layer.groups:
            for tensor in group.block.tensors:
                tensor.normal_()
    return cache


def filled_static(model: PreTrainedModel, batch: int, seen: int, room: int) -> StaticCache:
    """Transformers' own full cache after `seen` random tokens; a multiple of 64 slots, which SDPA reads in place."""
    config = model.config
    cache = StaticCache(config=config, max_cache_len=-(-(seen + room) // 64) * 64)
    shape = batch, kv_heads(config), 1, head_size(config)
    one = torch.empty(shape, dtype=model.dtype, device=model.device)
    for layer in cache.layers:
        layer.lazy_initialization(one, one)
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(seen)
    return cache


def release(device: torch.device) -> None:
    """Return unused memory to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
