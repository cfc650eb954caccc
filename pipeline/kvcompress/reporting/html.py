"""HTML and SVG from Python calls; text and attributes are escaped unless they are markup already."""

from collections.abc import Iterable
from html import escape
from typing import Any

Child = Any  # a string or number (escaped), Html (as it is), None (nothing), or an iterable of these


class Html(str):
    """Markup that is safe to write as it is."""

    __slots__ = ()


def number(value: float) -> str:
    """Format a coordinate with at most two decimals and without trailing zeros or -0."""
    written = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if written == "-0" else written


def render(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Html):
        return child
    if isinstance(child, str):
        return escape(child)
    return number(child) if isinstance(child, int | float) else joined(child)


def joined(children: Iterable[Child]) -> Html:
    return Html("".join(map(render, children)))


def tag(name: str, /, *children: Child, **attributes: Any) -> Html:
    """Build an element: `tag("a", "text", href="#x", class_="y")`.

    In names of attributes a trailing underscore is dropped and others become dashes. None and False leave an attribute
    out, True writes it without a value.
    """
    parts = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-").replace("viewbox", "viewBox")
        shown = number(value) if isinstance(value, int | float) and value is not True else value
        parts.append(key if value is True else f'{key}="{escape(str(shown))}"')
    opening = f"<{' '.join(parts)}>"
    return Html(opening) if name == "meta" else Html(f"{opening}{joined(children)}</{name}>")


def scroll(content: Child, label: str) -> Html:
    """Put content into a box that scrolls sideways."""
    return tag("div", content, class_="scroll", tabindex=0, role="region", aria_label=label)


def table(header: Iterable[Child], rows: Iterable[Iterable[Child]], label: str, ids: Iterable[str] = ()) -> Html:
    """Build a table that scrolls sideways; the first cell of a row is its heading. `ids`: one for each row."""
    marks, body = iter(ids), []
    for first, *rest in rows:
        body.append(tag("tr", tag("th", first, scope="row"), (tag("td", cell) for cell in rest), id=next(marks, None)))
    head = tag("thead", tag("tr", (tag("th", name, scope="col") for name in header)))
    return scroll(tag("table", head, tag("tbody", body)), label)


def details(summary: str, *children: Child) -> Html:
    """Build a folded block."""
    return tag("details", tag("summary", summary), *children)
