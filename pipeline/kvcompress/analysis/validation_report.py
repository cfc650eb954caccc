"""Two text reports: `validation_report.txt` (classes) and `analysis_summary.txt` (statistics)."""

from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean, pstdev

from kvcompress.core.head_classes import CLASS_STYLE, HeadClassification, HeadType, ModelInfo
from kvcompress.core.head_statistics import REGIONS, HeadStatistics
from kvcompress.core.retention import STRATEGIES, Retention, join_query_heads

RULE, LINE = "=" * 80, "-" * 40
REFINED = tuple(kind for kind in CLASS_STYLE if kind is not HeadType.POSITIONAL)
INDUCTION = 0.3  # induction score above which a head is counted as an induction head
FIRST_PASS = (HeadType.POSITIONAL, HeadType.GATHERING, HeadType.MIXED, HeadType.DEAD)


def section(title: str) -> list[str]:
    """Return the lines that open a section."""
    return ["", title, LINE]


def class_count(label: str, count: int, total: int) -> str:
    """Return the line of a label with its number and share of heads."""
    return f"  {label:<20}: {count:>4} heads ({100 * count / total:5.1f}%)"


def mean_and_deviation(values: Sequence[float]) -> str:
    """Return mean ± standard deviation."""
    return f"{fmean(values):.3f} ± {pstdev(values):.3f}"


def model_lines(info: ModelInfo) -> list[str]:
    """Describe the model, text and measure of a report, as far as `info` has them."""
    name = info.model_id or "unknown model"
    lines = [f"Model: {name}" + (f", revision {info.revision}" if info.revision else "")]
    groups = f", {info.num_key_value_heads} KV heads" if info.num_key_value_heads else ""
    lines.append(f"Shape: {info.num_layers} layers x {info.num_heads} query heads{groups}")
    if info.documents:
        lines.append(
            f"Text:  {info.documents} documents, {info.queries} queries, at most {info.max_tokens} tokens each"
        )
    measure = f"sink_size {info.sink_size}, local_window {info.local_window}, recent_ratio {info.recent_ratio}"
    return [*lines, f"Means over all queries; entropies in nats; {measure}"]


def validation_report(
    info: ModelInfo,
    statistics: Sequence[HeadStatistics],
    classes: Sequence[HeadClassification],
    first_pass: Sequence[HeadClassification] | None = None,
) -> str:
    """Write the validation report: classes, strategies, compression potential, statistics by type, KV groups.

    With `first_pass` it also counts transitions between the taxonomies. All sequences list the same heads in one order.
    """
    total = len(classes)
    types = REFINED if not any(head.head_type is HeadType.POSITIONAL for head in classes) else FIRST_PASS
    by_type = {kind: [s for s, c in zip(statistics, classes, strict=True) if c.head_type is kind] for kind in types}
    lines = [RULE, "HEAD CLASSIFICATION VALIDATION REPORT", RULE, *model_lines(info)]

    lines += section("CLASSIFICATION SUMMARY")
    lines += [class_count(kind.value, len(heads), total) for kind, heads in by_type.items()]

    lines += section("COMPRESSION STRATEGY SUMMARY")
    strategies = Counter(head.compression_strategy for head in classes)
    # No class recommends select by itself, so it is listed only if a file has it.
    shown = [strategy for strategy in STRATEGIES if strategy != "select" or strategies[strategy]]
    lines += [class_count(strategy, strategies[strategy], total) for strategy in shown]

    compressible = sum(head.compression_strategy != "full" for head in classes)
    sinks = sum(head.keep_sinks for head in classes)
    lines += section("COMPRESSION POTENTIAL")
    lines += [f"  Total heads: {total}"]
    lines += [f"  Compressible (not full cache): {compressible} ({100 * compressible / total:.1f}%)"]
    lines += [f"  Require sink tokens: {sinks} ({100 * sinks / total:.1f}%)"]

    lines += section("DETAILED STATISTICS BY TYPE (mean ± standard deviation over heads)")
    for kind, heads in by_type.items():
        if heads:
            lines += ["", f"  {kind.value.upper()}", f"    Count: {len(heads)}"]
            lines += [f"    Sink ratio: {mean_and_deviation([head.sink_ratio for head in heads])}"]
            lines += [f"    Local ratio: {mean_and_deviation([head.local_ratio for head in heads])}"]
            lines += [f"    Entropy: {mean_and_deviation([head.mean_entropy for head in heads])}"]
            induction = [head.induction_score for head in heads if head.induction_score is not None]
            if induction:
                strong = sum(score > INDUCTION for score in induction)
                lines += [f"    Induction score: {mean_and_deviation(induction)}; {strong} heads above {INDUCTION}"]

    if info.num_key_value_heads and info.num_key_value_heads < info.num_heads:
        lines += kv_groups(info, classes)
    lines += insights(classes)
    if first_pass is not None:
        lines += transitions(first_pass, classes)
    return "\n".join([*lines, "", RULE, ""])


def insights(classes: Sequence[HeadClassification]) -> list[str]:
    """Describe the classes in words, with the windows that the class table gives each of them."""
    total, counts = len(classes), Counter(head.head_type for head in classes)
    sinks = sum(head.keep_sinks for head in classes)
    sink_heads, true_heads = counts[HeadType.SINK_POSITIONAL], counts[HeadType.TRUE_POSITIONAL]
    lines = section("KEY INSIGHTS")
    if true_heads:
        lines.append(f"  Sink-positional heads outnumber true-positional ones by {sink_heads / true_heads:.1f}x")
    lines.append(f"  {100 * sinks / total:.1f}% of heads get sinks in the class table")
    lines.append(f"  {counts[HeadType.GATHERING]} gathering heads look at everything and keep the full cache")
    lines.append("  Classes describe attention; what a shorter cache costs a head has to be measured")
    lines += section("RECOMMENDED COMPRESSION CONFIG (sinks + window of each class)")
    for kind in HeadType:
        kept = [head.retention for head in classes if head.head_type is kind]
        if kept:
            low, high = retention_word(min(kept)), retention_word(max(kept))
            lines.append(f"  {kind.value:<20}: {low if low == high else f'{low} to {high}'}")
    return lines


def kv_groups(info: ModelInfo, classes: Sequence[HeadClassification]) -> list[str]:
    """Describe the KV heads under grouped-query attention: each keeps the union of its query heads' retention."""
    assert info.num_key_value_heads
    size = info.num_heads // info.num_key_value_heads
    groups = [classes[start : start + size] for start in range(0, len(classes), size)]
    joined = join_query_heads([head.retention for head in classes], len(groups))
    mixed = sum(len({head.head_type for head in group}) > 1 for group in groups)
    lines = section(f"KV GROUPS (one KV head serves {size} query heads, joined by union)")
    lines += [
        f"  Total KV heads: {len(groups)}",
        f"  Compressible (every query head agrees): {sum(not kept.unbounded for kept in joined)}",
        f"  Query heads of different classes: {mixed}",
        "  layer  per KV head: sinks + window, 'full' or 'prune'",
    ]
    width = info.num_key_value_heads
    for layer in range(info.num_layers):
        cells = [retention_word(kept) for kept in joined[layer * width : (layer + 1) * width]]
        lines.append(f"  {layer:>5}  " + "  ".join(f"{cell:>8}" for cell in cells))
    return lines


def retention_word(kept: Retention) -> str:
    """Write a retention as `sinks + window`, with chosen keys if any, or as `full` or `prune`."""
    if kept.pruned:
        return "prune"
    more = f" + {kept.chosen}" if kept.chosen else ""
    return "full" if kept.unbounded else f"{kept.sinks} + {kept.window}{more}"


def transitions(first_pass: Sequence[HeadClassification], refined: Sequence[HeadClassification]) -> list[str]:
    """Count the heads that went from each first-pass class to each refined one."""
    counts = Counter((a.head_type.value, b.head_type.value) for a, b in zip(first_pass, refined, strict=True))
    lines = section("FIRST PASS -> REFINED")
    return lines + [f"  {old:<12} -> {new:<16}: {count:>4} heads" for (old, new), count in sorted(counts.items())]


def class_metrics(info: ModelInfo, classes: Sequence[HeadClassification]) -> dict[str, object]:
    """Return the numbers for `dvc metrics`: heads by class, shares in [0, 1], and bounded KV heads."""
    counts = Counter(head.head_type for head in classes)
    kinds = [kind for kind in (*REFINED, HeadType.POSITIONAL) if kind in REFINED or counts[kind]]
    kv_heads = info.num_layers * (info.num_key_value_heads or info.num_heads)
    joined = join_query_heads([head.retention for head in classes], kv_heads)
    return {
        "heads": {kind.value: counts[kind] for kind in kinds},
        "compressible_share": round(fmean(head.compression_strategy != "full" for head in classes), 6),
        "sink_share": round(fmean(head.keep_sinks for head in classes), 6),
        "compressible_kv_heads": sum(not kept.unbounded for kept in joined),
        "kv_heads": len(joined),
    }


def analysis_summary(
    info: ModelInfo, statistics: Sequence[HeadStatistics], classes: Sequence[HeadClassification]
) -> str:
    """Write the summary of the statistics: means over all heads and by layer, extreme heads, counts of classes."""
    lines = [RULE, "ATTENTION ANALYSIS SUMMARY", RULE, *model_lines(info)]
    entropies = [head.mean_entropy for head in statistics]
    lines += section("ALL HEADS (mean ± standard deviation over heads)")
    lines += [f"  Entropy: {mean_and_deviation(entropies)}, from {min(entropies):.3f} to {max(entropies):.3f}"]
    normalized = [head.normalized_entropy for head in statistics if head.normalized_entropy is not None]
    if normalized:
        lines += [f"  Normalized entropy: {mean_and_deviation(normalized)}"]
    lines += [f"  Largest weight: {mean_and_deviation([head.max_attention_mean for head in statistics])}"]
    for region in REGIONS:
        lines += [
            f"  Weight on {region:<6}: {mean_and_deviation([head.position_preference[region] for head in statistics])}"
        ]
    distances = [head.relative_position_dist for head in statistics]
    near, wide = [sum(weights[:8]) for weights in distances], [sum(weights) for weights in distances]
    lines += [
        f"  Weight within 8 and {len(distances[0])} tokens: {mean_and_deviation(near)}, {mean_and_deviation(wide)}"
    ]

    lines += section("BY LAYER (means over heads)")
    lines += ["  layer  entropy  sink   local  classes"]
    for layer in range(info.num_layers):
        heads = [head for head in statistics if head.layer_idx == layer]
        kinds = Counter(head.head_type.value for head in classes if head.layer_idx == layer)
        found = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        entropy, sink, local = (
            fmean(values)
            for values in zip(*((h.mean_entropy, h.sink_ratio, h.local_ratio) for h in heads), strict=True)
        )
        lines.append(f"  {layer:>5}  {entropy:7.3f}  {sink:.3f}  {local:.3f}  {found}")

    lines += section("EXTREME HEADS (layer.head)")
    measures: dict[str, tuple[Callable[[HeadStatistics], float], bool]] = {
        "lowest entropy": (lambda head: head.mean_entropy, False),
        "highest entropy": (lambda head: head.mean_entropy, True),
        "highest sink ratio": (lambda head: head.sink_ratio, True),
        "highest local ratio": (lambda head: head.local_ratio, True),
    }
    for label, (value, largest) in measures.items():
        ranked = sorted(statistics, key=value, reverse=largest)[:5]
        shown = (f"{head.layer_idx}.{head.head_idx} ({value(head):.3f})" for head in ranked)
        lines.append(f"  {label:<20}: " + ", ".join(shown))

    lines += section("CLASSES")
    counts = Counter(head.head_type for head in classes)
    lines += [class_count(kind.value, count, len(classes)) for kind, count in counts.most_common()]
    return "\n".join([*lines, "", RULE, ""])
