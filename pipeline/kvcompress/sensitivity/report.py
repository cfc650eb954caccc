"""`price_report.txt`: prices by head class, and rows of prices for plots."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from kvcompress.analysis.validation_report import REFINED, RULE, model_lines, section
from kvcompress.core.head_classes import HeadClassification
from kvcompress.core.head_statistics import StatisticsFile
from kvcompress.sensitivity.prices import Sensitivity

NEAR = 128  # tokens: the window at which heads are compared
SHOWN = 10  # heads with the highest prices


def near_window(sensitivity: Sensitivity) -> int:
    """Index of the first measured window of at least NEAR keys, or of the last window."""
    return int(np.searchsorted(sensitivity.windows, min(NEAR, sensitivity.windows[-1])))


def price_rows(sensitivity: Sensitivity) -> list[dict[str, Any]]:
    """One row a KV head, in order of layer and head.

    price: cost on text of `sinks` + `window` keys, 1/1000 nat a token. facts: what the head carries of the answer to a
    question about a far fact, nats a token.
    """
    near = near_window(sensitivity)
    price, facts = sensitivity.prices()[near] * 1000, sensitivity.retrieval.mean(0)
    kept = {"sinks": sensitivity.sinks, "window": sensitivity.windows[near]}
    return [
        {"layer": i, "kv_head": j, "price": round(float(price[i, j]), 4), "facts": round(float(facts[i, j]), 4)} | kept
        for i in range(sensitivity.layers)
        for j in range(sensitivity.kv_heads)
    ]


def price_report(
    statistics: StatisticsFile,
    classes: Sequence[HeadClassification],
    sensitivity: Sensitivity,
    held: Mapping[str, np.ndarray],
) -> str:
    """Prices by class, heads with the highest prices, correlation of statistics and prices, and slots by class.

    classes: all query heads in order; a KV head has the classes of its query heads. held: slots of every KV head (flat)
    by budget.
    """
    info, heads = statistics.model_info, sensitivity.layers * sensitivity.kv_heads
    group = len(classes) // heads
    near = near_window(sensitivity)
    price = sensitivity.prices()[near].reshape(-1) * 1000
    carried = sensitivity.retrieval.mean(0).reshape(-1)
    kinds = [[head.head_type for head in classes[i * group : (i + 1) * group]] for i in range(heads)]
    rows = [statistics.head_statistics[i * group : (i + 1) * group] for i in range(heads)]
    texts = ", ".join(sensitivity.origin["texts"])
    window = f"{sensitivity.sinks} + {sensitivity.windows[near]}"
    lines = [RULE, "PRICES OF KV HEADS BY CLASS", RULE, *model_lines(info)]
    lines += [
        f"Priced: {sensitivity.tokens} tokens of {texts}, {len(sensitivity.retrieval)} facts",
        f"Text: expected divergence from the full cache when the KV head keeps {window} keys, in 1/1000 nat a token",
        "Facts: nats a token of the answer to a question about a far fact that the KV head carries",
    ]

    costly, finders = np.argsort(-price)[:SHOWN], np.argsort(-carried)[:SHOWN]
    lines += section("BY CLASS (a KV head counts for every class among its query heads)")
    lines += [f"  class                KV heads  text mean  facts mean  of the {SHOWN} highest: text  facts"]
    for kind in REFINED:
        mine = [i for i in range(heads) if kind in kinds[i]]
        if mine:
            top = sum(kind in kinds[i] for i in costly), sum(kind in kinds[i] for i in finders)
            lines.append(
                f"  {kind.value:<20} {len(mine):>8}  {price[mine].mean():>9.3f}  {carried[mine].mean():>10.3f}"
                f"  {top[0]:>24}  {top[1]:>5}"
            )

    for title, order in (("HIGHEST PRICES ON TEXT", costly), ("RETRIEVAL HEADS", finders)):
        lines += section(f"{title} (layer.kv_head)")
        lines += ["  head      text   facts  induction  classes of its query heads"]
        for i in map(int, order):
            name = f"{i // sensitivity.kv_heads}.{i % sensitivity.kv_heads}"
            induction = max((head.induction_score or 0.0 for head in rows[i]), default=0.0)
            found = ", ".join(f"{count} {kind.value}" for kind, count in Counter(kinds[i]).most_common())
            lines.append(f"  {name:<6} {price[i]:>7.3f} {carried[i]:>7.3f}  {induction:>9.3f}  {found}")

    lines += section("DO STATISTICS PREDICT PRICES? (Spearman's rank correlation over KV heads)")
    lines += ["  statistic             text   facts"]
    measures = {
        "induction score": [max(head.induction_score or 0.0 for head in row) for row in rows],
        "entropy": [max(head.mean_entropy for head in row) for row in rows],
        "sink ratio": [min(head.sink_ratio for head in row) for row in rows],
        "local ratio": [max(head.local_ratio for head in row) for row in rows],
    }
    for name, values in measures.items():
        if len(set(values)) > 1:
            lines.append(
                f"  {name:<18} {rank_correlation(values, price):>7.2f} {rank_correlation(values, carried):>7.2f}"
            )

    lines += section("WHAT A BUDGET GIVES (policy priced: mean slots of a class's KV heads)")
    lines += ["  class               " + "".join(f"{label:>10}" for label in held)]
    for kind in REFINED:
        mine = [i for i in range(heads) if kind in kinds[i]]
        if mine:
            lines.append(f"  {kind.value:<20}" + "".join(f"{slots[mine].mean():>10.0f}" for slots in held.values()))
    return "\n".join([*lines, "", RULE, ""])


def rank_correlation(one: Sequence[float], other: np.ndarray) -> float:
    return float(spearmanr(one, other).statistic)
