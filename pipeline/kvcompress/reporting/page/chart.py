"""Charts of points and lines with error bars, as SVG; every point can be reached by pointer and by keyboard."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvcompress.reporting.page.markup import Html, number, tag
from kvcompress.reporting.page.scale import Scale

WIDTH, HEIGHT = 460, 330
LEFT, RIGHT, TOP, BOTTOM = 54, 10, 8, 42
SIZE = 4.5  # of a marker
OUTLINES = {  # marker -> corners, in units of SIZE around the point
    "s": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
    "D": ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
    "^": ((0, -1.2), (1.2, 1), (-1.2, 1)),
    "v": ((0, 1.2), (1.2, -1), (-1.2, -1)),
}
STROKES = {  # marker -> a path of lines
    "x": "M-1-1L1 1M-1 1L1-1",
    "+": "M-1.3 0H1.3M0-1.3V1.3",
    "P": "M-1.3 0H1.3M0-1.3V1.3",
    "*": "M-1.3 0H1.3M0-1.3V1.3M-1-1L1 1M-1 1L1-1",
}


@dataclass(frozen=True)
class Axis:
    """`ticks`: (value, what is written there)."""

    label: str
    scale: Scale
    ticks: Sequence[tuple[float, str]]


@dataclass(frozen=True)
class Point:
    """`low` and `high` are the ends of an error bar; `tip` are the lines that hover and focus show."""

    x: float
    y: float
    tip: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    name: str
    colour: str
    marker: str
    points: Sequence[Point]
    line: bool = False
    dashed: bool = False


def paint(colour: str) -> str:
    """Black is the page's ink, so that it can be seen on a dark page too."""
    return "var(--ink)" if colour == "#000000" else colour


def marker(kind: str, colour: str, x: float, y: float) -> Html:
    """Filled shapes have a thin rim, so that pale ones stand out on white."""
    where = f"translate({number(x)} {number(y)})"
    if kind in STROKES:
        width = 0.65 if kind == "P" else 0.4
        place = f"{where} scale({SIZE})"
        return tag("path", d=STROKES[kind], stroke=paint(colour), stroke_width=width, fill="none", transform=place)
    rim = {"fill": paint(colour), "stroke": "var(--ink)", "stroke_width": 0.6, "transform": where}
    if kind in OUTLINES:
        corners = " ".join(f"{number(SIZE * a)},{number(SIZE * b)}" for a, b in OUTLINES[kind])
        return tag("polygon", points=corners, **rim)
    return tag("circle", r=SIZE if kind != "." else SIZE / 2, **rim)


def chart(title: str, x: Axis, y: Axis, series: Sequence[Series], level: float | None = None) -> Html:
    """`level`: a dotted line across, of what everything is compared with. Points above the axis stand at its upper edge."""
    right, floor = WIDTH - RIGHT, HEIGHT - BOTTOM
    edge = TOP + 2.5 * SIZE  # where points stand that lie above the axis

    def across(value: float) -> float:
        return LEFT + x.scale(value) * (right - LEFT)

    def up(value: float) -> float:
        return floor - y.scale(value) * (floor - TOP)

    drawn = [tag("rect", x=LEFT, y=TOP, width=right - LEFT, height=floor - TOP, class_="plane")]
    for value, written in x.ticks:
        drawn.append(tag("line", x1=across(value), x2=across(value), y1=TOP, y2=floor, class_="grid"))
        drawn.append(tag("text", written, x=across(value), y=floor + 14, text_anchor="middle"))
    for value, written in y.ticks:
        drawn.append(tag("line", x1=LEFT, x2=right, y1=up(value), y2=up(value), class_="grid"))
        drawn.append(tag("text", written, x=LEFT - 5, y=up(value), text_anchor="end", dominant_baseline="central"))
    drawn.append(tag("text", x.label, x=(LEFT + right) / 2, y=HEIGHT - 8, text_anchor="middle"))
    middle = number((TOP + floor) / 2)
    drawn.append(tag("text", y.label, text_anchor="middle", transform=f"translate(12 {middle}) rotate(-90)"))
    if level is not None:
        drawn.append(tag("line", x1=LEFT, x2=right, y1=up(level), y2=up(level), class_="level"))
    marks = []
    for one in series:
        places = [(across(point.x), edge if point.y > y.scale.high else up(point.y)) for point in one.points]
        if one.line and len(places) > 1:
            path = " ".join(f"{number(a)},{number(b)}" for a, b in places)
            dash = "5 4" if one.dashed else None
            marks.append(
                tag(
                    "polyline",
                    points=path,
                    fill="none",
                    stroke=paint(one.colour),
                    stroke_width=1.6,
                    stroke_dasharray=dash,
                )
            )
        for point, (a, b) in zip(one.points, places, strict=True):
            parts = [tag("circle", cx=a, cy=b, r=11, fill="transparent")]  # something large enough to point at
            if point.y > y.scale.high:
                parts.append(tag("text", f"↑ {point.y:.3g}", x=a + 2.5 * SIZE, y=b, dominant_baseline="central"))
            elif point.low is not None and point.high is not None:
                bar = f"M{number(a)} {number(up(point.low))}V{number(up(point.high))}"
                ends = "".join(f"M{number(a - 3)} {number(up(end))}h6" for end in (point.low, point.high))
                parts.append(tag("path", d=bar + ends, stroke=paint(one.colour), stroke_width=1.2))
            parts.append(marker(one.marker, one.colour, a, b))
            label = point.tip.replace("\n", ", ")
            marks.append(tag("g", parts, class_="point", tabindex=0, role="img", aria_label=label, data_tip=point.tip))
    picture = tag("svg", tag("g", drawn, class_="axis", aria_hidden="true"), marks, viewbox=f"0 0 {WIDTH} {HEIGHT}",
                  class_="chart", role="group", aria_label=title)  # fmt: skip
    keys = [
        tag("li", tag("svg", marker(one.marker, one.colour, 8, 8), viewbox="0 0 16 16", aria_hidden="true"), one.name)
        for one in series
    ]
    return tag(
        "figure", tag("figcaption", tag("strong", title)), picture, tag("ul", keys, class_="legend"), class_="wide"
    )
