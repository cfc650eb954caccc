"""Time of one decode step with compressed caches and with the default cache of transformers, and how it grows.

Two things are timed, all caches in turns: the whole decode step of the model, and append + attention of all layers alone.
Caches are filled with random keys and values, because the time does not depend on them.

The lower limit of a step is one read of all weights and of all bytes of the cache, and of append + attention one read of
the cache, at the speed of copying a large tensor on the same device just before.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvcompress.cache.ragged_cache import RaggedCache
from kvcompress.cache.storage import storage_bytes
from kvcompress.core.errors import InputError
from kvcompress.core.plan import RetentionPlan
from kvcompress.core.retention import FULL, Retention
from kvcompress.evaluation.params import FULL as FULL_CACHE
from kvcompress.evaluation.params import BenchmarkParams
from kvcompress.evaluation.timing import Spread, devices_of, timed, times_faster
from kvcompress.methods.head_aware_compress import HeadAwareCompressor
from kvcompress.models.architecture import Architecture
from kvcompress.scores.selection_rule import kept_query_slots

DENSE = "DynamicCache"
WARM_UP = 2  # untimed rounds


@dataclass
class Cost:
    """Cost of one cache at one context: median milliseconds with percentiles, and how many times faster than DENSE."""

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
    """Return how many tokens `measure` appends to every cache: one a step, and one each time attention runs alone."""
    return 2 * (rounds + WARM_UP)


def plan_of(config: Any, context: int, share: float, full_heads: float) -> RetentionPlan:
    """Return a plan that keeps `share` of the slots at `context` tokens: a fraction of heads full, the rest sinks + window.

    Raises `InputError` if the full heads alone exceed the share.
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
    """Append one token to every layer and attend, without the rest of the model."""
    module = SimpleNamespace(num_key_value_groups=query.shape[1] // keys.shape[1], is_causal=True)
    for layer in cache.layers:
        if isinstance(cache, DynamicCache):
            held_keys, held_values = layer.update(keys, values)
            sdpa_attention_forward(module, query, held_keys, held_values, None)
        else:
            layer.attend(query, keys, values, None, 0.0)


def held_bytes(cache: Any) -> int:
    """Return all bytes that a compressed cache holds, queries to select by included, or a `DynamicCache`'s K and V."""
    if isinstance(cache, RaggedCache):
        return cache.held_nbytes
    return storage_bytes(held for layer in cache.layers if layer.is_initialized for held in (layer.keys, layer.values))


@torch.no_grad()
def measure(
    model: PreTrainedModel, plans: Mapping[str, RetentionPlan], context: int, batch: int, rounds: int
) -> list[Cost]:
    """Time every plan and `DynamicCache` in turns, `rounds` times each after WARM_UP untimed rounds.

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


def weight_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of weights that a decode step reads: all, except an input embedding that is not the output too."""
    rows = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is rows
    return sum(weight.nbytes for weight in model.parameters()) - (0 if tied else rows.nbytes)


def require_room(params: BenchmarkParams, max_context: int, model: str) -> None:
    """Raise `InputError` if a context does not fit the model, or the appended tokens do not fit a context."""
    for context in params.growth_contexts:
        if context > max_context:
            raise InputError(
                f"benchmark.growth_contexts has {context}, but the context of {model} ends at {max_context}"
            )
        if context <= appended(params.growth_rounds):
            raise InputError(
                f"benchmark.growth_contexts has {context}, expected more than the {appended(params.growth_rounds)} "
                f"tokens that {params.growth_rounds} growth_rounds append"
            )


def decode_growth(
    model: PreTrainedModel,
    plans: Mapping[str, RetentionPlan],
    params: BenchmarkParams,
    bandwidth: float,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Return one row a context, batch and cache: full, uniform at `params.share` of that context, and the plans.

    Caches end at `context` tokens. bandwidth: bytes a second. Limits are milliseconds. Plans that select by queries are
    left out, because a cache of random keys has no queries.
    """
    weights, rows = weight_bytes(model), []
    plans = {name: plan for name, plan in plans.items() if not kept_query_slots(plan)}
    cells = [(context, batch) for context in params.growth_contexts for batch in params.growth_batches]
    for context, batch in tqdm(cells, desc="decode growth", unit="cell", disable=not progress):
        uniform = plan_of(model.config, context, params.share, 0.0)
        contenders = {f"uniform {params.share:.0%}": uniform, **plans}
        start = context - appended(params.growth_rounds)
        for cost in measure(model, contenders, start, batch, params.growth_rounds):
            held = cost.megabytes * 1e6
            row = asdict(cost) | {
                "contender": FULL_CACHE if cost.contender == DENSE else cost.contender,
                "context": context,
            }
            row = {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}
            row |= {"step_limit_ms": round(1000 * (weights + held) / bandwidth, 4)}
            rows.append(row | {"attention_limit_ms": round(1000 * held / bandwidth, 4)})
    return rows
