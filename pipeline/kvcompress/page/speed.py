"""Speed and memory, where a benchmark was run: bars beside numbers, and what a token costs at growing context."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvcompress.errors import InputError
from kvcompress.evaluation.ablation_data import OTHER, STYLE
from kvcompress.page.chart import Axis, Point, Series, chart
from kvcompress.page.markup import Html, number, table, tag
from kvcompress.page.scale import Scale, linear_ticks

Results = Sequence[Mapping[str, Any]]
Row = Mapping[str, Any]
COLUMNS: dict[str, tuple[Callable[[Row], float], str, str]] = {  # header -> value, format, unit
    "first token": (lambda row: row["first_token_ms"]["median"], ",.0f", "ms"),
    "decoding": (lambda row: row["decode_tokens_per_s"], ",.1f", "tokens/s"),
    "against the full cache": (lambda row: row["to_full"]["decode_times_faster"], ".2f", "×"),
    "cache, mean": (lambda row: row["bytes_mean"] / 1e6, ",.1f", "MB"),
    "cache, peak": (lambda row: row["bytes_peak"] / 1e6, ",.1f", "MB"),
    "of the full cache": (lambda row: 100 * row["to_full"]["bytes_share"], ".1f", "%"),
}
LINES = (
    "full",
    "uniform sink + window",
    "priced",
    "inverse",
    "retrieval_heads",
)  # whose looks the lines take, in order


def speed(results: Results) -> Html:
    """All results of a benchmark. Raises `InputError` where a number is missing."""
    try:
        return tag("div", ((bars(result), growth(result.get("growth") or [])) for result in results), class_="speed")
    except (KeyError, TypeError) as error:
        raise InputError(f"the benchmark's results have no {error}") from error


def bars(result: Row) -> Html:
    """A row a method; a bar is as long as its number is large in its column."""
    rows, settings = result["rows"], result["settings"]
    largest = {name: max(value(row) for row in rows) for name, (value, _, _) in COLUMNS.items()}
    shown = []
    for row in rows:
        cells: list[Html | str] = [row["name"]]
        for name, (value, form, unit) in COLUMNS.items():
            length = number(100 * value(row) / (largest[name] or 1), 1)
            words = f"{value(row):{form}} {unit}"
            cells.append(tag("td", tag("i", style=f"width:{length}%"), tag("span", words), class_="bar"))
        shown.append(cells)
    caption = (
        f"{settings['num_samples']} prompts of {settings['max_tokens']} tokens, {settings['max_new_tokens']} tokens "
        "decoded one by one after each; medians, methods in turns"
    )
    return table(["method", *COLUMNS], shown, caption)


def growth(rows: Sequence[Row]) -> Html | None:
    """Milliseconds of a decode step against tokens of context, batch 1; None without rows."""
    rows = [row for row in rows if row["batch"] == 1]
    if not rows:
        return None
    contexts = sorted({row["context"] for row in rows})
    top = max(max(row["step_ms"], row.get("step_p90") or 0) for row in rows) * 1.06
    series = []
    for i, name in enumerate(dict.fromkeys(row["contender"] for row in rows)):
        colour, shape = STYLE[LINES[i]] if i < len(LINES) else OTHER
        points = [
            Point(row["context"], row["step_ms"], tip(row), row.get("step_p10"), row.get("step_p90"))
            for row in rows
            if row["contender"] == name
        ]
        series.append(Series(name, colour, shape, points, line=True))
    x = Axis("tokens of context", Scale(0, contexts[-1] * 1.04), [(value, f"{value:,}") for value in contexts])
    y = Axis("milliseconds a token", Scale(0, top), [(value, f"{value:g}") for value in linear_ticks(0, top)])
    return chart("A decoded token at growing context (batch 1; bars: 10th to 90th percentile)", x, y, series)


def tip(row: Row) -> str:
    return f"{row['contender']}\n{row['context']:,} tokens, {row['megabytes']:.1f} MB\n{row['step_ms']:.1f} ms a token"
