"""Head maps: depth to the right, a row a head, a cell coloured by class or by a number, with its legend.

A cell knows nothing but its place; what is said about its head stands once, in the row of the table whose id the map's
`data-rows` begins (`q` + `3-4`), where the script finds it.
"""

from collections.abc import Callable, Sequence

from kvcompress.core.head_classes import CLASS_LABELS, CLASS_LETTERS, CLASS_STYLE, HeadType
from kvcompress.reporting.page.heads import Grid
from kvcompress.reporting.page.markup import Html, joined, tag
from kvcompress.reporting.page.scale import Scale, cividis, ink_on

STEP, LEFT, BOTTOM = 12, 24, 25  # of one cell, of the margins; units of the picture
STRIPES = 24  # of a legend


def row_id(kind: str, layer: int, head: int) -> str:
    return f"{kind}{layer}-{head}"


def frame(kind: str, title: str, height: float, layers: int, heads: int, cells: Html) -> Html:
    """Cells with their axes; `height` of one cell. The script makes it answer to the pointer and to arrow keys."""
    bottom = heads * height
    every = 1 if heads <= 12 else 4
    labels = [
        tag("text", j, x=LEFT - 4, y=(j + 0.5) * height, text_anchor="end", dominant_baseline="central")
        for j in range(0, heads, every)
    ]
    labels += [
        tag("text", i, x=LEFT + (i + 0.5) * STEP, y=bottom + 10, text_anchor="middle") for i in range(0, layers, 5)
    ]
    labels.append(tag("text", "layer", x=LEFT + layers * STEP / 2, y=bottom + 21, text_anchor="middle"))
    label = (
        f"{title}, {layers} layers by {heads} heads. Arrow keys move from head to head; the table below says the same."
    )
    return tag(
        "svg",
        tag("g", cells, class_="cells"),
        tag("g", labels, class_="axis", aria_hidden="true"),
        viewbox=f"0 0 {LEFT + layers * STEP + 2} {bottom + BOTTOM}",
        class_="map",
        tabindex=0,
        role="group",
        aria_label=label,
        data_rows=kind,
        data_heads=heads,
        style=f"min-width:{LEFT + 7 * layers}px;max-width:{LEFT + 24 * layers}px",
    )


def figure(picture: Html, title: str, legend: Html, note: str = "") -> Html:
    caption = tag("figcaption", tag("strong", title), f" {note}" if note else None)
    return tag("figure", caption, tag("div", picture, class_="scroll"), legend, class_="headmap")


def cell(layer: int, head: int, height: float, colour: str) -> Html:
    return tag("rect", x=LEFT + layer * STEP, y=head * height, width=STEP - 1, height=height - 1, fill=colour)


def side_by_side(maps: Sequence[Html], layers: int) -> Html:
    """As many maps in a row as have room; a deep model's need more of it."""
    return tag("div", maps, class_="maps", style=f"--map:{max(21 * 16, LEFT + 9 * layers)}px")


def class_map(kinds: Sequence[Sequence[HeadType]], title: str, note: str) -> Html:
    """Classes `[layer][query head]`, each by colour and by letter."""
    cells: list[Html] = []
    letters: list[Html] = []
    for i, layer in enumerate(kinds):
        for j, kind in enumerate(layer):
            colour = CLASS_STYLE[kind][0]
            cells.append(cell(i, j, STEP, colour))
            place = {"x": LEFT + (i + 0.5) * STEP - 0.5, "y": (j + 0.5) * STEP - 0.5}
            letters.append(tag("text", CLASS_LETTERS[kind], **place, fill=ink_on(colour)))
    shown = joined([*cells, tag("g", letters, class_="letters", aria_hidden="true")])
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
    legend = tag("ul", keys, class_="legend")
    return figure(frame("q", title, STEP, len(kinds), len(kinds[0]), shown), title, legend, note)


def number_map(
    kind: str,
    values: Grid,
    scale: Scale,
    title: str,
    note: str,
    say: Callable[[float], str] = "{:.2f}".format,
) -> Html:
    """Numbers `[layer][head]` as cividis colours; `say` writes a number in the legend."""
    heads = len(values[0])
    height = STEP if heads > 4 else 18
    cells = joined(
        cell(i, j, height, cividis(scale(value))) for i, layer in enumerate(values) for j, value in enumerate(layer)
    )
    return figure(frame(kind, title, height, len(values), heads, cells), title, colour_bar(scale, say), note)


def colour_bar(scale: Scale, say: Callable[[float], str]) -> Html:
    """From the lowest to the highest value, with the one between them."""
    stripes = [tag("rect", x=i, y=0, width=1.05, height=1, fill=cividis((i + 0.5) / STRIPES)) for i in range(STRIPES)]
    bar = tag("svg", stripes, viewbox=f"0 0 {STRIPES} 1", preserveAspectRatio="none", aria_hidden="true")
    words = [tag("span", say(value)) for value in (scale.low, scale.middle(), scale.high)]
    return tag("div", bar, tag("div", words), class_="colourbar")
