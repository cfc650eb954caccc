"""Quality against bytes: perplexity of every contender with its interval, one line a method, and the same as a table.

Also how every method looks, which is the same in all charts of the page.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from kvcompress.reporting.comparison_data import JOINED, OTHER, Rows, by_size, facts_cells, leading_cells, pareto_data
from kvcompress.reporting.page.chart import Axis, Point, Series, chart
from kvcompress.reporting.page.markup import Html, details, table
from kvcompress.reporting.page.scale import Scale, log_ticks

# method -> (colour, marker), each pair once; most colours are Okabe and Ito's, relatives share one
LOOKS = {
    "full": ("#000000", "*"),
    "uniform sink + window": ("#0072B2", "o"),
    "priced": ("#009E73", "s"),
    "select": ("#D55E00", "^"),
    "retrieval_heads": ("#E69F00", "D"),
    "class table": ("#56B4E9", "s"),
    "class_table_scaled": ("#56B4E9", "P"),
    "random": ("#999999", "x"),
    "inverse": ("#CC79A7", "+"),
    "inverted": ("#CC79A7", "x"),
    "window only": ("#7D5BA6", "v"),
    "other sink counts": ("#0072B2", "."),
    "per layer": ("#A6642A", "D"),
    "fix_size_l2": ("#F0E442", "D"),
    "l2_compress": ("#F0E442", "^"),
}
NAMES = {
    "full": "full cache",
    "retrieval_heads": "retrieval heads",
    "class_table_scaled": "class table, scaled",
    "inverse": "priced, inverse",
    "inverted": "class table, inverse",
}
SHARES = (0.01, 0.02, 0.03125, 0.0625, 0.125, 0.25, 0.5, 1.0)
MARGIN = 1.04
ROOM = 1.25  # how much further than the lines the perplexity axis reaches, for what is not on a line


def scales(values: Sequence[float]) -> Scale:
    return Scale(min(values) / MARGIN, max(values) * MARGIN, "log")


def heights(data: Sequence[Mapping[str, Any]]) -> list[float]:
    """Perplexities, and ends of intervals, that the axis has to hold: those of the lines, and of single points near them."""
    least = min(row["low"] for row in data)
    lines = [row["perplexity"] for row in data if row["method"] in JOINED]
    most = least * (max(lines) / least) ** ROOM if lines else float("inf")
    return [row[end] for row in data if row["perplexity"] <= most for end in ("perplexity", "low", "high")]


def pareto(rows: Rows, title: str) -> Html:
    """A chart; both axes are logarithmic. What lies far above the lines stands at the upper edge, with its number."""
    data = pareto_data(rows)
    across, up = scales([row["share"] for row in data]), scales(heights(data))
    series = []
    order = [method for method in LOOKS if any(row["method"] == method for row in data)]
    order += sorted({row["method"] for row in data} - set(order))
    for method in order:
        colour, shape = LOOKS.get(method, OTHER)
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
    return details(f"{caption}, as a table", table(header, shown, caption, captioned=False))
