"""HTML and SVG from Python calls; every text and every attribute is escaped unless it is markup already."""

from collections.abc import Iterable
from html import escape
from typing import Any

VOID = {"meta", "br", "hr"}
Child = Any  # a string or number (escaped), Html (as it is), None (nothing), or an iterable of these


class Html(str):
    """Markup that is safe to write as it is."""

    __slots__ = ()


def number(value: float, decimals: int = 2) -> str:
    """A coordinate: few digits, no trailing zeros, never -0."""
    written = f"{value:.{decimals}f}".rstrip("0").rstrip(".") if decimals else f"{value:.0f}"
    return "0" if written in ("-0", "") else written


def joined(children: Iterable[Child]) -> Html:
    """All children one after the other."""
    return Html("".join(map(render, children)))


def render(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Html):
        return child
    if isinstance(child, str):
        return escape(child)
    if isinstance(child, int | float):
        return number(child)
    return joined(child)


def tag(name: str, /, *children: Child, **attributes: Any) -> Html:
    """`tag("a", "text", href="#x", class_="y")`: a trailing underscore is dropped, others become dashes.

    Attributes that are None or False are left out, True stands alone.
    """
    parts = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-").replace("viewbox", "viewBox")
        shown = number(value) if isinstance(value, int | float) and value is not True else value
        parts.append(key if value is True else f'{key}="{escape(str(shown))}"')
    opening = " ".join(parts)
    return Html(f"<{opening}>" if name in VOID else f"<{opening}>{joined(children)}</{name}>")


def table(
    header: Iterable[Child],
    rows: Iterable[Iterable[Child]],
    caption: str,
    ids: Iterable[str] = (),
    captioned: bool = True,
) -> Html:
    """A table in a box that scrolls sideways; the first cell of a row is its heading. `ids`: one for every row.

    `captioned`: False where the caption would repeat what stands above; then only screen readers say it.
    """
    names, marks = list(header), iter(ids)
    body = []
    for row in rows:
        first, *rest = row
        cells = [cell if str(cell).startswith("<td") else tag("td", cell) for cell in rest]
        body.append(tag("tr", tag("th", first, scope="row"), cells, id=next(marks, None)))
    head = tag("thead", tag("tr", (tag("th", name, scope="col") for name in names)))
    return tag(
        "div",
        tag("table", tag("caption", tag("span", caption)) if captioned else None, head, tag("tbody", body)),
        class_="scroll",
        tabindex=0,
        role="region",
        aria_label=caption,
    )


def details(summary: str, *children: Child) -> Html:
    """Folded until it is asked for."""
    return tag("details", tag("summary", summary), *children)
