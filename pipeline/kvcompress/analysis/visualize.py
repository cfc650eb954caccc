"""Figures of the analysis, one function each, and the data behind `dvc plots`.

Classes differ by colour and marker (`core.head_classes.CLASS_STYLE`). The PNG files are reproducible byte for byte.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kvcompress.analysis.params import ThresholdParams
from kvcompress.core.artifacts import write_json
from kvcompress.core.head_classes import CLASS_LABELS, CLASS_STYLE, HeadClassification, HeadType, ModelInfo
from kvcompress.core.head_statistics import TAIL_EDGES, HeadStatistics
from kvcompress.core.matplotlib_setup import INK, SETTINGS, SOFT, save_png, set_title

REGION_COLOURS = {"sink": "#0072B2", "local": "#E69F00", "global": "#BBBBBB"}

Heads = Sequence[HeadStatistics]
HeadsByClass = Mapping[HeadType, Heads]


def by_class(statistics: Heads, classes: Sequence[HeadClassification]) -> HeadsByClass:
    """Group heads by their class, in the order of the legends. Both sequences list the same heads in one order."""
    pairs = list(zip(statistics, classes, strict=True))
    groups = {kind: [head for head, found in pairs if found.head_type is kind] for kind in CLASS_STYLE}
    return {kind: heads for kind, heads in groups.items() if heads}


def titled(info: ModelInfo, width: float, height: float, rows: int = 1, title: str = "") -> tuple[Figure, list[Axes]]:
    """Make a figure of `rows` panels (width and height in inches) whose title names model, heads and text."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, 1, squeeze=False)[:, 0]
    heads = f"n = {info.num_layers * info.num_heads:,} heads"
    amount = (
        f"{info.documents} documents of up to {info.max_tokens:,} tokens" if info.documents and info.max_tokens else ""
    )
    set_title(figure, title, ", ".join(part for part in (Path(info.model_id or "").name, heads, amount) if part))
    return figure, list(axes)


def threshold_line(axis: Axes, value: float, across: bool = False) -> None:
    """Draw a threshold as a dashed line with its value; `across` draws it horizontally."""
    (axis.axhline if across else axis.axvline)(value, ls="--", lw=1, color=SOFT, zorder=0)
    place, coordinates = ((1, value), ("axes fraction", "data")) if across else ((value, 1), ("data", "axes fraction"))
    shift, side = ((-2, 3), "right") if across else ((4, -9), "left")
    axis.annotate(
        f"threshold {value:g}", place, shift, xycoords=coordinates, textcoords="offset points", fontsize=8, color=SOFT,
        ha=side,
    )  # fmt: skip


def layer_by_head(info: ModelInfo, statistics: Heads, value: Callable[[HeadStatistics], float]) -> np.ndarray:
    """Arrange a value of every head as `[head, layer]`, so that depth runs to the right."""
    grid = np.full((info.num_heads, info.num_layers), np.nan)
    for head in statistics:
        grid[head.head_idx, head.layer_idx] = value(head)
    return grid


def entropy_heatmap(info: ModelInfo, statistics: Heads) -> Figure:
    """Draw the mean entropy of every head and, if the file has it, entropy as a share of the uniform head's."""
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
        image = axis.imshow(layer_by_head(info, statistics, value), cmap="cividis", aspect="auto", vmin=0, vmax=top)
        figure.colorbar(image, ax=axis, label=label, pad=0.01)
        axis.set(xlabel="layer", ylabel="query head")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def position_preference(info: ModelInfo, statistics: Heads) -> Figure:
    """Draw the regions of attention by layer: sinks, local window and the rest add up to 1; `recent` overlaps them."""
    figure, (axis,) = titled(info, 8, 4, title="Regions of attention by layer (bars: mean over the heads of a layer)")
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
    axis.plot(
        layers,
        means["recent"],
        ".-",
        color=INK,
        lw=1,
        ms=5,
        label=f"recent (last {info.recent_ratio:.0%}, overlapping)",
    )
    axis.set(xlabel="layer", ylabel="share of attention", ylim=(0, 1), xlim=(-0.6, info.num_layers - 0.4))
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def sink_ratio_analysis(info: ModelInfo, groups: HeadsByClass, threshold: float) -> Figure:
    """Draw the sink ratio of every head by layer, and its distribution; the dashed line is `threshold`."""
    figure, (by_layer, counts) = titled(info, 8, 6.5, 2, f"Attention on the first {info.sink_size} tokens")
    for kind, points in groups.items():
        colour, marker = CLASS_STYLE[kind]
        x = [head.layer_idx + 0.5 * (head.head_idx / max(info.num_heads - 1, 1) - 0.5) for head in points]
        by_layer.plot(
            x, [head.sink_ratio for head in points], marker, color=colour, ms=4, alpha=0.8, label=CLASS_LABELS[kind]
        )
    statistics = [head for heads in groups.values() for head in heads]
    means = np.nanmean(layer_by_head(info, statistics, lambda head: head.sink_ratio), axis=0)
    by_layer.plot(means, "-", color=SOFT, lw=1.2, label="layer mean", zorder=0)
    threshold_line(by_layer, threshold, across=True)
    by_layer.set(xlabel="layer (heads side by side)", ylabel="sink ratio", ylim=(-0.02, 1.02))
    ratios = [[head.sink_ratio for head in heads] for heads in groups.values()]
    colours = [CLASS_STYLE[kind][0] for kind in groups]
    counts.hist(ratios, bins=list(np.linspace(0, 1, 41)), stacked=True, color=colours)
    threshold_line(counts, threshold)
    counts.set(xlabel="sink ratio (share of attention)", ylabel="heads", xlim=(0, 1))
    figure.legend(*by_layer.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def relative_position_by_type(info: ModelInfo, groups: HeadsByClass) -> Figure:
    """Draw attention against distance by class: median over heads, quartiles shaded, without the first keys."""
    clean = all(head.relative_without_sinks for heads in groups.values() for head in heads)
    title = "Attention by distance to the query" + (", without the weight on the first 64 keys" if clean else "")
    figure, (axis,) = titled(info, 7.5, 4.8, title=title)
    edges = (*TAIL_EDGES, max(info.max_tokens or 0, 2 * TAIL_EDGES[-1]))
    for kind, heads in groups.items():
        profiles = []
        for head in heads:
            near = head.relative_without_sinks or head.relative_position_dist
            tail = head.tail_without_sinks or head.relative_position_tail or []
            density = [weight / (edges[i + 1] - edges[i]) for i, weight in enumerate(tail)]
            profiles.append([*near, *density])
        low, middle, high = np.percentile(np.maximum(profiles, 1e-7), [25, 50, 75], axis=0)
        near_count = len(heads[0].relative_position_dist)
        places = [*range(near_count), *((edges[i] * edges[i + 1]) ** 0.5 for i in range(len(middle) - near_count))]
        x = 1 + np.array(places)
        colour, marker = CLASS_STYLE[kind]
        every = [i for i in (*range(8), 11, 15, 23, 31, 47, *range(63, len(x))) if i < len(x)]
        label = f"{CLASS_LABELS[kind]} ({len(profiles)})"
        axis.plot(x, middle, color=colour, marker=marker, markevery=every, ms=4, lw=1.4, label=label)
        axis.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
    axis.set(xscale="log", yscale="log", xlabel="distance + 1 (tokens; 1 is the query's own key)")
    axis.set(ylabel="attention per key (mean over queries)", ylim=(1e-6, 1.5))
    axis.grid(visible=True)
    axis.legend(title="lines: median of heads\nshades: quartiles\n(number of heads)", title_fontsize=8)
    return figure


def sink_vs_local_scatter(
    info: ModelInfo, groups: HeadsByClass, sink_threshold: float, local_threshold: float
) -> Figure:
    """Draw sink ratio against local ratio, one mark a head; dashed lines are the thresholds."""
    figure, (axis,) = titled(info, 6.5, 5.6, title="Sinks against local window")
    for kind, points in groups.items():
        colour, marker = CLASS_STYLE[kind]
        x, y = [head.sink_ratio for head in points], [head.local_ratio for head in points]
        label = f"{CLASS_LABELS[kind]} ({len(points)})"
        axis.scatter(x, y, s=24, c=colour, marker=marker, alpha=0.75, lw=0.3, edgecolors="white", label=label)
    threshold_line(axis, sink_threshold)
    threshold_line(axis, local_threshold, across=True)
    axis.fill_between([0, 1], [1, 0], [1, 1], color="0.93", lw=0, zorder=-1)
    axis.text(0.72, 0.72, "sink + local > 1\nimpossible", ha="center", va="center", fontsize=8, color=SOFT)
    axis.set(xlabel=f"sink ratio (share of attention on the first {info.sink_size} keys)", xlim=(-0.02, 1.02))
    axis.set(ylabel=f"local ratio (share on the last {info.local_window} keys, no sinks)", ylim=(-0.02, 1.02))
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def entropy_by_type(info: ModelInfo, groups: HeadsByClass, low: float, high: float) -> Figure:
    """Draw the entropy of each class's heads: quartiles and every head; dashed lines are the thresholds."""
    figure, (axis,) = titled(
        info,
        7.5,
        1.6 + 0.6 * len(groups),
        title="Entropy by class (boxes: quartiles, whiskers: up to 1.5 box widths, points: heads)",
    )
    rows = [{"class": CLASS_LABELS[kind], "entropy": h.mean_entropy} for kind, heads in groups.items() for h in heads]
    table = pd.DataFrame(rows)
    order = [CLASS_LABELS[kind] for kind in groups]
    palette = {CLASS_LABELS[kind]: CLASS_STYLE[kind][0] for kind in groups}
    common = {"data": table, "x": "entropy", "y": "class", "hue": "class", "order": order, "ax": axis, "legend": False}
    sns.boxplot(**common, palette=palette, showfliers=False, width=0.6, boxprops={"alpha": 0.35}, linewidth=1)
    np.random.seed(0)  # seaborn's jitter draws from the global generator
    sns.stripplot(**common, palette=palette, size=3, alpha=0.7, jitter=0.22)
    for value in (low, high):
        threshold_line(axis, value)
    counts = table["class"].value_counts()
    axis.set_yticks(range(len(order)), [f"{name} ({counts[name]})" for name in order])
    axis.set(xlabel="mean attention entropy (nats)", ylabel="", xlim=(0, None))
    return figure


def save_figures(
    folder: str | Path,
    info: ModelInfo,
    statistics: Heads,
    classes: Sequence[HeadClassification],
    bounds: ThresholdParams,
    dpi: int = 150,
) -> list[Path]:
    """Draw all figures into `folder` as PNG and return their paths. `bounds` appear as dashed lines."""
    groups, paths = by_class(statistics, classes), []
    with matplotlib.rc_context({**SETTINGS, "axes.grid": False}):
        figures = {
            "entropy_heatmap": entropy_heatmap(info, statistics),
            "position_preference": position_preference(info, statistics),
            "sink_ratio_analysis": sink_ratio_analysis(info, groups, bounds.sink),
            "relative_position_by_type": relative_position_by_type(info, groups),
            "sink_vs_local_scatter": sink_vs_local_scatter(info, groups, bounds.sink, bounds.local),
            "entropy_by_type": entropy_by_type(info, groups, bounds.low_entropy, bounds.high_entropy),
        }
        for name, figure in figures.items():
            path = Path(folder, f"{name}.png")
            save_png(figure, path, dpi)
            paths.append(path)
    return paths


def save_plot_data(folder: str | Path, statistics: Heads, classes: Sequence[HeadClassification]) -> None:
    """Write the data of `dvc plots`: `classes.json` (heads by class), `layers.json` (means) and `heads.json` (rows)."""
    folder = Path(folder)
    counts = Counter(head.head_type.value for head in classes)
    write_json(folder / "classes.json", [{"class": kind, "heads": count} for kind, count in counts.most_common()])

    layers: dict[int, list[HeadStatistics]] = {}
    for head in statistics:
        layers.setdefault(head.layer_idx, []).append(head)
    means = []
    for layer, heads in layers.items():
        row = {"layer": layer, "entropy": round(fmean(head.mean_entropy for head in heads), 4)}
        row |= {region: round(fmean(h.position_preference[region] for h in heads), 4) for region in ("sink", "local")}
        means.append(row)
    write_json(folder / "layers.json", means)

    rows = [
        {
            "layer": head.layer_idx,
            "head": head.head_idx,
            "class": found.head_type.value,
            "window": found.recommended_window,
            "entropy": round(head.mean_entropy, 4),
            "sink": round(head.sink_ratio, 4),
            "local": round(head.local_ratio, 4),
        }
        for head, found in zip(statistics, classes, strict=True)
    ]
    write_json(folder / "heads.json", rows)
