"""Benchmark results (stage `benchmark`): tables for terminal and Markdown, plot data, metrics."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from kvcompress.reporting.method_style import FULL
from kvcompress.reporting.tables import Columns, Row, cells, change, counted, listed, markdown, number

SPEED: Columns = {
    "method": lambda row: row["name"],
    "first token ms": lambda row: number(row["first_token_ms"]["median"], 0),
    "prefill tok/s": lambda row: number(row["prefill_tokens_per_s"], 0),
    "compress ms": lambda row: number(row["compress_ms"] and row["compress_ms"]["median"]),
    "decode tok/s": lambda row: number(row["decode_tokens_per_s"]),
    "ms a token (p10–p90)": lambda row: "{median:,.1f} ({p10:,.0f}–{p90:,.0f})".format(**row["decode_ms"]),
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


def origin(result: Row) -> str:
    """Describe model, machine and protocol of a result."""
    where, settings = result["environment"], result["settings"]
    return (
        f"{result['model']} on {where['device']}, {where['threads']} CPU threads, {where['dtype']}, torch "
        f"{where['torch']}, transformers {where['transformers']}. {counted(settings['num_samples'], 'prompt')} of "
        f"{settings['max_tokens']:,} tokens from {listed(dict.fromkeys(result['samples']))}, read in full and then "
        f"compressed. The {settings['max_new_tokens']} tokens that follow are decoded one by one; methods take turns of "
        f"{settings['turn']} tokens, the first of which is warm-up. Times are medians. × full: how much faster than the "
        "full cache, as the median of the ratios within a turn. Perplexity and accuracy come from only "
        f"{result['rows'][0]['tokens']} tokens; compare quality in the ablation."
    )


def growth_origin(result: Row) -> str:
    """Describe how decode steps at growing context were timed."""
    return (
        f"A decode step at growing context, caches of random keys, {result['settings']['growth_rounds']} rounds. The limit "
        f"is the time to read {result['weight_bytes'] / 1e6:,.0f} MB of weights and the cache once (append + attend: the "
        f"cache alone) at {result['copy_bytes_per_s'] / 1e9:,.1f} GB/s, the speed of copying a large tensor in this run."
    )


def report(results: Sequence[Row]) -> str:
    """Return all results as one Markdown page."""
    blocks = ["# Benchmark"]
    for result in results:
        rows = result["rows"]
        blocks += [f"## {', '.join(row['name'] for row in rows[1:]) or rows[0]['name']}", origin(result)]
        blocks += [markdown(columns, cells(columns, rows)) for columns in (SPEED, QUALITY)]
        blocks.append("\n".join(f"- {row['name']}: {row['settings']}" for row in rows))
        if result["growth"]:
            blocks += [growth_origin(result), markdown(GROWTH, cells(GROWTH, result["growth"]))]
    return "\n\n".join(blocks) + "\n"


def terminal(columns: Columns, rows: Sequence[Row]) -> Table:
    """Return a table for 80 columns, headers one word a line."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for header in columns:
        text = header in ("method", "cache")
        table.add_column("\n".join(header.split()), justify="left" if text else "right", no_wrap=not text)
    for line in cells(columns, rows):
        table.add_row(*line)
    return table


def show(result: Row, console: Console) -> None:
    """Print a result."""
    console.print(origin(result), highlight=False)
    for columns in (SPEED, QUALITY):
        console.print(terminal(columns, result["rows"]))
    if result["growth"]:
        console.print(growth_origin(result), highlight=False)
        console.print(terminal(GROWTH, result["growth"]))


def method_data(results: Sequence[Row]) -> list[dict[str, Any]]:
    """Return one row for each method of every result, the full cache left out."""
    return [
        {
            "name": row["name"],
            "decode_ms": row["decode_ms"]["median"],
            "first_token_ms": row["first_token_ms"]["median"],
            "compress_ms": row["compress_ms"] and row["compress_ms"]["median"],
            "perplexity": row["perplexity"],
            **{name: row["to_full"][name] for name in ("decode_times_faster", "bytes_share", "perplexity_ratio")},
        }
        for result in results
        for row in result["rows"]
        if row["name"] != FULL
    ]


def growth_data(results: Sequence[Row]) -> list[dict[str, Any]]:
    """Return one row for each context, one column a cache: median milliseconds of a step at the smallest batch."""
    growth: Sequence[Row] = next((result["growth"] for result in results if result["growth"]), [])
    found: dict[int, dict[str, Any]] = {}
    for row in growth:
        if row["batch"] == min(one["batch"] for one in growth):
            found.setdefault(row["context"], {"context": row["context"]})[row["contender"]] = row["step_ms"]
    return list(found.values())


def metrics(results: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Return the numbers of each method that `dvc metrics` compares; of the full cache those of the last result."""
    return {
        row["name"]: {
            **{name: row[name]["median"] for name in ("first_token_ms", "decode_ms")},
            **{name: row[name] for name in ("perplexity", "accuracy")},
            **{name: value for name, value in row["to_full"].items() if name != "nll"},
        }
        for result in results
        for row in result["rows"]
    }
