"""Quality against bytes: perplexity of every contender with its interval, one line a method, and the same as a table."""

from collections.abc import Mapping, Sequence
from typing import Any

from kvcompress.evaluation.ablation_data import (
    JOINED,
    OTHER,
    STYLE,
    Rows,
    by_size,
    facts_cells,
    leading_cells,
    pareto_data,
)
from kvcompress.page.chart import Axis, Point, Series, chart
from kvcompress.page.markup import Html, details, table
from kvcompress.page.scale import Scale, log_ticks

NAMES = {"full": "full cache", "retrieval_heads": "retrieval heads", "class_table_scaled": "class table, scaled"}
SHARES = (0.01, 0.02, 0.03125, 0.0625, 0.125, 0.25, 0.5, 1.0)
MARGIN = 1.04


def scales(values: Sequence[float]) -> Scale:
    return Scale(min(values) / MARGIN, max(values) * MARGIN, "log")


def pareto(rows: Rows, title: str) -> Html:
    """A chart; both axes are logarithmic."""
    data = pareto_data(rows)
    heights = [value for row in data for value in (row["perplexity"], row["low"], row["high"])]
    across, up = scales([row["share"] for row in data]), scales(heights)
    series = []
    order = [method for method in STYLE if any(row["method"] == method for row in data)]
    order += sorted({row["method"] for row in data} - set(order))
    for method in order:
        colour, shape = STYLE.get(method, OTHER)
        points = [
            Point(row["share"], row["perplexity"], tip(row), row["low"], row["high"])
            for row in data
            if row["method"] == method
        ]
        series.append(Series(NAMES.get(method, method), colour, shape, points, method in JOINED))
    shares = [(share, f"{100 * share:g}") for share in SHARES if across.low <= share <= across.high]
    if len(shares) < 2:
        shares = [(share, f"{100 * share:g}") for share in log_ticks(across.low, across.high, 4)]
    x = Axis("bytes held, % of the full cache (log scale)", across, shares)
    y = Axis("perplexity (log scale)", up, [(value, f"{value:g}") for value in log_ticks(up.low, up.high)])
    full = next(row["perplexity"] for row in data if row["method"] == "full")
    return chart(title, x, y, series, full)


def tip(row: Mapping[str, Any]) -> str:
    return (
        f"{row['name']}\n{row['share']:.1%} of the full cache's bytes\nperplexity {row['perplexity']:.2f} "
        f"({row['low']:.2f} … {row['high']:.2f})"
    )


def contender_table(rows: Rows, caption: str) -> Html:
    """All contenders, smallest first."""
    tasks = list(rows[0]["retrieval"])
    header = ["contender", "bytes", "perplexity", "ΔNLL to the full cache", "KL", "accuracy", *tasks]
    shown = [
        [*leading_cells(row), f"{row['kl']:.4f}", f"{row['accuracy']:.1%}", *facts_cells(row)] for row in by_size(rows)
    ]
    return details(f"{caption}, as a table", table(header, shown, caption))
