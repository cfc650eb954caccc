"""Figure and plot data of the benchmark: how a decode step's cost grows with the context, and how far the limit is."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from kvcompress.core.artifacts import atomic_path, write_json
from kvcompress.evaluation.benchmark_params import FULL

# Okabe and Ito's colours, and a marker each: full, uniform, plans in their order
STYLE = (("#000000", "o"), ("#0072B2", "s"), ("#009E73", "D"), ("#D55E00", "v"), ("#E69F00", "^"), ("#CC79A7", "P"))
PANELS = (("step", "whole decode step"), ("attention", "append + attention of all layers"))

Rows = Sequence[Mapping[str, Any]]


def method_data(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row an entrant of every result: what a bar or a scatter shows."""
    return [
        {
            "name": row["name"],
            "decode_ms": row["decode_ms"]["median"],
            "first_token_ms": row["first_token_ms"]["median"],
        }
        | {"compress_ms": row["compress_ms"] and row["compress_ms"]["median"], "perplexity": row["perplexity"]}
        | {name: row["to_full"][name] for name in ("decode_times_faster", "bytes_share", "perplexity_ratio")}
        for result in results
        for row in result["rows"]
        if row["name"] != FULL
    ]


def growth_figure(growth: Rows, subtitle: str) -> Figure:
    """Milliseconds against context: medians with p10–p90, and the limit as a broken line of the same colour."""
    batches = sorted({row["batch"] for row in growth})
    figure = Figure(figsize=(10, 0.9 + 3.6 * len(batches)), layout="constrained")
    axes = figure.subplots(len(batches), len(PANELS), squeeze=False)
    names = list(dict.fromkeys(row["contender"] for row in growth))
    contexts = sorted({row["context"] for row in growth})
    for batch, line in zip(batches, axes, strict=True):
        for (what, title), axis in zip(PANELS, line, strict=True):
            for i, name in enumerate(names):
                rows = [row for row in growth if row["contender"] == name and row["batch"] == batch]
                colour, marker = STYLE[i % len(STYLE)]
                x = [row["context"] for row in rows]
                low, high = ([row[f"{what}_{end}"] for row in rows] for end in ("p10", "p90"))
                axis.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)
                axis.plot(x, [row[f"{what}_ms"] for row in rows], color=colour, marker=marker, ms=5, lw=1.4, label=name)
                axis.plot(x, [row[f"{what}_limit_ms"] for row in rows], color=colour, ls=(0, (4, 2)), lw=1)
            axis.plot([], [], color="0.4", ls=(0, (4, 2)), lw=1, label="limit: bytes ÷ bandwidth")
            axis.set(xlabel="context (tokens)", ylabel="milliseconds a token", xlim=(0, None), ylim=(0, None))
            axis.set_xticks(contexts, [f"{context:,}" for context in contexts], fontsize=8, rotation=30)
            axis.set_title(f"{title}, batch {batch}", fontsize=10)
            axis.grid(alpha=0.25, lw=0.5)
            axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    figure.suptitle(f"Cost of one decoded token\n{subtitle}", fontsize=11)
    return figure


def growth_columns(growth: Rows) -> list[dict[str, Any]]:
    """One row a context, one column a cache: median milliseconds of a step at the smallest batch, lines in `dvc plots`."""
    smallest = min(row["batch"] for row in growth)
    table: dict[int, dict[str, Any]] = {}
    for row in growth:
        if row["batch"] == smallest:
            table.setdefault(row["context"], {"context": row["context"]})[row["contender"]] = row["step_ms"]
    return list(table.values())


def save_benchmark_plots(folder: Path, figures: Path, results: Sequence[Mapping[str, Any]], dpi: int) -> None:
    """Write methods.json and growth.json to `folder`, and growth.png to `figures` where growth was measured."""
    write_json(folder / "methods.json", method_data(results))
    result = next((result for result in results if result["growth"]), None)
    write_json(folder / "growth.json", growth_columns(result["growth"]) if result else [])
    if result:
        where, speed = result["environment"], result["copy_bytes_per_s"] / 1e9
        subtitle = f"{result['model']}, {where['dtype']}, {where['device']}, memory {speed:,.1f} GB/s"
        with atomic_path(figures / "growth.png") as temporary:
            growth_figure(result["growth"], subtitle).savefig(
                temporary, format="png", dpi=dpi, metadata={"Software": None}
            )
