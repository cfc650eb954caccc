"""The benchmark in words: the same tables for the terminal and for Markdown, and what was run."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table

Row = Mapping[str, Any]
Columns = Mapping[str, Callable[[Row], str]]  # header -> a row's cell


def number(value: float | None, digits: int = 1, scale: float = 1.0) -> str:
    """A dash where a number cannot be had."""
    return "–" if value is None else f"{value / scale:,.{digits}f}"


def band(median: float, low: float, high: float) -> str:
    return f"{median:,.1f} ({low:,.0f}–{high:,.0f})"


def change(nll: Mapping[str, float | None]) -> str:
    bounds = "" if nll["low"] is None else f" ({nll['low']:+.3f} … {nll['high']:+.3f})"
    return f"{nll['mean']:+.3f}{bounds}"


SPEED: Columns = {
    "method": lambda row: row["name"],
    "first token ms": lambda row: number(row["first_token_ms"]["median"], 0),
    "prefill tok/s": lambda row: number(row["prefill_tokens_per_s"], 0),
    "compress ms": lambda row: number(row["compress_ms"] and row["compress_ms"]["median"]),
    "decode tok/s": lambda row: number(row["decode_tokens_per_s"]),
    "ms a token (p10–p90)": lambda row: band(*row["decode_ms"].values()),
    "× full": lambda row: number(row["to_full"]["decode_times_faster"], 2),
}
QUALITY: Columns = {
    "method": lambda row: row["name"],
    "cache MB": lambda row: number(row["bytes_mean"], 2, 1e6),
    "peak": lambda row: number(row["bytes_peak"], 2, 1e6),
    "of full": lambda row: f"{row['to_full']['bytes_share']:.1%}",
    "GPU MB": lambda row: number(row["peak_device_bytes"], 0, 1e6),
    "perplexity": lambda row: number(row["perplexity"], 2),
    "ΔNLL to full": lambda row: change(row["to_full"]["nll"]),
    "accuracy": lambda row: f"{row['accuracy']:.1%}",
}
GROWTH: Columns = {
    "tokens": lambda row: f"{row['context']:,}",
    "batch": lambda row: str(row["batch"]),
    "cache": lambda row: row["contender"],
    "MB": lambda row: number(row["megabytes"]),
    "step ms": lambda row: number(row["step_ms"]),
    "× full": lambda row: number(row["step_ratio"], 2),
    "limit": lambda row: number(row["step_limit_ms"]),
    "append + attend ms": lambda row: number(row["attention_ms"], 2),
    "× full ": lambda row: number(row["attention_ratio"], 2),
    "limit ": lambda row: number(row["attention_limit_ms"], 2),
}


def terminal(columns: Columns, rows: Sequence[Row]) -> Table:
    """Narrow enough for 80 columns: headers stand one word a line."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for header in columns:
        words = header in ("method", "cache")
        side: Literal["left", "right"] = "left" if words else "right"
        table.add_column("\n".join(header.split()), justify=side, no_wrap=not words)
    for row in rows:
        table.add_row(*(cell(row) for cell in columns.values()))
    return table


def markdown(columns: Columns, rows: Sequence[Row]) -> list[str]:
    lines = ["| " + " | ".join(header.strip() for header in columns) + " |", "| --- " * len(columns) + "|"]
    return [*lines, *("| " + " | ".join(cell(row) for cell in columns.values()) + " |" for row in rows)]


def origin(result: Row) -> str:
    """Model, machine and protocol of one result, in sentences."""
    where, settings, rows = result["environment"], result["settings"], result["rows"]
    prompts = "1 prompt" if settings["num_samples"] == 1 else f"{settings['num_samples']} prompts"
    return (
        f"{result['model']} on {where['device']}, {where['threads']} CPU threads, {where['dtype']}, torch "
        f"{where['torch']}, transformers {where['transformers']}. {prompts} of "
        f"{settings['max_tokens']} tokens from {', '.join(dict.fromkeys(result['samples']))}, read in full and then "
        f"compressed; the {settings['max_new_tokens']} tokens that follow are decoded one by one, methods in turns of "
        f"{settings['turn']}. Times are medians; the first step of a turn is warm-up. × full: how much faster, the "
        "median of the ratios to the full cache's step in the same turn. Perplexity and accuracy are of only "
        f"{rows[0]['tokens']} tokens: the ablation judges quality."
    )


def growth_words(result: Row) -> str:
    return (
        f"A decode step at growing context, caches of random keys, {result['settings']['growth_rounds']} turns. Limit: "
        f"{result['weight_bytes'] / 1e6:,.0f} MB of weights and the cache (attention, with the append: the cache), read "
        f"once at the {result['copy_bytes_per_s'] / 1e9:,.1f} GB/s that copying a large tensor reached in the same run."
    )


def report(results: Sequence[Row]) -> str:
    """All results as one page."""
    lines = ["# Benchmark", ""]
    for result in results:
        rows = result["rows"]
        lines += [f"## {', '.join(row['name'] for row in rows[1:]) or rows[0]['name']}", "", origin(result), ""]
        lines += [*markdown(SPEED, rows), "", *markdown(QUALITY, rows), ""]
        lines += [*(f"- {row['name']}: {row['settings']}" for row in rows), ""]
        if result["growth"]:
            lines += [growth_words(result), "", *markdown(GROWTH, result["growth"]), ""]
    return "\n".join(lines)


def show(result: Row, console: Console) -> None:
    """What was run and its tables, on a terminal."""
    console.print(origin(result), highlight=False)
    for columns in (SPEED, QUALITY):
        console.print(terminal(columns, result["rows"]))
    if result["growth"]:
        console.print(growth_words(result), highlight=False)
        console.print(terminal(GROWTH, result["growth"]))
