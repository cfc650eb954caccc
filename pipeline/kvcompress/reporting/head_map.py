"""Maps and tables of all heads for the report page: depth to the right, a row a head, head 0 on top.

A cell of a map holds only its place. The facts about its head are in the row of a table whose id the map's `data-rows`
begins (`q3-4`: layer 3, query head 4), where the page's script finds them. Numbers are coloured by cividis (Nuñez, Anderton
and Renslow 2018), which rises evenly in brightness, also for colour-blind readers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import log, sqrt
from typing import Any, Literal

from matplotlib import colormaps
from matplotlib.colors import to_hex, to_rgb

from kvcompress.core.head_classes import CLASS_LABELS, CLASS_LETTERS, CLASS_STYLE, HeadClassification, HeadType
from kvcompress.core.head_statistics import HeadStatistics
from kvcompress.core.plan import RetentionPlan
from kvcompress.core.retention import Retention
from kvcompress.reporting.html import Html, details, joined, table, tag

Grid = list[list[float]]  # [layer][head]
Plans = Mapping[str, RetentionPlan]  # budget -> plan
Prices = Sequence[Mapping[str, Any]]

STEP, LEFT, BOTTOM = 12, 24, 25  # of one cell, of the margins; units of the picture
STRIPES = 24  # of a legend


@dataclass(frozen=True)
class Scale:
    """Map `low` ... `high` to 0 ... 1; values outside are clipped."""

    low: float
    high: float
    kind: Literal["linear", "log", "root"] = "linear"

    def __call__(self, value: float) -> float:
        low, high, here = (self._bent(one) for one in (self.low, self.high, value))
        return min(max((here - low) / (high - low), 0.0), 1.0) if high > low else 0.5

    def _bent(self, value: float) -> float:
        if self.kind == "log":
            return log(max(value, 1e-12))
        return sqrt(max(value, 0.0)) if self.kind == "root" else value

    def middle(self) -> float:
        """Return the value that is mapped to 0.5."""
        if self.kind == "log":
            return sqrt(self.low * self.high)
        mean = (self._bent(self.low) + self._bent(self.high)) / 2
        return mean**2 if self.kind == "root" else mean


def root_scale(values: Grid) -> Scale:
    """Scale from 0 to the largest value, by square root."""
    top = max(max(row) for row in values)
    return Scale(0.0, top if top > 0 else 1.0, "root")


def cividis(share: float) -> str:
    """Return the colour at 0 ... 1 as #rrggbb."""
    return to_hex(colormaps["cividis"](min(max(share, 0.0), 1.0)))


def luminance(colour: str) -> float:
    """Return the relative luminance of a colour (WCAG 2)."""
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(colour))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def ink_on(colour: str) -> str:
    """Return black or white, the one easier to read on `colour`."""
    return "#000" if luminance(colour) > 0.179 else "#fff"


def cell(layer: int, head: int, height: float, colour: str) -> Html:
    return tag("rect", x=LEFT + layer * STEP, y=head * height, width=STEP - 1, height=height - 1, fill=colour)


def head_map(
    kind: str, title: str, note: str, height: float, shape: tuple[int, int], drawn: Html, legend: Html
) -> Html:
    """Put cells of this `height` into a figure with axes and a legend; `shape` is (layers, heads)."""
    layers, heads = shape
    bottom = heads * height
    labels = [
        tag("text", j, x=LEFT - 4, y=(j + 0.5) * height, text_anchor="end", dominant_baseline="central")
        for j in range(0, heads, 1 if heads <= 12 else 4)
    ]
    labels += [
        tag("text", i, x=LEFT + (i + 0.5) * STEP, y=bottom + 10, text_anchor="middle") for i in range(0, layers, 5)
    ]
    labels.append(tag("text", "layer", x=LEFT + layers * STEP / 2, y=bottom + 21, text_anchor="middle"))
    label = (
        f"{title}, {layers} layers by {heads} heads. Arrow keys move from head to head; the table "
        f"below has the same data."
    )
    picture = tag(
        "svg",
        tag("g", drawn, class_="cells"),
        tag("g", labels, aria_hidden="true"),
        viewbox=f"0 0 {LEFT + layers * STEP + 2} {bottom + BOTTOM}",
        class_="map",
        tabindex=0,
        role="group",
        aria_label=label,
        data_rows=kind,
        data_heads=heads,
        style=f"min-width:{LEFT + 7 * layers}px;max-width:{LEFT + 24 * layers}px",
    )
    caption = tag("figcaption", tag("strong", title), f" {note}" if note else None)
    return tag("figure", caption, tag("div", picture, class_="scroll"), legend, class_="headmap")


def class_map(kinds: Sequence[Sequence[HeadType]], title: str) -> Html:
    """Draw classes `[layer][query head]`, each by colour and by letter."""
    cells, letters = [], []
    for i, layer in enumerate(kinds):
        for j, kind in enumerate(layer):
            colour = CLASS_STYLE[kind][0]
            cells.append(cell(i, j, STEP, colour))
            place = {"x": LEFT + (i + 0.5) * STEP - 0.5, "y": (j + 0.5) * STEP - 0.5}
            letters.append(tag("text", CLASS_LETTERS[kind], **place, fill=ink_on(colour)))
    drawn = joined([*cells, tag("g", letters, class_="letters", aria_hidden="true")])
    counts = {kind: sum(layer.count(kind) for layer in kinds) for kind in CLASS_STYLE}
    keys = [
        tag(
            "li",
            tag(
                "b",
                CLASS_LETTERS[kind],
                style=f"background:{CLASS_STYLE[kind][0]};color:{ink_on(CLASS_STYLE[kind][0])}",
            ),
            f" {CLASS_LABELS[kind]}: {count}",
        )
        for kind, count in counts.items()
        if count
    ]
    return head_map("q", title, "", STEP, (len(kinds), len(kinds[0])), drawn, tag("ul", keys, class_="legend"))


def number_map(
    kind: str, values: Grid, scale: Scale, title: str, note: str, say: Callable[[float], str] = "{:.2f}".format
) -> Html:
    """Draw numbers `[layer][head]` as colours; `say` writes a number in the legend."""
    heads = len(values[0])
    height = STEP if heads > 4 else 18
    cells = (
        cell(i, j, height, cividis(scale(value))) for i, layer in enumerate(values) for j, value in enumerate(layer)
    )
    stripes = [tag("rect", x=i, y=0, width=1.05, height=1, fill=cividis((i + 0.5) / STRIPES)) for i in range(STRIPES)]
    bar = tag("svg", stripes, viewbox=f"0 0 {STRIPES} 1", preserveAspectRatio="none", aria_hidden="true")
    words = [tag("span", say(value)) for value in (scale.low, scale.middle(), scale.high)]
    legend = tag("div", bar, tag("div", words), class_="colourbar")
    return head_map(kind, title, note, height, (len(values), heads), joined(cells), legend)


def side_by_side(maps: Sequence[Html], layers: int) -> Html:
    """Arrange maps in as many columns as have room; maps of deeper models are wider."""
    return tag("div", maps, class_="maps", style=f"--map:{max(21 * 16, LEFT + 9 * layers)}px")


def query_table(statistics: Sequence[HeadStatistics], classes: Sequence[HeadClassification]) -> Html:
    """Build the folded table of all query heads."""
    rows = []
    for head, found in zip(statistics, classes, strict=True):
        window = {-1: "full", 0: "none"}.get(found.recommended_window, str(found.recommended_window))
        induction = "–" if head.induction_score is None else f"{head.induction_score:.3f}"
        row = [f"{head.layer_idx}.{head.head_idx}", CLASS_LABELS[found.head_type], window, f"{head.mean_entropy:.2f}"]
        rows.append([*row, f"{head.sink_ratio:.3f}", f"{head.local_ratio:.3f}", induction])
    header = ("head", "class", "window", "entropy", "sink", "local", "induction")
    ids = [f"q{head.layer_idx}-{head.head_idx}" for head in statistics]
    return details(f"All {len(rows)} query heads as a table", table(header, rows, "Query heads", ids))


def price_table(prices: Prices, plans: Plans, context: int) -> Html:
    """Build the folded table of all KV heads; slots are those after `context` tokens."""
    header = ["head", f"price at {prices[0]['sinks']} + {prices[0]['window']}", "facts carried"]
    header += [f"slots, {size}" for size in plans]
    rows = []
    for row in prices:
        i, j = row["layer"], row["kv_head"]
        kept = [slots_text(plan.layers[i][j], context) for plan in plans.values()]
        rows.append([f"{i}.{j}", f"{row['price']:.3f}", f"{row['facts']:.3f}", *kept])
    ids = [f"k{row['layer']}-{row['kv_head']}" for row in prices]
    return details(f"All {len(rows)} KV heads as a table", table(header, rows, "KV heads", ids))


def slots_text(kept: Retention, context: int) -> str:
    """Write a retention as slots after `context` tokens: `32 (4 + 8 + 20 by key_diff)`."""
    held = f"{kept.held(context):,}"
    more = f" + {kept.chosen} by {kept.score}" if kept.chosen else ""
    return f"{held} (all)" if kept.unbounded else f"{held} ({kept.sinks} + {kept.window}{more})"
