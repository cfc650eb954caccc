"""One decode step with compressed caches and with transformers' own, in turns, so that a busy machine slows all of them.

Two things are timed: the whole decode step of the model, and append + attention of all layers alone. Caches are filled
with random keys and values, because the time does not depend on them. It measures time, not quality, and no memory
beyond the bytes that a cache holds.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvcompress.cache.ragged_cache import RaggedCache
from kvcompress.cache.storage import storage_bytes
from kvcompress.core.errors import InputError
from kvcompress.core.plan import RetentionPlan
from kvcompress.core.retention import FULL, Retention
from kvcompress.evaluation.timing import Spread, devices_of, timed, times_faster
from kvcompress.methods.head_aware_compress import HeadAwareCompressor
from kvcompress.models.architecture import Architecture

DENSE = "DynamicCache"
WARM_UP = 2  # rounds that are thrown away


@dataclass
class Cost:
    """One contender at one context: median milliseconds with percentiles; ratios say how much faster than `DENSE`."""

    contender: str
    context: int
    batch: int
    megabytes: float
    step_ms: float
    step_p10: float
    step_p90: float
    step_ratio: float
    attention_ms: float
    attention_p10: float
    attention_p90: float
    attention_ratio: float


def appended(rounds: int) -> int:
    """Tokens that `measure` appends to every cache: one a step, and one a time that attention runs alone."""
    return 2 * (rounds + WARM_UP)


def plan_of(config: Any, context: int, share: float, full_heads: float) -> RetentionPlan:
    """A plan that keeps `share` of the slots at `context` tokens: a fraction of heads full, the rest 4 sinks + window.

    Raises `InputError` where the full heads alone exceed the share.
    """
    shape = Architecture.of_config(config)
    heads = shape.num_layers * shape.num_key_value_heads
    full = [share == 1 or int((i + 1) * full_heads) > int(i * full_heads) for i in range(heads)]
    rest = heads - sum(full)
    slots = int((share * heads - sum(full)) * context / rest) if rest else 0
    if rest and slots < 5:
        raise InputError(f"{sum(full)} full heads of {heads} leave {slots} slots a head at a share of {share}")
    kept = [FULL if whole else Retention(4, slots - 4) for whole in full]
    rows = tuple(tuple(kept[i : i + shape.num_key_value_heads]) for i in range(0, heads, shape.num_key_value_heads))
    return RetentionPlan(rows, config.num_attention_heads)


def fill(cache: Any, config: Any, batch: int, context: int, dtype: torch.dtype, device: torch.device) -> Any:
    """Fill a cache with random keys and values as if `context` tokens had been seen."""
    shape = Architecture.of_config(config)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for index in range(shape.num_layers):
        keys, values = torch.randn(2, batch, shape.num_key_value_heads, context, size, dtype=dtype, device=device)
        layer = cache.layers[index]
        if isinstance(cache, DynamicCache):
            layer.update(keys, values)
        else:
            layer.fill(keys, values)
    return cache


def attention_step(cache: Any, query: Tensor, keys: Tensor, values: Tensor) -> None:
    """Append one token to every layer and attend, with nothing of the model around it."""
    module = SimpleNamespace(num_key_value_groups=query.shape[1] // keys.shape[1], is_causal=True)
    for layer in cache.layers:
        if isinstance(cache, DynamicCache):
            held_keys, held_values = layer.update(keys, values)
            sdpa_attention_forward(module, query, held_keys, held_values, None)
        else:
            layer.attend(query, keys, values, None, 0.0)


def held_bytes(cache: Any) -> int:
    """Bytes of K and V behind a compressed cache or a `DynamicCache` now, in the memory that they really take."""
    if isinstance(cache, RaggedCache):
        return cache.nbytes
    return storage_bytes(held for layer in cache.layers if layer.is_initialized for held in (layer.keys, layer.values))


@torch.no_grad()
def measure(
    model: PreTrainedModel, plans: Mapping[str, RetentionPlan], context: int, batch: int, rounds: int
) -> list[Cost]:
    """Time every plan and `DynamicCache` in turns, `rounds` times each after `WARM_UP` rounds that are thrown away.

    Caches start with `context` tokens and have `appended(rounds)` more at the end, where their bytes are counted.
    """
    config, device, dtype, devices = model.config, model.device, model.dtype, devices_of(model)
    compressors = {name: HeadAwareCompressor.from_plan(plan) for name, plan in plans.items()}
    caches: dict[str, Any] = {DENSE: DynamicCache(config=config)}
    caches |= {name: compressor.new_cache(config, "streaming") for name, compressor in compressors.items()}
    for cache in caches.values():
        fill(cache, config, batch, context, dtype, device)
    shape = Architecture.of_config(config)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    query = torch.randn(batch, config.num_attention_heads, 1, size, dtype=dtype, device=device)
    keys, values = torch.randn(2, batch, shape.num_key_value_heads, 1, size, dtype=dtype, device=device)
    ids = torch.ones(batch, 1, dtype=torch.long, device=device)
    steps: dict[str, list[float]] = {name: [] for name in caches}
    alone: dict[str, list[float]] = {name: [] for name in caches}
    for turn in range(rounds + WARM_UP):
        order = list(caches) if turn % 2 else list(reversed(caches))
        for name in order:
            reading = compressors[name].attached(model) if name in compressors else nullcontext()
            with reading:
                act = partial(model, ids, past_key_values=caches[name], use_cache=True)
                steps[name].append(timed(act, devices)[1])
        for name in order:
            alone[name].append(timed(partial(attention_step, caches[name], query, keys, values), devices)[1])
    costs = []
    for name, cache in caches.items():
        step, attention = steps[name][WARM_UP:], alone[name][WARM_UP:]
        of_step = times_faster(steps[DENSE][WARM_UP:], step)
        of_attention = times_faster(alone[DENSE][WARM_UP:], attention)
        spreads = [*Spread.of(step), of_step, *Spread.of(attention), of_attention]
        costs.append(Cost(name, context, batch, held_bytes(cache) / 1e6, *spreads))
    return costs
