"""The figures of the analysis, one function each: head statistics and classes in, a matplotlib figure out.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; classes also differ by marker. PNGs are byte-stable.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kvcompress.analysis.params import ThresholdParams
from kvcompress.core.artifacts import atomic_path
from kvcompress.core.head_classes import CLASS_LABELS, CLASS_STYLE, HeadClassification, HeadType, ModelInfo
from kvcompress.core.head_statistics import TAIL_EDGES, HeadStatistics

REGION_COLOURS = {"sink": "#0072B2", "local": "#E69F00", "global": "#BBBBBB"}

Heads = Sequence[HeadStatistics]
Classes = Sequence[HeadClassification]


def head_table(statistics: Heads, classes: Classes) -> pd.DataFrame:
    """One row a head: its class and its entropy, as seaborn wants them."""
    pairs = zip(statistics, classes, strict=True)
    return pd.DataFrame(
        [{"class": CLASS_LABELS[found.head_type], "entropy": head.mean_entropy} for head, found in pairs]
    )


def present(classes: Classes) -> list[HeadType]:
    """The classes that occur, in the order of the legends."""
    found = {head.head_type for head in classes}
    return [kind for kind in CLASS_STYLE if kind in found]


def titled(info: ModelInfo, width: float, height: float, rows: int = 1, title: str = "") -> tuple[Figure, list[Axes]]:
    """A figure of `rows` panels in inches, its title naming model and text."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, 1, squeeze=False)[:, 0]
    amount = f"{info.documents} documents, up to {info.max_tokens} tokens each" if info.documents else ""
    origin = ", ".join(part for part in (Path(info.model_id or "").name, amount) if part)
    figure.suptitle(f"{title}\n{origin}" if origin else title, fontsize=11)
    return figure, list(axes)


def layer_by_head(info: ModelInfo, statistics: Heads, value: Callable[[HeadStatistics], float]) -> np.ndarray:
    """`[head, layer]`, so that depth runs to the right."""
    grid = np.full((info.num_heads, info.num_layers), np.nan)
    for head in statistics:
        grid[head.head_idx, head.layer_idx] = value(head)
    return grid


def entropy_heatmap(info: ModelInfo, statistics: Heads, classes: Classes, bounds: ThresholdParams) -> Figure:
    """Mean entropy of every head, and, where the file has it, entropy as a share of the uniform head's."""
    normalized = [head.normalized_entropy for head in statistics]
    panels: list[tuple[str, Callable[[HeadStatistics], float], float | None]] = [
        ("mean entropy (nats)", lambda head: head.mean_entropy, None)
    ]
    if None not in normalized:
        panels.append(("entropy / log(visible keys)", lambda head: head.normalized_entropy or 0.0, 1.0))
    tall = max(1.6, 0.2 * info.num_heads)
    figure, axes = titled(
        info, max(6.0, 0.28 * info.num_layers), 1 + tall * len(panels), len(panels), "Attention entropy"
    )
    for axis, (label, value, top) in zip(axes, panels, strict=True):
        image = axis.imshow(
            layer_by_head(info, statistics, value), cmap="cividis", aspect="auto", origin="lower", vmin=0, vmax=top
        )
        figure.colorbar(image, ax=axis, label=label, pad=0.01)
        axis.set(xlabel="layer", ylabel="query head")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def position_preference(info: ModelInfo, statistics: Heads, classes: Classes, bounds: ThresholdParams) -> Figure:
    """Where attention goes in each layer: sinks, local window and the rest add up to 1; `recent` overlaps them."""
    figure, (axis,) = titled(info, 8, 4, title="Where attention goes, by layer (mean over heads)")
    layers = np.arange(info.num_layers)
    means = {region: np.zeros(info.num_layers) for region in ("sink", "local", "global", "recent")}
    for head in statistics:
        for region, values in means.items():
            values[head.layer_idx] += head.position_preference[region] / info.num_heads
    names = {
        "sink": f"sink (first {info.sink_size})",
        "local": f"local (last {info.local_window}, no sinks)",
        "global": "global (the rest)",
    }
    bottom = np.zeros(info.num_layers)
    for region, colour in REGION_COLOURS.items():
        axis.bar(layers, means[region], 0.85, bottom=bottom, color=colour, label=names[region])
        bottom += means[region]
    axis.plot(layers, means["recent"], "k.-", lw=1, ms=5, label=f"recent (last {info.recent_ratio:.0%}, overlapping)")
    axis.set(xlabel="layer", ylabel="share of attention", ylim=(0, 1), xlim=(-0.6, info.num_layers - 0.4))
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def sink_ratio_analysis(info: ModelInfo, statistics: Heads, classes: Classes, bounds: ThresholdParams) -> Figure:
    """How much attention the sinks draw: every head by layer, and how many heads draw how much."""
    figure, (by_layer, counts) = titled(info, 8, 6.5, 2, f"Attention on the first {info.sink_size} tokens")
    for kind in present(classes):
        points = [s for s, c in zip(statistics, classes, strict=True) if c.head_type is kind]
        colour, marker = CLASS_STYLE[kind]
        x = [head.layer_idx + 0.5 * (head.head_idx / max(info.num_heads - 1, 1) - 0.5) for head in points]
        by_layer.plot(
            x, [head.sink_ratio for head in points], marker, color=colour, ms=4, alpha=0.8, label=CLASS_LABELS[kind]
        )
    means = np.nanmean(layer_by_head(info, statistics, lambda head: head.sink_ratio), axis=0)
    by_layer.plot(means, "-", color="0.35", lw=1.2, label="layer mean", zorder=0)
    by_layer.axhline(bounds.sink, ls="--", lw=1, color="0.5")
    by_layer.set(xlabel="layer (heads side by side)", ylabel="sink ratio", ylim=(-0.02, 1.02))
    groups = [
        [s.sink_ratio for s, c in zip(statistics, classes, strict=True) if c.head_type is k] for k in present(classes)
    ]
    counts.hist(
        groups,
        bins=list(np.linspace(0, 1, 41)),
        stacked=True,
        color=[CLASS_STYLE[kind][0] for kind in present(classes)],
    )
    counts.axvline(bounds.sink, ls="--", lw=1, color="0.5")
    counts.annotate(
        f"threshold {bounds.sink:g}", (bounds.sink, 1), (4, -10), xycoords=("data", "axes fraction"),
        textcoords="offset points", fontsize=8, color="0.35",
    )  # fmt: skip
    counts.set(xlabel="sink ratio (share of attention)", ylabel="heads", xlim=(0, 1))
    figure.legend(*by_layer.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def relative_position_by_type(info: ModelInfo, statistics: Heads, classes: Classes, bounds: ThresholdParams) -> Figure:
    """Attention against distance for each class: median over heads, quartiles shaded, the first keys left out."""
    clean = all(head.relative_without_sinks for head in statistics)
    title = "Attention by distance to the query" + (", without the weight on the first 64 keys" if clean else "")
    figure, (axis,) = titled(info, 7.5, 4.8, title=title)
    edges = (*TAIL_EDGES, max(info.max_tokens or 0, 2 * TAIL_EDGES[-1]))
    for kind in present(classes):
        profiles = []
        for head, found in zip(statistics, classes, strict=True):
            if found.head_type is kind:
                near = head.relative_without_sinks or head.relative_position_dist
                tail = head.tail_without_sinks or head.relative_position_tail or []
                density = [weight / (edges[i + 1] - edges[i]) for i, weight in enumerate(tail)]
                profiles.append([*near, *density])
        low, middle, high = np.percentile(np.maximum(profiles, 1e-7), [25, 50, 75], axis=0)
        near_count = len(statistics[0].relative_position_dist)
        places = [*range(near_count), *((edges[i] * edges[i + 1]) ** 0.5 for i in range(len(middle) - near_count))]
        x = 1 + np.array(places)
        colour, marker = CLASS_STYLE[kind]
        every = [*range(0, 8), 11, 15, 23, 31, 47, 63, *range(64, len(x))]
        label = f"{CLASS_LABELS[kind]} ({len(profiles)})"
        axis.plot(x, middle, color=colour, marker=marker, markevery=every, ms=4, lw=1.4, label=label)
        axis.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
    axis.set(xscale="log", yscale="log", xlabel="distance + 1 (tokens; 1 is the query's own key)")
    axis.set(ylabel="attention per key (mean over queries)", ylim=(1e-6, 1.5))
    axis.grid(alpha=0.25, lw=0.5)
    axis.legend(fontsize=8, frameon=False, title="median, quartiles (heads)", title_fontsize=8)
    return figure


def sink_vs_local_scatter(info: ModelInfo, statistics: Heads, classes: Classes, bounds: ThresholdParams) -> Figure:
    """Sink ratio against local ratio, one mark a head; dashed lines are the thresholds."""
    figure, (axis,) = titled(info, 6.5, 5.6, title="Sinks against local window")
    for kind in present(classes):
        points = [s for s, c in zip(statistics, classes, strict=True) if c.head_type is kind]
        colour, marker = CLASS_STYLE[kind]
        x, y = [head.sink_ratio for head in points], [head.local_ratio for head in points]
        label = f"{CLASS_LABELS[kind]} ({len(points)})"
        axis.scatter(x, y, s=24, c=colour, marker=marker, alpha=0.75, lw=0.3, edgecolors="white", label=label)
    axis.axvline(bounds.sink, ls="--", lw=1, color="0.5")
    axis.axhline(bounds.local, ls="--", lw=1, color="0.5")
    axis.fill_between([0, 1], [1, 0], [1, 1], color="0.93", lw=0, zorder=0)
    axis.text(0.72, 0.72, "sink + local > 1\nimpossible", ha="center", va="center", fontsize=8, color="0.5")
    axis.set(xlabel=f"sink ratio (share of attention on the first {info.sink_size} keys)", xlim=(-0.02, 1.02))
    axis.set(ylabel=f"local ratio (share on the last {info.local_window} keys, no sinks)", ylim=(-0.02, 1.02))
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def entropy_by_type(info: ModelInfo, statistics: Heads, classes: Classes, bounds: ThresholdParams) -> Figure:
    """Entropy of each class's heads: quartiles and every head; dashed lines are the thresholds."""
    kinds = present(classes)
    figure, (axis,) = titled(info, 7.5, 1.6 + 0.6 * len(kinds), title="Entropy by class")
    table = head_table(statistics, classes)
    order = [CLASS_LABELS[kind] for kind in kinds]
    palette = {CLASS_LABELS[kind]: CLASS_STYLE[kind][0] for kind in kinds}
    common = {"data": table, "x": "entropy", "y": "class", "hue": "class", "order": order, "ax": axis, "legend": False}
    sns.boxplot(**common, palette=palette, showfliers=False, width=0.6, boxprops={"alpha": 0.35}, linewidth=1)
    np.random.seed(0)  # seaborn's jitter draws from the global generator
    sns.stripplot(**common, palette=palette, size=3, alpha=0.7, jitter=0.22)
    for value in (bounds.low_entropy, bounds.high_entropy):
        axis.axvline(value, ls="--", lw=1, color="0.5", zorder=0)
    counts = table["class"].value_counts()
    axis.set_yticks(range(len(order)), [f"{name} ({counts[name]})" for name in order])
    axis.set(xlabel="mean attention entropy (nats)", ylabel="", xlim=(0, None))
    return figure


FIGURES = (
    entropy_heatmap,
    position_preference,
    sink_ratio_analysis,
    relative_position_by_type,
    sink_vs_local_scatter,
    entropy_by_type,
)


def save_figures(
    folder: str | Path,
    info: ModelInfo,
    statistics: Heads,
    classes: Classes,
    bounds: ThresholdParams,
    dpi: int = 150,
) -> list[Path]:
    """Draw all figures into `folder` as PNG; returns their paths. `bounds` are drawn as dashed lines."""
    paths = []
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "axes.spines.top": False, "axes.spines.right": False}):
        for draw in FIGURES:
            path = Path(folder, f"{draw.__name__}.png")
            with atomic_path(path) as temporary:
                figure = draw(info, statistics, classes, bounds)
                figure.savefig(temporary, format="png", dpi=dpi, metadata={"Software": None})
            paths.append(path)
    return paths
