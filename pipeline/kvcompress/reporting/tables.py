"""Markdown tables, and numbers as all reports write them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Columns = Mapping[str, Callable[[Row], str]]  # header -> cell of a row


def markdown(header: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; bars in cells are escaped."""
    lines = [list(header), *rows]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|").strip() for cell in line) + " |" for line in lines)


def cells(columns: Columns, rows: Iterable[Row]) -> list[list[str]]:
    """Return one line of cells for each row."""
    return [[cell(row) for cell in columns.values()] for row in rows]


def number(value: float | None, digits: int = 1, scale: float = 1.0) -> str:
    """`1,234.5`, or a dash for a missing value."""
    return "–" if value is None else f"{value / scale:,.{digits}f}"


def change(interval: Mapping[str, float | None], digits: int = 3) -> str:
    """`+0.020 (+0.010 … +0.030)`: a difference with its interval, if it has one."""
    mean, low, high = interval["mean"], interval["low"], interval["high"]
    bounds = "" if low is None or high is None else f" ({low:+.{digits}f} … {high:+.{digits}f})"
    return f"{mean:+.{digits}f}{bounds}"


def counted(count: int, thing: str) -> str:
    """`1 document`, `2 documents`."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def listed(values: Iterable[Any]) -> str:
    """`512, 1,024`: numbers with separators of thousands, anything else as text."""
    return ", ".join(f"{value:,}" if isinstance(value, int) else str(value) for value in values)
