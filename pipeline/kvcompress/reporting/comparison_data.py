"""What the figures of an ablation are drawn of: colours, quality against bytes, and where facts are still found."""

from collections.abc import Mapping, Sequence
from math import exp
from typing import Any

# Okabe and Ito's colours, and a marker each
STYLE = {
    "full": ("#000000", "*"),
    "uniform sink + window": ("#0072B2", "o"),
    "window only": ("#D55E00", "v"),
    "class table": ("#009E73", "s"),
    "random": ("#999999", "x"),
    "inverted": ("#CC79A7", "+"),
    "priced": ("#009E73", "s"),
    "select": ("#D55E00", "^"),
    "retrieval_heads": ("#E69F00", "D"),
    "class_table_scaled": ("#56B4E9", "P"),
    "inverse": ("#CC79A7", "+"),
    "per layer": ("#E69F00", "D"),
    "fix_size_l2": ("#56B4E9", "^"),
    "l2_compress": ("#F0E442", "^"),
}
OTHER = ("#666666", ".")
JOINED = ("uniform sink + window", "window only", "priced", "select")  # the same method at several sizes: a line

Rows = Sequence[Mapping[str, Any]]


def rows_of(results: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The contenders of several results, each once."""
    return list({row["name"]: row for result in results for row in result["rows"]}.values())


def by_size(rows: Rows) -> list[Mapping[str, Any]]:
    """From fewest to most bytes, the better first where these are equal."""
    return sorted(rows, key=lambda row: (row["share"], row["perplexity"]))


def leading_cells(row: Mapping[str, Any]) -> list[str]:
    """How a table's line begins: name, bytes, perplexity, and the difference to the full cache with its interval."""
    return [row["name"], f"{row['share']:.1%}", f"{row['perplexity']:.2f}", interval_cell(row["nll_over_full"])]


def interval_cell(change: Mapping[str, float]) -> str:
    """A difference in nats with its interval."""
    return f"{change['mean']:+.3f} ({change['low']:+.3f} … {change['high']:+.3f})"


def facts_cells(row: Mapping[str, Any]) -> list[str]:
    """Facts found of those asked for, one cell a task."""
    return [f"{found['correct']}/{found['total']}" for found in row["retrieval"].values()]


def pareto_data(rows: Rows) -> list[dict[str, Any]]:
    """One row a contender: bytes, perplexity and the bounds that the interval of ΔNLL to the full cache gives it."""
    full = next(row for row in rows if row["family"] == "full")["perplexity"]
    found = []
    for row in sorted(rows, key=lambda row: (row["family"], row["share"])):
        change = row["nll_over_full"]
        bounds = {name: round(full * exp(change[name]), 4) for name in ("low", "high")}
        found.append(
            {"method": row["family"], "name": row["name"], "share": row["share"]}
            | {"perplexity": row["perplexity"]}
            | bounds
        )
    return found


def retrieval_data(rows: Rows) -> list[dict[str, Any]]:
    """One row a contender, task, length and depth: the share of cases answered."""
    return [
        {"name": row["name"], "task": task, "length": cell["length"], "depth": cell["depth"]}
        | {"answered": round(cell["correct"] / cell["total"], 4), "cases": cell["total"]}
        for row in rows
        for task, result in row["retrieval"].items()
        for cell in result["grid"]
    ]
