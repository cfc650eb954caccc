"""Figures of the ablation: quality against bytes, and where in the context facts are still found."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from kvcompress.core.artifacts import atomic_path, write_json
from kvcompress.reporting.comparison_data import JOINED, OTHER, STYLE, Rows, pareto_data, retrieval_data


def pareto_figure(rows: Rows, subtitle: str) -> Figure:
    """Perplexity against bytes, one line a method, 95 % intervals of the difference to the full cache."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    data = pareto_data(rows)
    for method in dict.fromkeys(row["method"] for row in data):
        points = [row for row in data if row["method"] == method]
        x, y = [100 * row["share"] for row in points], np.array([row["perplexity"] for row in points])
        errors = np.abs(np.array([[row["low"], row["high"]] for row in points]).T - y)
        colour, marker = STYLE.get(method, OTHER)
        axis.errorbar(
            x, y, errors, fmt=marker + ("-" if method in JOINED else ""), color=colour, ms=7, lw=1.2, capsize=3, label=method
        )  # fmt: skip
    full = next(row["perplexity"] for row in data if row["method"] == "full")
    axis.axhline(full, color="0.6", lw=0.8, ls=":")
    axis.set(xscale="log", yscale="log", xlabel="bytes held at the end of a document (% of the full cache)")
    axis.set(ylabel="perplexity (log scale)")
    for which in (axis.xaxis, axis.yaxis):
        which.set_major_formatter(matplotlib.ticker.ScalarFormatter())
        which.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axis.set_xticks([3, 6.25, 12.5, 25, 50, 100], ["3", "6.25", "12.5", "25", "50", "100"])
    low, high = axis.get_ylim()
    ticks = [tick for tick in (10, 20, 30, 40, 50, 60, 80, 100, 150, 200, 300, 500, 1000) if low <= tick <= high]
    axis.set_yticks(ticks, [str(tick) for tick in ticks])
    axis.grid(alpha=0.25, lw=0.5)
    axis.legend(fontsize=8, frameon=False)
    figure.suptitle(f"Quality against bytes\n{subtitle}", fontsize=11)
    return figure


def retrieval_figure(rows: Rows, subtitle: str) -> Figure:
    """Share of facts found by depth, one line a contender, one panel a task; the full cache on top."""
    tasks = list(rows[0]["retrieval"])
    names = [row["name"] for row in rows]
    depths = sorted({cell["depth"] for cell in rows[0]["retrieval"][tasks[0]]["grid"]})
    figure = Figure(
        figsize=(3 + 1.4 * len(tasks) + 0.35 * len(depths) * len(tasks), 1.6 + 0.26 * len(names)), layout="constrained"
    )
    axes = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
    for axis, task in zip(axes, tasks, strict=True):
        grid = np.zeros((len(names), len(depths)))
        for i, row in enumerate(rows):
            for j, depth in enumerate(depths):
                cells = [cell for cell in row["retrieval"][task]["grid"] if cell["depth"] == depth]
                grid[i, j] = sum(cell["correct"] for cell in cells) / sum(cell["total"] for cell in cells)
        image = axis.imshow(grid, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        axis.set_xticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=7, rotation=90)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set(title=task, xlabel="depth of the fact")
    figure.colorbar(image, ax=axes, label="share of facts found", pad=0.01)
    figure.suptitle(f"Facts found after compression\n{subtitle}", fontsize=11)
    return figure


def beyond_figure(beyond: Mapping[str, Any], model: str) -> Figure:
    """NLL per window against tokens streamed; the dotted line is the trained context."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axis = figure.subplots()
    colours = [colour for colour, _ in STYLE.values()]
    for i, name in enumerate(dict.fromkeys(row["name"] for row in beyond["rows"])):
        points = [row for row in beyond["rows"] if row["name"] == name]
        axis.plot([row["tokens"] for row in points], [row["nll"] for row in points], color=colours[i + 1], label=name)
    axis.axvline(beyond["context"], color="0.5", ls=":", lw=1)
    axis.annotate("trained context", (beyond["context"], 1), (4, -10), xycoords=("data", "axes fraction"),
                  textcoords="offset points", fontsize=8, color="0.35")  # fmt: skip
    axis.set(xlabel="tokens streamed", ylabel="NLL (nats a token, mean of 1,024)", xlim=(0, None))
    axis.grid(alpha=0.25, lw=0.5)
    axis.legend(fontsize=8, frameon=False)
    figure.suptitle(f"Past the trained context\n{model}, {beyond['text']}", fontsize=11)
    return figure


def save_ablation_plots(
    folder: Path,
    figures: Path,
    rows: Rows,
    subtitle: str,
    dpi: int,
    beyond: Mapping[str, Any] | None = None,
    model: str = "",
) -> None:
    """Write pareto.json and retrieval.json to `folder`, the PNGs to `figures`."""
    write_json(folder / "pareto.json", pareto_data(rows))
    write_json(folder / "retrieval.json", retrieval_data(rows))
    drawn = {"pareto": pareto_figure(rows, subtitle), "retrieval": retrieval_figure(rows, subtitle)}
    if beyond:
        drawn["beyond_context"] = beyond_figure(beyond, model)
    for name, figure in drawn.items():
        with atomic_path(figures / f"{name}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=dpi, metadata={"Software": None})
