"""Plans to compare with: uniform plans of equal cost, controls, and variants of the class table."""

import random
from collections.abc import Sequence

from kvcompress.core.head_classes import ClassificationFile, HeadClassification, HeadType
from kvcompress.core.plan import RetentionPlan
from kvcompress.core.retention import Retention, join_query_heads


def class_table_plan(
    file: ClassificationFile, kv_heads: int, windows: dict[HeadType, int] | None = None
) -> RetentionPlan:
    """Plan of a classification file: retentions of a KV head's query heads, joined by union.

    windows: windows that replace those of some classes [default: none].
    """
    rows = file.layers
    layers = tuple(
        tuple(join_query_heads([class_retention(head, windows or {}) for head in row], kv_heads)) for row in rows
    )
    model_id = (file.model_info.model_id if file.model_info else None) or "unknown"
    return RetentionPlan(layers, len(rows[0]), model_id, "class_table")


def class_retention(head: HeadClassification, windows: dict[HeadType, int]) -> Retention:
    """Retention of one query head; a replaced window keeps the head's sinks, at least 4."""
    kept = head.retention
    if head.head_type not in windows:
        return kept
    sinks = 0 if head.head_type is HeadType.TRUE_POSITIONAL else max(kept.sinks, 4)
    return Retention(sinks, windows[head.head_type])


def uniform_at(plan: RetentionPlan, tokens: int, sinks: int = 4, more: int = 0) -> RetentionPlan:
    """Sinks and one window for all heads, with as many slots after `tokens` tokens as `plan` plus `more` in total.

    The remainder of the division goes to some heads, spread evenly, as one more token of window.
    """
    heads = plan.num_layers * plan.num_key_value_heads
    each, rest = divmod(plan.held(tokens) + more, heads)
    sinks = min(sinks, each - 1)
    kept = [Retention(sinks, each - sinks + ((i + 1) * rest // heads - i * rest // heads)) for i in range(heads)]
    return reshaped(plan, kept, "uniform")


def shuffled(plan: RetentionPlan, seed: int) -> RetentionPlan:
    """The plan's retentions, dealt to random heads."""
    kept = flat(plan)
    random.Random(seed).shuffle(kept)
    return reshaped(plan, kept, "random")


def inverted(plan: RetentionPlan) -> RetentionPlan:
    """The plan's retentions, the largest to the heads that had the smallest."""
    kept = flat(plan)
    order = sorted(range(len(kept)), key=lambda i: size_key(kept[i]))
    result = list(kept)
    for smallest, largest in zip(order, reversed(order), strict=True):
        result[smallest] = kept[largest]
    return reshaped(plan, result, "inverse")


def per_layer(plan: RetentionPlan, tokens: int, sinks: int = 4) -> RetentionPlan:
    """Every layer's slots after `tokens` tokens shared evenly by its heads: a plan that knows layers but not heads."""
    kept: list[Retention] = []
    width = plan.num_key_value_heads
    for layer in plan.layers:
        each, more = divmod(sum(head.held(tokens) for head in layer), width)
        own = min(sinks, max(each - 1, 0))
        kept += [Retention(own, max(each - own + (i < more), 1)) for i in range(width)]
    return reshaped(plan, kept, "per_layer")


def flat(plan: RetentionPlan) -> list[Retention]:
    """Retentions of all heads, layer by layer."""
    return [kept for layer in plan.layers for kept in layer]


def size_key(kept: Retention) -> float:
    """Capacity for sorting; infinite if unbounded."""
    capacity = kept.capacity
    return float("inf") if capacity is None else capacity


def reshaped(plan: RetentionPlan, kept: Sequence[Retention], policy: str) -> RetentionPlan:
    """Plan for the same model with these retentions, head by head."""
    width = plan.num_key_value_heads
    layers = tuple(tuple(kept[i : i + width]) for i in range(0, len(kept), width))
    made_from = {"policy": plan.policy, **plan.made_from}
    return RetentionPlan(layers, plan.num_attention_heads, plan.model_id, policy, plan.budget, made_from)
