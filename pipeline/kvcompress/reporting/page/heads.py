"""What is known of every head, as rows of a table: the same text stands in the table, in the hover and in the tests."""

from collections.abc import Mapping, Sequence
from typing import Any

from kvcompress.core.errors import InputError
from kvcompress.core.head_classes import CLASS_LABELS, HeadClassification
from kvcompress.core.head_statistics import HeadStatistics
from kvcompress.core.plan import RetentionPlan
from kvcompress.core.retention import Retention

Grid = list[list[float]]  # [layer][head]
Plans = Mapping[str, RetentionPlan]  # budget -> plan
Prices = Sequence[Mapping[str, Any]]

QUERY_HEADER = ("head", "class", "window", "entropy", "sink", "local", "induction")
QUERY_UNITS = ("layer.query head", "", "tokens", "nats", "share", "share", "score")


def window_text(window: int) -> str:
    return {-1: "full", 0: "none"}.get(window, str(window))


def query_rows(statistics: Sequence[HeadStatistics], classes: Sequence[HeadClassification]) -> list[list[str]]:
    """One row a query head, columns as QUERY_HEADER."""
    rows = []
    for head, found in zip(statistics, classes, strict=True):
        induction = "–" if head.induction_score is None else f"{head.induction_score:.3f}"
        row = [
            f"{head.layer_idx}.{head.head_idx}",
            CLASS_LABELS[found.head_type],
            window_text(found.recommended_window),
        ]
        row += [f"{head.mean_entropy:.2f}", f"{head.sink_ratio:.3f}", f"{head.local_ratio:.3f}", induction]
        rows.append(row)
    return rows


def price_header(prices: Prices, plans: Plans) -> list[str]:
    kept = f"{prices[0]['sinks']} + {prices[0]['window']}"
    return ["head", f"price at {kept}", "facts carried", *(f"slots, {size}" for size in plans)]


def price_table(prices: Prices, plans: Plans, context: int) -> list[list[str]]:
    """One row a KV head, columns as `price_header`: slots are those after `context` tokens."""
    rows = []
    for row in prices:
        i, j = row["layer"], row["kv_head"]
        kept = [slots_text(plan.layers[i][j], context) for plan in plans.values()]
        rows.append([f"{i}.{j}", f"{row['price']:.3f}", f"{row['facts']:.3f}", *kept])
    return rows


def slots_text(kept: Retention, context: int) -> str:
    held = f"{kept.held(context):,}"
    more = f" + {kept.chosen} by {kept.score}" if kept.chosen else ""
    return f"{held} (all)" if kept.unbounded else f"{held} ({kept.sinks} + {kept.window}{more})"


def grid(rows: Prices, value: str) -> Grid:
    """One number of every KV head."""
    layers: dict[int, list[float]] = {}
    for row in rows:
        layers.setdefault(row["layer"], []).append(float(row[value]))
    return list(layers.values())


def require_same_heads(prices: Prices, plans: Plans, layers: int, query_heads: int) -> None:
    """Raise `InputError` unless prices and plans are of one model with these heads, each KV head once and in order."""
    width = 1 + max((row["kv_head"] for row in prices), default=-1)
    if [(row["layer"], row["kv_head"]) for row in prices] != [(i, j) for i in range(layers) for j in range(width)]:
        raise InputError(f"the prices of KV heads are not those of {layers} layers, each head once and in order")
    for size, plan in plans.items():
        shape = plan.num_layers, plan.num_attention_heads, plan.num_key_value_heads
        if shape != (layers, query_heads, width):
            raise InputError(
                f"the plan for {size} is for {shape} layers, query heads and KV heads, the statistics and prices "
                f"are of {(layers, query_heads, width)}"
            )
