"""Speed and memory, where a benchmark was run: bars beside numbers, and what a token costs at growing context."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvcompress.core.errors import InputError
from kvcompress.reporting.comparison_data import OTHER
from kvcompress.reporting.comparison_report import counted
from kvcompress.reporting.page.chart import Axis, Point, Series, chart
from kvcompress.reporting.page.markup import Html, number, table, tag
from kvcompress.reporting.page.pareto import LOOKS
from kvcompress.reporting.page.scale import Scale, linear_ticks

Results = Sequence[Mapping[str, Any]]
Row = Mapping[str, Any]
COLUMNS: dict[str, tuple[Callable[[Row], float], str, str]] = {  # header -> value, format, unit
    "first token": (lambda row: row["first_token_ms"]["median"], ",.0f", "ms"),
    "decoding": (lambda row: row["decode_tokens_per_s"], ",.1f", "tokens/s"),
    "decoding against full": (lambda row: row["to_full"]["decode_times_faster"], ".2f", "×"),
    "cache, mean": (lambda row: row["bytes_mean"] / 1e6, ",.1f", "MB"),
    "cache, peak": (lambda row: row["bytes_peak"] / 1e6, ",.1f", "MB"),
    "cache against full": (lambda row: 100 * row["to_full"]["bytes_share"], ".1f", "%"),
}
APART = (
    "Every table is a run of its own, and the full cache takes part in each: its times differ between runs with what else "
    "the machine had to do. Compare methods within a table."
)


def speed(results: Results) -> Html:
    """All results of a benchmark. Raises `InputError` where a number is missing."""
    try:
        found = [(bars(result), growth(result)) for result in results]
    except (KeyError, TypeError) as error:
        raise InputError(f"the benchmark's results have no {error}") from error
    return tag("div", tag("p", APART) if len(results) > 1 else None, found, class_="speed")


def bars(result: Row) -> list[Html]:
    """A heading and a table, a row a method; a bar is as long as its number is large in its column."""
    rows, settings = result["rows"], result["settings"]
    largest = {name: max(value(row) for row in rows) for name, (value, _, _) in COLUMNS.items()}
    shown = []
    for row in rows:
        about = row.get("settings")
        cells: list[Html | Sequence[Any]] = [[name_of(row["name"]), tag("small", about) if about else None]]
        for name, (value, form, unit) in COLUMNS.items():
            length = number(100 * value(row) / (largest[name] or 1), 1)
            words = f"{value(row):{form}} {unit}"
            cells.append(tag("td", words, tag("i", style=f"width:{length}%"), class_="bar", data_name=name))
        shown.append(cells)
    caption = (
        f"{counted(settings['num_samples'], 'prompt')} of {settings['max_tokens']} tokens, {settings['max_new_tokens']} "
        "tokens decoded one by one after each; medians, methods in turns"
    )
    others = ", ".join(row["name"] for row in rows if row["name"] != "full")
    return [tag("h3", f"Full cache, {others}"), table(["method", *COLUMNS], shown, caption)]


def name_of(contender: str) -> str:
    return "full cache" if contender == "full" else contender


def method_of(contender: str, settings: str) -> str:
    """Whose looks a line takes: those of the policy that its plan has."""
    if contender.startswith("uniform"):
        return "uniform sink + window"
    policy = settings.removeprefix("plan: ") if settings.startswith("plan: ") else contender
    return "class table" if policy == "class_table" else policy


def growth(result: Row) -> Html | None:
    """Milliseconds of a decode step against tokens of context, batch 1; None where that was not measured."""
    rows = [row for row in result.get("growth") or [] if row["batch"] == 1]
    settings = {row["name"]: row.get("settings", "") for row in result["rows"]}
    if not rows:
        return None
    contexts = sorted({row["context"] for row in rows})
    top = max(max(row["step_ms"], row.get("step_p90") or 0) for row in rows) * 1.06
    series = []
    for name in dict.fromkeys(row["contender"] for row in rows):
        colour, shape = LOOKS.get(method_of(name, settings.get(name, "")), OTHER)
        points = [
            Point(row["context"], row["step_ms"], tip(row), row.get("step_p10"), row.get("step_p90"))
            for row in rows
            if row["contender"] == name
        ]
        series.append(Series(name_of(name), colour, shape, points, line=True))
    x = Axis("tokens of context", Scale(0, contexts[-1] * 1.04), [(value, f"{value:,}") for value in contexts])
    y = Axis("milliseconds a token", Scale(0, top), [(value, f"{value:g}") for value in linear_ticks(0, top)])
    title = "A decoded token at growing context (caches of random keys, batch 1; bars: 10th to 90th percentile)"
    return chart(title, x, y, series)


def tip(row: Row) -> str:
    return f"{row['contender']}\n{row['context']:,} tokens, {row['megabytes']:.1f} MB\n{row['step_ms']:.1f} ms a token"
