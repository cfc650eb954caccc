"""Comparisons of methods at equal bytes (stages `ablate` and `compare_plans`): Markdown report, plot data, metrics.

A result is `{"model", "texts", "environment", "settings", "rows"}`, one row a contender, read as a stream; rows of the
protocol "continuation" (an exact prefill, compressed once, then the rest of the document) are in a field of that
name. ΔNLL is
a difference in loss, in nats a token. `rival` in a row names the cache of the same bytes that the row is compared with.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from math import exp
from statistics import fmean
from typing import Any, Literal

from kvcompress.evaluation.intervals import CONFIDENCE
from kvcompress.evaluation.params import CONTINUATION, STREAMING
from kvcompress.reporting.method_style import FULL, OWN, PUBLISHED, UNIFORM, in_order, key_of, look
from kvcompress.reporting.tables import Row, cells, change, counted, listed, markdown, number

PROTOCOLS = {CONTINUATION: "continuation", STREAMING: "rows"}  # protocol -> field of a result
Outcome = Literal["wins", "loses", "even", "not comparable"]
Result = Mapping[str, Any]
Rows = Sequence[Row]
CORE = (*(name for name in OWN if OWN[name].line), UNIFORM)
HEADROOM = 1.2  # height of a figure over that of its core, as a power
EQUAL_BYTES = 0.01  # relative difference up to which bytes count as equal


def rows_of(results: Iterable[Result], protocol: str = STREAMING) -> list[Row]:
    """Return the contenders of several results in one protocol, each once."""
    return list({row["name"]: row for result in results for row in result.get(PROTOCOLS[protocol], [])}.values())


def all_rows(results: Sequence[Result]) -> dict[str, list[Row]]:
    """Return the rows of every protocol that the results have; the continuation, which has all contenders, comes first."""
    found = {protocol: rows_of(results, protocol) for protocol in PROTOCOLS}
    return {protocol: rows for protocol, rows in found.items() if rows}


def by_size(rows: Iterable[Row]) -> list[Row]:
    """Sort from fewest to most bytes, the better first among equals."""
    return sorted(rows, key=lambda row: (row["share"], row["perplexity"]))


def by_method(rows: Iterable[Row]) -> list[Row]:
    """Sort as legends have the methods, and from most to fewest bytes within one."""
    found = list(rows)
    places = {family: place for place, family in enumerate(in_order(row["family"] for row in found))}
    return sorted(found, key=lambda row: (places[row["family"]], -row["share"]))


def title(row: Row) -> str:
    """Name a contender for readers: published methods by their paper, plans by their file."""
    name, family = str(row["name"]), str(row["family"])
    if name.startswith("uniform = "):
        size = name.removeprefix("uniform = ")
        return f"uniform, {size if size.endswith('%') else f'bytes of {size}'}"
    known = look(family).label
    if name.startswith(family) and key_of(family) in PUBLISHED:
        rest = name.removeprefix(family).strip()
        return f"{known}, {rest}" if rest else known
    return name


def outcome(row: Row) -> Outcome | None:
    """Compare a row with its rival by the interval of ΔNLL; None if it has no rival."""
    rival = row.get("rival")
    if not rival:
        return None
    if abs(rival["bytes"] - 1) > EQUAL_BYTES:
        return "not comparable"
    difference = rival["nll_over_rival"]
    return "loses" if difference["low"] > 0 else "wins" if difference["high"] < 0 else "even"


def conclusion(row: Row) -> str | None:
    """State in one sentence how a row does against its rival, with ratio and interval; None if it has no rival."""
    found = outcome(row)
    if found is None:
        return None
    rival, mine = row["rival"], title(row)
    other = "the uniform cache of its bytes" if rival["name"].startswith("uniform = ") else rival["name"]
    if found == "not comparable":
        return f"{mine} and {other} are not comparable: the ratio of their bytes is {rival['bytes']:.3f}."
    difference = rival["nll_over_rival"]
    numbers = (
        f"perplexity {row['perplexity']:.2f} against {rival['perplexity']:.2f} at {row['share']:.1%} of the full cache's "
        f"bytes (ratio {row['perplexity'] / rival['perplexity']:.3f}; ΔNLL {difference['mean']:+.4f}, {CONFIDENCE:.0%} "
        f"interval {difference['low']:+.4f} to {difference['high']:+.4f})"
    )
    if found == "even":
        return f"{mine} and {other} cannot be told apart: {numbers}."
    return f"{mine} {'wins against' if found == 'wins' else 'loses to'} {other}: {numbers}."


def origin(result: Result, protocol: str = STREAMING) -> str:
    """Describe model, machine, texts and protocol of a result."""
    where, settings = result["environment"], result["settings"]
    facts = "in full and compressed before the question" if settings["retrieval_prefill"] == "exact" else "as a stream"
    if protocol == CONTINUATION:
        read = (
            f"The first {settings['context']:,} tokens of a document are read in one exact prefill and compressed once; the "
            "rest is scored"
        )
    else:
        read = (
            f"Documents stream through the compressed cache in chunks of {settings['chunk_size']:,} tokens (methods that "
            f"rank keys themselves: {settings.get('rank_every', settings['chunk_size']):,} tokens)"
        )
    return (
        f"{result['model']} on {where['device']}, {where['dtype']}, torch {where['torch']}, transformers "
        f"{where['transformers']}. Text: {counted(settings['documents_per_text'], 'document')} of "
        f"{settings['max_tokens']:,} tokens from each of {listed(result['texts'])}, none of it used to make plans. {read}. "
        f"Facts: contexts of {listed(settings['retrieval_lengths'])} tokens, read {facts}; exact answers count, with Wilson "
        f"intervals. ΔNLL: difference in loss, nats a token, by paired bootstrap over blocks of text. Intervals are of "
        f"{CONFIDENCE:.0%}. A name like 4 + 60 means 4 sinks and a window of 60 tokens in every head."
    )


def about(result: Result, protocol: str) -> str:
    """Name model, machine and number of tokens for the title of a figure."""
    where, settings, (row, *_) = result["environment"], result["settings"], result[PROTOCOLS[protocol]]
    documents = counted(settings["documents_per_text"] * len(result["texts"]), "document")
    read = f"after an exact prefill of {settings['context']:,}" if protocol == CONTINUATION else "read as a stream"
    return (
        f"{result['model']} on {where['device']}, {where['dtype']}; n = {row['tokens']:,} tokens in {documents} of "
        f"{settings['max_tokens']:,}, {read}"
    )


def leading_cells(row: Row) -> list[str]:
    """Return name, bytes, perplexity and ΔNLL to the full cache, with which tables begin."""
    return [title(row), f"{row['share']:.1%}", f"{row['perplexity']:.2f}", change(row["nll_over_full"])]


def facts_cells(row: Row) -> list[str]:
    """Return facts found of facts asked for, one cell a task."""
    return [f"{found['correct']}/{found['total']}" for found in row["retrieval"].values()]


def table(rows: Rows) -> str:
    """Return the table of all contenders."""
    first = rows[0]
    columns: dict[str, Any] = {"contender": title, "bytes": lambda row: f"{row['share']:.1%}"}
    columns |= {"mean MB": lambda row: number(row["nbytes_mean"], 2, 1e6)}
    columns |= {"peak MB": lambda row: number(row["nbytes_peak"], 2, 1e6)}
    columns["perplexity"] = lambda row: number(row["perplexity"], 2)
    for text in first["texts"]:
        columns[text] = lambda row, text=text: number(row["texts"][text]["perplexity"], 2)
    columns |= {"accuracy": lambda row: f"{row['accuracy']:.1%}", "KL": lambda row: f"{row['kl']:.4f}"}
    columns[f"ΔNLL to full ({CONFIDENCE:.0%})"] = lambda row: change(row["nll_over_full"], 4)
    for task in first["retrieval"]:
        columns[task] = lambda row, task=task: share_cell(row["retrieval"][task])
    columns["s"] = lambda row: number(row["seconds"], 0)
    return markdown(columns, cells(columns, rows))


def share_cell(found: Mapping[str, Any]) -> str:
    return f"{found['correct']}/{found['total']} ({found['low']:.2f} … {found['high']:.2f})"


def plan_table(rows: Rows) -> str:
    """Compare plans with the uniform caches of their bytes: ratios of perplexities, and facts found by both."""
    by_name, full = {row["name"]: row for row in rows}, rows[0]

    def facts(row: Row, task: str) -> str:
        mine, other, whole = (one["retrieval"][task] for one in (row, by_name[row["rival"]["name"]], full))
        return f"{mine['correct']} (uniform {other['correct']}, full {whole['correct']}) of {mine['total']}"

    columns: dict[str, Any] = {
        "plan": title,
        "bytes": lambda row: f"{row['share']:.2%}",
        "geometric mean ÷ uniform's": lambda row: number(row["rival"]["gmean_ratio"], 3),
    }
    for text in full["texts"]:
        columns[f"{text} ÷"] = lambda row, text=text: number(row["rival"]["text_ratios"][text], 3)
    columns["÷ full cache's"] = lambda row: number(row["perplexity_gmean"] / full["perplexity_gmean"], 3)
    columns |= {task: partial(facts, task=task) for task in full["retrieval"]}
    return markdown(columns, cells(columns, [row for row in rows if "rival" in row]))


def beyond_table(beyond: Mapping[str, Any]) -> str:
    """Compare the mean loss inside the trained context with that of the last quarter of a longer text."""
    context, last = beyond["context"], max(row["tokens"] for row in beyond["rows"])
    lines = []
    for name in dict.fromkeys(row["name"] for row in beyond["rows"]):
        mine = [row for row in beyond["rows"] if row["name"] == name]
        inside = fmean(row["nll"] for row in mine if row["tokens"] <= context)
        late = fmean(row["nll"] for row in mine if row["tokens"] > 0.75 * last)
        lines.append([name, number(inside, 3), number(late, 3), number(mine[-1]["nbytes"], 1, 1e6)])
    return (
        f"Loss past the trained context of {context:,} tokens, nats a token ({last:,} tokens of {beyond['text']}):\n\n"
        + markdown(["contender", "inside the context", "last quarter", "MB at the end"], lines)
    )


def against(rows: Rows) -> list[list[str]]:
    """Compare policies of this project with published methods of the same bytes, by the interval of ΔNLL."""
    by_name, lines = {row["name"]: row for row in rows}, []
    for row in by_method(row for row in rows if key_of(row["family"]) in OWN):
        for name, difference in row.get("nll_over", {}).items():
            other = by_name[name]
            if key_of(other["family"]) in PUBLISHED:
                result = "loses" if difference["low"] > 0 else "wins" if difference["high"] < 0 else "even"
                perplexities = [number(one["perplexity"], 2) for one in (row, other)]
                facts = [" · ".join(facts_cells(one)) for one in (row, other)]
                lines.append([title(row), title(other), result, *perplexities, change(difference, 4), *facts])
    return lines


AGAINST = ("policy", "published method", "outcome", "perplexity", "its perplexity", "ΔNLL", "facts", "its facts")


def report(results: Sequence[Result], heading: str = "Ablation") -> str:
    """Return all results as one Markdown page."""
    blocks = [f"# {heading}"]
    for result in results:
        for protocol, rows in all_rows([result]).items():
            parts = dict.fromkeys(row.get("ablation", "all") for row in rows)
            name = ", ".join(part for part in parts if part != "all") or "all"
            after = " after an exact prefill" if protocol == CONTINUATION else ""
            blocks += [f"## {name}{after}", origin(result, protocol), table(rows)]
            if rows[-1].get("ablation") == "plans":
                blocks.append(plan_table(rows))
            if lines := against(rows):
                blocks += ["Published methods of the same bytes:", markdown(AGAINST, lines)]
            if sentences := [f"- {sentence}" for row in rows if (sentence := conclusion(row))]:
                blocks += ["At equal bytes:", "\n".join(sentences)]
        if "beyond" in result:
            blocks.append(beyond_table(result["beyond"]))
    return "\n\n".join(blocks) + "\n"


def ceiling(points: Rows) -> float:
    """Return the perplexity above which figures clip points, so that one failed method does not flatten the others.

    It lies a little above the lines of this project's policies and of uniform caches.
    """
    lowest = min(row["low"] for row in points)
    lines = [max(row["perplexity"], row["high"]) for row in points if row["family"] in CORE]
    highest = max(lines, default=lowest)
    return round(lowest * (highest / lowest) ** HEADROOM if highest > lowest else max(row["high"] for row in points), 4)


def pareto_data(rows: Rows) -> list[dict[str, Any]]:
    """Return bytes and perplexity of every contender, with the interval of ΔNLL to the full cache and with its look.

    `dvc plots` sorts methods by `key` and connects the points of one `series`.
    """
    full = next(row for row in rows if row["family"] == FULL)["perplexity"]
    families = in_order(row["family"] for row in rows)
    found = []
    for row in sorted(rows, key=lambda row: (families.index(row["family"]), row["share"])):
        style, difference = look(row["family"]), row["nll_over_full"]
        point = {"method": style.label, "name": title(row), "family": row["family"], "perplexity": row["perplexity"]}
        point |= {"share": row["share"]}
        point |= {end: round(full * exp(difference[end]), 4) for end in ("low", "high")}
        point |= {"key": f"{families.index(row['family']):02d} {style.label}", "colour": style.colour}
        found.append(point | {"series": style.label if style.line else row["name"]})
    top = ceiling(found)
    return [point | {"ceiling": top} for point in found]


def contenders_of(results: Sequence[Result]) -> list[Row]:
    """Return every contender once, whatever its protocol: facts found are the same in both."""
    return by_method({row["name"]: row for rows in all_rows(results).values() for row in rows}.values())


def retrieval_data(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return facts found and asked for, one row for each contender, task, length and depth."""
    return [
        {"name": title(row), "task": task, **{key: cell[key] for key in ("length", "depth", "correct", "total")}}
        for row in contenders_of(results)
        for task, found in row["retrieval"].items()
        for cell in found["grid"]
    ]


def metrics(results: Sequence[Result]) -> dict[str, Any]:
    """Return the numbers of each contender that `dvc metrics` compares; those of the continuation are nested."""
    found = {
        protocol: {
            row["name"]: {
                **{key: row[key] for key in ("share", "perplexity", "accuracy", "kl")},
                **{task: facts["share"] for task, facts in row["retrieval"].items()},
            }
            for row in rows
        }
        for protocol, rows in all_rows(results).items()
    }
    return found.pop(STREAMING, {}) | found
