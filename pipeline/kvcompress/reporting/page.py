"""The report page: everything found about one model in a single HTML file that asks no server for anything."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from kvcompress.core.artifacts import read_json, read_text
from kvcompress.core.errors import InputError
from kvcompress.core.head_classes import HeadClassification
from kvcompress.core.head_statistics import StatisticsFile
from kvcompress.core.plan import RetentionPlan
from kvcompress.reporting import benchmark as speed
from kvcompress.reporting.comparison import (
    AGAINST,
    CONTINUATION,
    STREAMING,
    Result,
    Rows,
    against,
    all_rows,
    by_method,
    by_size,
    conclusion,
    facts_cells,
    leading_cells,
    origin,
    outcome,
    rows_of,
    title,
)
from kvcompress.reporting.figures import comparison_figures, growth_figure, svg
from kvcompress.reporting.head_map import (
    Grid,
    Plans,
    Prices,
    Scale,
    class_map,
    number_map,
    price_table,
    query_table,
    root_scale,
    side_by_side,
)
from kvcompress.reporting.html import Html, details, joined, scroll, table, tag
from kvcompress.reporting.method_style import OWN, PUBLISHED, key_of
from kvcompress.reporting.tables import Columns, Row, cells, counted

HERE = Path(__file__).parent
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
PLANS_SHOWN = "priced"  # policy of the plans whose slots are drawn
PRICE_FIELDS = {"layer", "kv_head", "price", "facts", "sinks", "window"}
RESULT_FIELDS = {"model", "environment", "settings", "rows"}
BADGES = {"wins": "▲ wins", "loses": "▼ loses", "even": "= even", "not comparable": "? not comparable"}
HEADINGS = {CONTINUATION: "after an exact prefill", STREAMING: "while a document streams in"}
Content = Sequence[Html | None]


class Inputs(NamedTuple):
    """Everything that the page shows. `context`: tokens after which slots are counted; `benchmark` may be empty."""

    statistics: StatisticsFile
    classes: Sequence[HeadClassification]
    prices: Prices
    plans: Plans
    ablation: Sequence[Result]
    comparison: Sequence[Result]
    context: int
    benchmark: Sequence[Result] = ()


def load_prices(path: str | Path) -> list[dict[str, Any]]:
    """Read the prices that `allocate --prices` wrote. Raises `InputError` for anything else."""
    rows = read_json(path)
    if (
        not isinstance(rows, list)
        or not rows
        or any(not isinstance(row, dict) or set(row) != PRICE_FIELDS for row in rows)
    ):
        raise InputError(
            f"{path} does not hold the prices of KV heads: every row needs {', '.join(sorted(PRICE_FIELDS))}"
        )
    return rows


def load_plans(folder: str | Path, context: int) -> dict[str, RetentionPlan]:
    """Read the plans of PLANS_SHOWN in a folder, smallest at `context` tokens first. Raises `InputError` without one."""
    found: dict[str, RetentionPlan] = {}
    for path in Path(folder).glob(f"{PLANS_SHOWN}-*.json"):
        plan, label = RetentionPlan.load(path), path.stem.removeprefix(f"{PLANS_SHOWN}-")
        found[f"{label}%" if "share" in plan.budget and label.replace(".", "").isdigit() else label] = plan
    if not found:
        raise InputError(f"{folder} holds no plan of the policy {PLANS_SHOWN!r}")
    return dict(sorted(found.items(), key=lambda item: (item[1].held(context), item[0])))


def load_results(path: str | Path) -> list[dict[str, Any]]:
    """Read the results of a report. Raises `InputError` for anything else."""
    results = read_json(path)
    complete = isinstance(results, list) and all(isinstance(one, dict) and set(one) >= RESULT_FIELDS for one in results)
    if not complete or not results:
        raise InputError(f"{path} holds no results: expected a list of entries with {', '.join(sorted(RESULT_FIELDS))}")
    return results


def require_same_heads(prices: Prices, plans: Plans, layers: int, query_heads: int) -> None:
    """Raise `InputError` unless prices and plans are of one model with these heads, each KV head once and in order."""
    width = 1 + max((row["kv_head"] for row in prices), default=-1)
    if [(row["layer"], row["kv_head"]) for row in prices] != [(i, j) for i in range(layers) for j in range(width)]:
        raise InputError(f"the prices of KV heads are not those of {layers} layers, each head once and in order")
    for size, plan in plans.items():
        plan.require_shape(layers, width, query_heads, f"the plan for {size}")


def paragraph(*text: Html | str) -> Html:
    return tag("p", *text)


def drawn(name: str, figure: Figure) -> Html:
    """Put a figure into the page; `name` is unique within it."""
    label = figure.get_suptitle().split("\n")[0]
    return tag(
        "figure", scroll(Html(svg(figure, name).replace("<svg", f'<svg class="chart" data-name="{name}"', 1)), label)
    )


def badge(row: Row) -> Html:
    found = str(outcome(row))
    return tag("span", BADGES[found], class_=f"badge {found.split()[0]}")


def sentences(rows: Iterable[Row]) -> Html:
    items = [tag("li", badge(row), tag("span", conclusion(row), class_="conclusion")) for row in rows]
    return tag("ul", items, class_="conclusions")


def plan_table(plans: Rows, label: str) -> Html:
    """Build the table of the project's plans and of published methods, with their uniform rivals."""
    by_name, full = {row["name"]: row for row in plans}, plans[0]
    lines = [[title(full), f"{full['share']:.1%}", "", f"{full['perplexity']:.2f}", "", *facts_cells(full), ""]]
    for row in by_method(row for row in plans if key_of(row["family"]) in {*OWN, *PUBLISHED} and "rival" in row):
        rival = by_name[row["rival"]["name"]]
        line = [title(row), f"{row['share']:.1%}", badge(row), f"{row['perplexity']:.2f}", f"{rival['perplexity']:.2f}"]
        lines.append([*line, *facts_cells(row), " · ".join(facts_cells(rival))])
    header = ["plan", "bytes", "against uniform", "perplexity", "uniform's", *full["retrieval"], "uniform's facts"]
    return table(header, lines, label)


def summary(inputs: Inputs) -> Content:
    """Build the tables of plans, one a protocol, and the conclusions as sentences."""
    protocols = all_rows(inputs.comparison)
    tables: list[Html] = []
    for protocol, rows in protocols.items():
        heading = HEADINGS[protocol]
        tables += [tag("h3", heading.capitalize()), plan_table(rows, heading)]
        if lines := against(rows):
            tables += [
                details("Against published methods of the same bytes", table(AGAINST, lines, "Published methods"))
            ]
    compared = [row for rows in (*protocols.values(), rows_of(inputs.ablation)) for row in rows if "rival" in row]
    first = [row for row in compared if row["name"] == "class table"]
    rest = [row for row in compared if row not in first]
    return [
        paragraph(
            "Each plan and each published method is compared with the uniform cache of its bytes, which has the same sinks "
            "and window in all heads. It wins or loses if the 95% interval of the difference in loss excludes zero. Facts "
            "are exact answers to questions about something said earlier in a text."
        ),
        *tables,
        sentences(first) if first else None,
        details(f"{len(rest)} comparisons at equal bytes, with intervals", sentences(rest)) if rest else None,
    ]


def contender_table(rows: Rows, label: str) -> Html:
    header = ["contender", "bytes", "perplexity", "ΔNLL to the full cache", *rows[0]["retrieval"]]
    return details(
        f"{label}, as a table",
        table(header, [[*leading_cells(row), *facts_cells(row)] for row in by_size(rows)], label),
    )


def heads_seen(inputs: Inputs) -> Content:
    """Build the maps of classes and statistics of all query heads."""
    info, heads = inputs.statistics.model_info, inputs.statistics.head_statistics

    def layers(values: Sequence[Any]) -> list[list[Any]]:
        return [list(values[i : i + info.num_heads]) for i in range(0, len(values), info.num_heads)]

    entropy = layers([head.mean_entropy for head in heads])
    longest = float(info.max_tokens or inputs.context)
    windows = [longest if head.recommended_window < 0 else max(head.recommended_window, 1.0) for head in inputs.classes]
    shares, percent = Scale(0.0, 1.0), "{:.0%}".format
    first, last = f"attention on the first {info.sink_size} keys", f"attention on the last {info.local_window} keys"
    maps = [
        class_map(layers([head.head_type for head in inputs.classes]), "Class"),
        number_map("q", layers(windows), Scale(min(8.0, *windows), longest, "log"), "Recommended window", "tokens",
                   lambda value: "full" if value >= longest else f"{value:.0f}"),
        number_map("q", entropy, Scale(0.0, max(map(max, entropy))), "Entropy", "nats", "{:.1f}".format),
        number_map("q", layers([head.sink_ratio for head in heads]), shares, "Sink", first, percent),
        number_map("q", layers([head.local_ratio for head in heads]), shares, "Local", last, percent),
    ]  # fmt: skip
    induction = [head.induction_score for head in heads]
    if None not in induction:
        grid = layers(induction)
        maps.append(number_map("q", grid, root_scale(grid), "Induction", "score (root scale)"))
    return [
        paragraph(
            "Every cell is a query head. Point at a cell, or reach a map with the Tab key and move with the arrow keys: the "
            "facts about the head appear, and the head is marked in all maps."
        ),
        side_by_side(maps, info.num_layers),
        query_table(heads, inputs.classes),
    ]


def heads_priced(inputs: Inputs) -> Content:
    """Build the maps of prices of all KV heads, and of the slots that plans give them."""
    prices, context = inputs.prices, inputs.context

    def grid(value: str) -> Grid:
        width = inputs.prices[-1]["kv_head"] + 1
        return [[float(row[value]) for row in prices[i : i + width]] for i in range(0, len(prices), width)]

    price, carried = grid("price"), grid("facts")
    maps = [
        number_map("k", price, root_scale(price), "Price on text", "1/1000 nat a token (root scale)"),
        number_map("k", carried, root_scale(carried), "Facts carried", "nats an answer token (root scale)"),
    ]
    held = {
        size: [[float(kept.held(context)) for kept in row] for row in plan.layers]
        for size, plan in inputs.plans.items()
    }
    least = min((value for rows in held.values() for row in rows for value in row), default=1.0)
    scale = Scale(max(least, 1.0), float(context), "log")
    maps += [
        number_map("k", rows, scale, f"Slots, {size}", f"of {context:,} tokens (log scale)", "{:,.0f}".format)
        for size, rows in held.items()
    ]
    return [
        paragraph(
            "Every cell is a KV head. Its price is the expected divergence from the full cache if this head alone keeps "
            f"{prices[0]['sinks']} sinks and a window of {prices[0]['window']}. Facts carried: its part in the answers to "
            f"questions about distant facts. Slots: what the policy {PLANS_SHOWN} gives it at each budget, "
            f"after {context:,} tokens."
        ),
        side_by_side(maps, len(price)),
        price_table(prices, inputs.plans, context),
    ]


def speed_tables(results: Sequence[Result]) -> Content:
    """Build tables and figures of a benchmark. Raises `InputError` if a number is missing."""

    def shown(columns: Columns, rows: Rows, label: str) -> Html:
        return table(columns, cells(columns, rows), label)

    found: list[Html | None] = []
    if len(results) > 1:
        found.append(
            paragraph("Each table is a run of its own. Times vary between runs: compare methods within one table.")
        )
    try:
        for i, result in enumerate(results):
            names = ["full cache", *(row["name"] for row in result["rows"][1:])]
            found += [tag("h3", ", ".join(names)), paragraph(speed.origin(result))]
            found += [
                shown(speed.SPEED, result["rows"], "Speed"),
                shown(speed.QUALITY, result["rows"], "Bytes and quality"),
            ]
            if result["growth"]:
                found += [drawn(f"growth{i}", growth_figure(result)), paragraph(speed.growth_origin(result))]
                found.append(details("Decode steps as a table", shown(speed.GROWTH, result["growth"], "Decode steps")))
    except (KeyError, TypeError) as error:
        raise InputError(f"the benchmark's results have no {error}") from error
    return found


def measured(inputs: Inputs) -> Content:
    """Describe models, machines and protocols."""
    info, rows = inputs.statistics.model_info, []
    fields = ("device", "threads", "dtype", "torch", "transformers")
    for name, results in (("plans", inputs.comparison), ("ablation", inputs.ablation), ("benchmark", inputs.benchmark)):
        rows += [[name, *(str(result["environment"].get(key, "–")) for key in fields)] for result in results[:1]]
    heads = (
        f"{info.queries or 0:,} queries in {counted(info.documents or 0, 'document')} of "
        f"up to {info.max_tokens or 0:,} tokens; revision {info.revision or 'unknown'}; sinks are the first {info.sink_size} "
        f"keys, the local window is the last {info.local_window}."
    )
    texts = {"Heads": heads}
    texts |= {f"Plans {HEADINGS[key]}": origin(inputs.comparison[0], key) for key in all_rows(inputs.comparison)}
    texts |= {"Ablation": origin(inputs.ablation[0])}
    return [
        *(paragraph(tag("strong", f"{name}: "), text) for name, text in texts.items()),
        table(["results", *fields], rows, "Machines and versions"),
    ]


def sections(inputs: Inputs) -> Mapping[str, tuple[str, Content]]:
    """Return the sections of the page: id -> heading and content."""
    ablation = rows_of(inputs.ablation)
    of_plans = {key: drawn(f"plans-{key}", one) for key, one in comparison_figures(inputs.comparison, "Plans").items()}
    of_ablation = comparison_figures(inputs.ablation, "Windows, sinks and the class table")
    more = {key: drawn(f"ablation-{key}", one) for key, one in of_ablation.items()}
    quality = [
        paragraph(
            "Lower and further left is better. Plans and ablation were measured on different texts: compare within one "
            "figure. 4 + 60 means 4 sinks and a window of 60 in every head."
        ),
        tag("div", [one for key, one in of_plans.items() if "pareto" in key], more["pareto"], class_="pair"),
        *(contender_table(rows, f"Plans {HEADINGS[key]}") for key, rows in all_rows(inputs.comparison).items()),
        contender_table(ablation, "Windows, sinks and the class table"),
        more.get("beyond_context"),
    ]
    facts = [
        paragraph(
            "A fact is hidden at some depth of a text, the cache is compressed, and only then the question is "
            "asked. passkey: "
            "a five-digit key, stated twice. needle: a sentence foreign to the text around it. lookup: one of several keys, "
            "asked for by name."
        ),
        of_plans["retrieval"],
        details("Windows, sinks and the class table", more["retrieval"]),
    ]
    found: dict[str, tuple[str, Content]] = {
        "summary": ("Plans at equal bytes", summary(inputs)),
        "quality": ("Quality against bytes", quality),
        "look": ("Attention of every head", heads_seen(inputs)),
        "worth": ("Price of every head", heads_priced(inputs)),
        "facts": ("Facts found after compression", facts),
    }
    if inputs.benchmark:
        found["speed"] = ("Speed and memory", speed_tables(inputs.benchmark))
    return found | {"measured": ("How this was measured", measured(inputs))}


def document(inputs: Inputs) -> str:
    """Return the page; equal inputs give equal bytes. Its policy forbids the browser every request."""
    info, found = inputs.statistics.model_info, sections(inputs)
    model = info.model_id or "unknown model"
    shape = (
        f"{info.num_layers} layers, {info.num_heads} query heads and {1 + inputs.prices[-1]['kv_head']} KV heads each"
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("title", f"kvcompress: {model}"),
        tag("style", Html(read_text(HERE / "page.css"))),
    )
    links = tag("nav", (tag("a", text, href=f"#{key}") for key, (text, _) in found.items()), aria_label="Sections")
    top = tag("header", tag("h1", f"kvcompress: {model}"), paragraph(f"KV-cache compression by head: {shape}."), links)
    blocks = [
        tag("section", tag("h2", text, id=f"{key}-title"), content, id=key, aria_labelledby=f"{key}-title")
        for key, (text, content) in found.items()
    ]
    extras = [tag("div", id="tip", hidden=True), tag("div", id="said", aria_live="polite", class_="unseen")]
    body = tag("body", top, tag("main", blocks), extras, tag("script", Html(read_text(HERE / "page.js"))))
    return "<!DOCTYPE html>\n" + joined([Html('<html lang="en">\n'), head, "\n", body, Html("\n</html>\n")])
