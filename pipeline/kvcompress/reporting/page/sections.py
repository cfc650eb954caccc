"""The sections of the report page: what stands where, and the words between the pictures."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kvcompress.core.head_classes import HeadClassification
from kvcompress.core.head_statistics import StatisticsFile
from kvcompress.reporting.comparison_data import rows_of
from kvcompress.reporting.comparison_report import counted, origin
from kvcompress.reporting.page.facts import heat_maps
from kvcompress.reporting.page.head_map import class_map, number_map, row_id, side_by_side
from kvcompress.reporting.page.heads import QUERY_HEADER, Plans, Prices, grid, price_header, price_table, query_rows
from kvcompress.reporting.page.markup import Html, details, table, tag
from kvcompress.reporting.page.pareto import contender_table, pareto
from kvcompress.reporting.page.scale import Scale
from kvcompress.reporting.page.speed import speed
from kvcompress.reporting.page.summary import summary

Results = Sequence[Mapping[str, Any]]


class Inputs(NamedTuple):
    """Everything that the page shows; `benchmark` is None where none was run."""

    statistics: StatisticsFile
    classes: Sequence[HeadClassification]
    prices: Prices
    plans: Plans
    ablation: Results
    comparison: Results
    context: int  # tokens at which slots are counted
    benchmark: Results | None = None


class Section(NamedTuple):
    key: str
    title: str
    content: Sequence[Html | None]


def prose(*text: str | Html) -> Html:
    return tag("p", *text)


def sections(inputs: Inputs) -> list[Section]:
    plans, ablation = rows_of(inputs.comparison), rows_of(inputs.ablation)
    found = [
        Section("summary", "Who wins at equal bytes", summary(plans, ablation)),
        Section("quality", "Quality against bytes", quality(plans, ablation)),
        Section("look", "What heads look like", look(inputs)),
        Section("worth", "What heads are worth", worth(inputs)),
        Section("facts", "Facts found after compression", facts(plans, ablation)),
    ]
    if inputs.benchmark:
        found.append(Section("speed", "Speed and memory", [speed(inputs.benchmark)]))
    return [*found, Section("measured", "How this was measured", measured(inputs))]


def quality(plans: Sequence, ablation: Sequence) -> list[Html | None]:
    charts = (
        pareto(plans, "Plans and uniform caches of the same bytes"),
        pareto(ablation, "Windows, sinks, class table"),
    )
    return [
        prose(
            "Lower and further left is better. Bars are 95% intervals of the difference to the full cache, which is the "
            "dotted line; an arrow marks what lies above the axis. Each chart has texts of its own: compare within one. "
            "In names, “4 + 60” are sinks and window, and “uniform = NAME” is the uniform cache of the bytes of NAME."
        ),
        tag("div", charts, class_="pair"),
        contender_table(plans, "Plans and their rivals"),
        contender_table(ablation, "Windows, sinks and the class table"),
    ]


def look(inputs: Inputs) -> list[Html | None]:
    info, heads = inputs.statistics.model_info, inputs.statistics.head_statistics
    width = info.num_heads

    def layers(values: Sequence) -> list[list]:
        return [list(values[i : i + width]) for i in range(0, len(values), width)]

    entropy = [head.mean_entropy for head in heads]
    longest = float(info.max_tokens or inputs.context)
    windows = [longest if head.recommended_window < 0 else max(head.recommended_window, 1.0) for head in inputs.classes]
    shares = Scale(0.0, 1.0)
    percent = "{:.0%}".format
    maps = [
        class_map(layers([head.head_type for head in inputs.classes]), "Class", ""),
        number_map(
            "q", layers(windows), Scale(min(8.0, *windows), longest, "log"), "Recommended window", "tokens",
            lambda value: "full" if value >= longest else f"{value:.0f}",
        ),
        number_map("q", layers(entropy), Scale(0.0, max(entropy)), "Entropy", "nats", "{:.1f}".format),
        number_map("q", layers([head.sink_ratio for head in heads]), shares, "Sink",
                   f"attention on the first {info.sink_size} keys", percent),
        number_map("q", layers([head.local_ratio for head in heads]), shares, "Local",
                   f"attention on the last {info.local_window} keys", percent),
    ]  # fmt: skip
    induction = [head.induction_score for head in heads]
    scores = [score for score in induction if score is not None]
    if len(scores) == len(induction):
        top = max(scores) or 1.0
        maps.append(number_map("q", layers(scores), Scale(0.0, top, "root"), "Induction",
                               "score (root scale)", "{:.2f}".format))  # fmt: skip
    ids = [row_id("q", head.layer_idx, head.head_idx) for head in heads]
    rows = query_rows(heads, inputs.classes)
    return [
        prose(
            "Every cell is a query head. Point at one, or reach a map with the Tab key and walk with the arrow keys: what "
            "is known of the head appears, and the same head is marked in all maps of this kind."
        ),
        side_by_side(maps, info.num_layers),
        details(
            f"All {len(rows)} query heads as a table",
            table(QUERY_HEADER, rows, "Query heads", ids, captioned=False),
        ),
    ]


def worth(inputs: Inputs) -> list[Html | None]:
    prices, context = inputs.prices, inputs.context
    price, carried = grid(prices, "price"), grid(prices, "facts")
    kept = f"{prices[0]['sinks']} sinks and a window of {prices[0]['window']}"
    maps = [
        number_map("k", price, spread(price), "Price on text", "1/1000 nat a token (root scale)"),
        number_map("k", carried, spread(carried), "Facts carried", "nats an answer token (root scale)"),
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
    rows = price_table(prices, inputs.plans, context)
    ids = [row_id("k", row["layer"], row["kv_head"]) for row in prices]
    return [
        prose(
            f"Every cell is a KV head. Its price is the divergence from the full cache that is expected when it alone keeps "
            f"{kept}; what it carries is its part in the answers to questions about facts far away. Slots are what the "
            f"policy priced gives it at each budget, after {context:,} tokens."
        ),
        side_by_side(maps, len(price)),
        details(
            f"All {len(rows)} KV heads as a table",
            table(price_header(prices, inputs.plans), rows, "KV heads", ids, captioned=False),
        ),
    ]


def spread(values: Sequence[Sequence[float]]) -> Scale:
    top = max(max(row) for row in values)
    return Scale(0.0, top if top > 0 else 1.0, "root")


def facts(plans: Sequence, ablation: Sequence) -> list[Html | None]:
    return [
        prose(
            "A fact stands at some depth of a text, the cache is compressed, and only then the question comes. Cells count "
            "exact answers; bright is found."
        ),
        tag("h3", "Plans"),
        heat_maps(plans),
        details("Windows, sinks and the class table", heat_maps(ablation)),
    ]


def measured(inputs: Inputs) -> list[Html | None]:
    info, rows = inputs.statistics.model_info, []
    named = [("plans", inputs.comparison), ("ablation", inputs.ablation), ("benchmark", inputs.benchmark or [])]
    fields = ("device", "threads", "dtype", "torch", "transformers")
    for name, results in named:
        rows += [[name, *(str(result["environment"].get(key, "–")) for key in fields)] for result in results[:1]]
    documents = counted(info.documents or 0, "document")
    amount = f"{info.queries or 0:,} queries in {documents} of up to {info.max_tokens or 0:,} tokens"
    heads = (
        f"{amount}; revision {info.revision or 'unknown'}; sinks are the first {info.sink_size} keys, the local window "
        f"the last {info.local_window}."
    )
    words = [("Heads", heads), ("Plans", origin(inputs.comparison[0])), ("Ablation", origin(inputs.ablation[0]))]
    return [
        *(prose(tag("strong", f"{title}: "), text) for title, text in words),
        table(["results", *fields], rows, "Machines and versions"),
    ]
