"""Figures of comparisons and benchmarks, and their form as inline SVG for the report page."""

import re
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

from kvcompress.core.matplotlib_setup import INK, RULE, SETTINGS, SOFT, set_title
from kvcompress.evaluation.intervals import CONFIDENCE
from kvcompress.reporting.comparison import (
    CONTINUATION,
    STREAMING,
    Result,
    Rows,
    about,
    all_rows,
    contenders_of,
    pareto_data,
    title,
)
from kvcompress.reporting.method_style import CACHE_POSITIONS, FULL, STROKES, UNIFORM, WINDOW_ONLY, Look, in_order, look

styled = matplotlib.rc_context(SETTINGS)
SHARES = (1, 2, 3.125, 6.25, 12.5, 25, 50, 100)  # ticks, in percent
DODGE = 1.015  # ratio by which neighbouring methods are moved apart
THEME = {INK: "var(--ink)", SOFT: "var(--soft)", RULE: "var(--rule)"}


def svg(figure: Figure, name: str) -> str:
    """Return a figure as an SVG element without background, in the page's colours; `name` is unique within a page."""
    buffer = StringIO()
    with matplotlib.rc_context({**SETTINGS, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    left_out = r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->"  # the style would hold for the whole page
    text = re.sub(left_out, "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' (xmlns(:xlink)?|version|width|height)="[^"]*"', "", text, count=5)
    text = re.sub(r' id="[a-zA-Z0-9.]+_[\d.]+"|xlink:(?=href)', "", text)  # ids of groups repeat from figure to figure
    text = text.replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")
    for colour, variable in THEME.items():
        text = text.replace(colour, variable)
    return re.sub(r">\s+<", "><", text)


def new_figure(
    width: float, height: float, heading: str, details: str, rows: int = 1, columns: int = 1
) -> tuple[Figure, Any]:
    """Return a figure and its axes `[row, column]`."""
    figure = Figure(figsize=(width, height), layout="constrained")
    set_title(figure, heading, details)
    return figure, figure.subplots(rows, columns, squeeze=False)


def marks(style: Look) -> dict[str, Any]:
    """Return the keywords that draw a method's marker; areas have a thin rim, so that pale ones are seen on any ground."""
    edge = {"mec": style.colour, "mew": 1.6} if style.marker in STROKES else {"mec": INK, "mew": 0.5}
    return {"color": style.colour, "marker": style.marker, "ms": 9 if style.marker == "*" else 6.5, **edge}


def legend(figure: Figure, axis: Axes, columns: int = 4) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=columns)


def moved_apart(row: Mapping[str, Any], data: Rows) -> float:
    """Return a point's place on the axis of bytes, in percent; methods of nearly equal bytes are placed side by side."""
    near = [other["family"] for other in data if abs(np.log(other["share"] / row["share"])) < 0.03]
    families = list(dict.fromkeys(near))
    return float(100 * row["share"] * DODGE ** (families.index(row["family"]) - (len(families) - 1) / 2))


@styled
def pareto_figure(results: Sequence[Result], heading: str, protocol: str = STREAMING) -> Figure:
    """Draw perplexity against bytes, with intervals; clipped points are marked with their value at the upper edge."""
    data = pareto_data(all_rows(results)[protocol])
    top = data[0]["ceiling"]
    details = (
        f"{about(results[0], protocol)}. Bars: {CONFIDENCE:.0%} interval of the paired difference in loss to the full cache. "
        "Methods of equal bytes are drawn side by side."
    )
    details += " ↑: above the axis." if any(row["perplexity"] > top for row in data) else ""
    figure, ((axis,),) = new_figure(7.6, 5.2, heading, details)
    clipped: list[float] = []
    for family in dict.fromkeys(row["family"] for row in data):
        points, style = [row for row in data if row["family"] == family], look(family)
        x, y = np.array([moved_apart(row, data) for row in points]), np.array([row["perplexity"] for row in points])
        inside = y <= top
        bars = np.abs(np.array([[row["low"], row["high"]] for row in points]).T - y)
        if style.line:
            axis.plot(x, y, color=style.colour, lw=1.3, zorder=1)
        axis.errorbar(x[inside], y[inside], bars[:, inside], ls="", elinewidth=1, capsize=2.5, ecolor=style.colour,
                      label=style.label, **marks(style))  # fmt: skip
        for at, value in zip(x[~inside], y[~inside], strict=True):
            lift = 9 * sum(abs(np.log(at / other)) < 0.2 for other in clipped) + 7
            axis.plot(at, top, ls="", **marks(style))
            axis.annotate(f"↑ {value:.3g}", (at, top), (0, lift), textcoords="offset points", ha="center", fontsize=8,
                          color=style.colour)  # fmt: skip
            clipped.append(at)
    axis.axhline(next(row["perplexity"] for row in data if row["family"] == FULL), color=SOFT, lw=0.8, ls=":")
    axis.set(xscale="log", xlabel="bytes held (% of the full cache, log scale)")
    axis.set(yscale="log", ylabel="perplexity (log scale)")
    low, high = axis.get_xlim()
    axis.set_xticks(ticks := [share for share in SHARES if low <= share <= high], [f"{share:g}" for share in ticks])
    axis.set_ylim(top=top * 1.01)
    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(
        LogLocator(subs=(1, 2, 5)) if high > 8 * low else MaxNLocator(7, steps=[1, 2, 2.5, 5, 10])
    )
    axis.yaxis.set_major_formatter(ScalarFormatter())
    for one in (axis.xaxis, axis.yaxis):
        one.set_minor_formatter(NullFormatter())
    legend(figure, axis, 3)
    return figure


@styled
def retrieval_figure(results: Sequence[Result], heading: str) -> Figure:
    """Draw one panel a task: facts found at every depth, all context lengths together, and in all."""
    rows = contenders_of(results)
    settings, tasks = results[0]["settings"], list(rows[0]["retrieval"])
    depths = sorted({cell["depth"] for cell in rows[0]["retrieval"][tasks[0]]["grid"]})
    asked = rows[0]["retrieval"][tasks[0]]["total"]
    details = (
        f"{results[0]['model']} on {results[0]['environment']['device']}; contexts of "
        f"{', '.join(f'{length:,}' for length in settings['retrieval_lengths'])} tokens. Numbers: facts found of "
        f"{asked // len(depths)} asked at each depth, and of {asked} in all; brighter is more."
    )
    width = 2.6 + len(tasks) * (0.55 + 0.32 * len(depths))
    figure, (axes,) = new_figure(max(width, 7.6), 1.5 + 0.22 * len(rows), heading, details, columns=len(tasks))
    for axis, task in zip(axes, tasks, strict=True):
        found = np.zeros((len(rows), len(depths) + 1), int)
        total = np.zeros_like(found)
        for i, row in enumerate(rows):
            for cell in row["retrieval"][task]["grid"]:
                found[i, depths.index(cell["depth"])] += cell["correct"]
                total[i, depths.index(cell["depth"])] += cell["total"]
        found[:, -1], total[:, -1] = found.sum(1), total.sum(1)
        share = found / total
        axis.pcolormesh(share, cmap="cividis", vmin=0, vmax=1, edgecolors="face", lw=0.2)
        axis.axvline(len(depths), color="#ffffff", lw=2)
        for (i, j), value in np.ndenumerate(found):
            ink = "#000000" if share[i, j] > 0.45 else "#ffffff"
            axis.text(j + 0.5, i + 0.5, str(value), ha="center", va="center", fontsize=7, color=ink)
        names = [*(f"{depth:.0%}" for depth in depths), "all"]
        axis.set_xticks(np.arange(len(names)) + 0.5, names, fontsize=7, rotation=90 if len(names) > 7 else 0)
        axis.set_yticks(np.arange(len(rows)) + 0.5, [title(row) for row in rows] if axis is axes[0] else [], fontsize=8)
        axis.set(title=task, xlabel="depth of the fact", ylim=(len(rows), 0))
        axis.grid(visible=False)
        axis.tick_params(length=0)
    return figure


def family_of(name: str, plan: str = "") -> str:
    """Return the method that a name in a benchmark or in a stream stands for; `plan` is the policy of its plan."""
    if plan:
        return plan
    if "positions in the cache" in name:
        return CACHE_POSITIONS
    if sizes := re.match(r"(\d+) \+ \d+", name):
        return UNIFORM if int(sizes[1]) else WINDOW_ONLY
    return "uniform" if name.startswith("uniform") else name.split(",")[0]


def looks(families: Mapping[str, str]) -> dict[str, Look]:
    """Return the looks of names (name -> method) in the order of a legend; a second name of one method gets its own."""
    found: dict[str, Look] = {}
    places = {family: place for place, family in enumerate(in_order(families.values()))}
    for name in sorted(families, key=lambda name: places[families[name]]):
        style = look(families[name])
        found[name] = look(f"{families[name]}: {name}") if style in found.values() else style
    return found


@styled
def growth_figure(result: Result) -> Figure:
    """Draw milliseconds against context: medians, percentiles as shades, and the limit of the memory's speed."""
    growth, settings, where = result["growth"], result["settings"], result["environment"]
    plans = {
        row["name"]: row["settings"].removeprefix("plan: ") for row in result["rows"] if "plan: " in row["settings"]
    }
    styles = looks({row["contender"]: family_of(row["contender"], plans.get(row["contender"], "")) for row in growth})
    batches = sorted({row["batch"] for row in growth})
    details = (
        f"{result['model']} on {where['device']}, {where['threads']} CPU threads, {where['dtype']}; caches of random keys. "
        f"Marks: median of n = {settings['growth_rounds']} steps; shades: 10th to 90th percentile. Dashed: time to read the "
        f"bytes once at {result['copy_bytes_per_s'] / 1e9:,.1f} GB/s."
    )
    figure, axes = new_figure(9, 1.5 + 3.2 * len(batches), "Cost of one decoded token", details, len(batches), 2)
    contexts = sorted({row["context"] for row in growth})
    for batch, line in zip(batches, axes, strict=True):
        panels = (("step", "whole decode step"), ("attention", "append + attention of all layers"))
        for (part, text), axis in zip(panels, line, strict=True):
            for name, style in styles.items():
                rows = [row for row in growth if row["contender"] == name and row["batch"] == batch]
                x = [row["context"] for row in rows]
                low, high = ([row[f"{part}_{end}"] for row in rows] for end in ("p10", "p90"))
                label = style.label if name in (FULL, style.label) else f"{name}: {style.label}"
                axis.fill_between(x, low, high, color=style.colour, alpha=0.12, lw=0)
                axis.plot(x, [row[f"{part}_ms"] for row in rows], lw=1.4, label=label, **marks(style))
                axis.plot(x, [row[f"{part}_limit_ms"] for row in rows], color=style.colour, ls=(0, (4, 2)), lw=1)
            axis.set(xlabel="context (tokens)", ylabel="milliseconds a token", xlim=(0, None), ylim=(0, None))
            axis.set_xticks(contexts, [f"{context:,}" for context in contexts], fontsize=8, rotation=30)
            axis.set_title(f"{text}, batch {batch}", loc="left")
    legend(figure, axes[0][0])
    return figure


@styled
def beyond_figure(result: Result) -> Figure:
    """Draw the loss along a text longer than the trained context."""
    beyond, where = result["beyond"], result["environment"]
    rows = beyond["rows"]
    details = (
        f"{result['model']} on {where['device']}, {where['dtype']}; one text ({beyond['text']}). Points: mean of n = "
        f"{rows[0]['tokens']:,} tokens each."
    )
    figure, ((axis,),) = new_figure(7.6, 4.4, "Loss past the trained context", details)
    for name, style in looks({row["name"]: family_of(row["name"]) for row in rows}).items():
        points = [row for row in rows if row["name"] == name]
        x, y = [row["tokens"] for row in points], [row["nll"] for row in points]
        axis.plot(x, y, lw=1.3, markevery=max(len(x) // 8, 1), label=name, **marks(style))
    axis.axvline(beyond["context"], color=SOFT, ls=":", lw=1)
    axis.annotate(f"trained context: {beyond['context']:,}", (beyond["context"], 1), (4, -8), fontsize=8, color=SOFT,
                  xycoords=("data", "axes fraction"), textcoords="offset points")  # fmt: skip
    axis.set(xlabel="tokens streamed", ylabel="loss (nats a token)", xlim=(0, None))
    legend(figure, axis, 2)
    return figure


def comparison_figures(results: Sequence[Result], heading: str) -> dict[str, Figure]:
    """Return the figures of an ablation or a comparison of plans by their file names."""
    name = {CONTINUATION: "pareto_continuation", STREAMING: "pareto"}
    found = {name[one]: pareto_figure(results, f"{heading}: quality against bytes", one) for one in all_rows(results)}
    found["retrieval"] = retrieval_figure(results, f"{heading}: facts found after compression")
    beyond = next((result for result in results if "beyond" in result), None)
    return found | ({"beyond_context": beyond_figure(beyond)} if beyond else {})
