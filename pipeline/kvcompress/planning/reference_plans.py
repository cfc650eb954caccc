"""Plans to compare with: uniform at exactly the same cost, controls that break what a plan knows, class-table variants."""

import random
from collections.abc import Sequence
from pathlib import Path

from kvcompress.core.head_classes import ClassificationFile, HeadType, load_classifications
from kvcompress.core.plan import RetentionPlan
from kvcompress.core.retention import Retention, join_query_heads

Layers = list[list[Retention]]


def class_table_plan(path: str | Path, kv_heads: int, windows: dict[HeadType, int] | None = None) -> RetentionPlan:
    """The plan of a classification file: query heads' wishes joined by union. `windows` replaces those of some classes."""
    file = load_classifications(path)
    layers = [join_query_heads(wishes(row, windows or {}), kv_heads) for row in file.layers]
    return RetentionPlan(
        tuple(map(tuple, layers)), len(file.layers[0]), model_name(file), "class_table", {}, {"classes": str(path)}
    )


def model_name(file: ClassificationFile) -> str:
    return (file.model_info.model_id if file.model_info else None) or "unknown"


def wishes(row: Sequence, windows: dict[HeadType, int]) -> list[Retention]:
    """A layer's query heads' retention, with the windows of some classes replaced (their sinks stay, at least 4)."""
    result = []
    for head in row:
        kept = head.retention
        if head.head_type in windows:
            sinks = 0 if head.head_type is HeadType.TRUE_POSITIONAL else max(kept.sinks, 4)
            kept = Retention(sinks, windows[head.head_type])
        result.append(kept)
    return result


def uniform_at(plan: RetentionPlan, tokens: int, sinks: int = 4, more: int = 0) -> RetentionPlan:
    """Sinks + one window for all heads, holding after `tokens` tokens as many slots as `plan` does, and `more` in all.

    The remainder of the division goes to some heads, spread evenly, as one token more of window.
    """
    heads = plan.num_layers * plan.num_key_value_heads
    each, rest = divmod(plan.held(tokens) + more, heads)
    sinks = min(sinks, each - 1)
    kept = [Retention(sinks, each - sinks + ((i + 1) * rest // heads - i * rest // heads)) for i in range(heads)]
    return reshaped(plan, kept, "uniform")


def shuffled(plan: RetentionPlan, seed: int) -> RetentionPlan:
    """The same retentions, dealt to random heads."""
    kept = flat(plan)
    random.Random(seed).shuffle(kept)
    return reshaped(plan, kept, "random")


def inverted(plan: RetentionPlan) -> RetentionPlan:
    """The same retentions, the largest given to the heads that had the smallest."""
    kept = flat(plan)
    order = sorted(range(len(kept)), key=lambda i: size_key(kept[i]))
    result = list(kept)
    for smallest, largest in zip(order, reversed(order), strict=True):
        result[smallest] = kept[largest]
    return reshaped(plan, result, "inverse")


def per_layer(plan: RetentionPlan, tokens: int, sinks: int = 4) -> RetentionPlan:
    """Every layer's slots shared evenly by its heads: what is left of a plan that knows layers and not heads."""
    kept: list[Retention] = []
    width = plan.num_key_value_heads
    for layer in plan.layers:
        each, more = divmod(sum(head.held(tokens) for head in layer), width)
        own = min(sinks, max(each - 1, 0))
        kept += [Retention(own, max(each - own + (i < more), 1)) for i in range(width)]
    return reshaped(plan, kept, "per_layer")


def flat(plan: RetentionPlan) -> list[Retention]:
    return [kept for layer in plan.layers for kept in layer]


def size_key(kept: Retention) -> float:
    capacity = kept.capacity
    return float("inf") if capacity is None else capacity


def reshaped(plan: RetentionPlan, kept: Sequence[Retention], policy: str) -> RetentionPlan:
    """A plan for the same model with these retentions, head by head."""
    width = plan.num_key_value_heads
    layers = tuple(tuple(kept[i : i + width]) for i in range(0, len(kept), width))
    made_from = {"policy": plan.policy, **plan.made_from}
    return RetentionPlan(layers, plan.num_attention_heads, plan.model_id, policy, plan.budget, made_from)
