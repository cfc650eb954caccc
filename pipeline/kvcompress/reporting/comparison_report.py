"""The ablation in Markdown: what was run, the table, and in words who wins at equal bytes, how far and how surely."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, Literal

from kvcompress.evaluation.intervals import CONFIDENCE

Outcome = Literal["wins", "loses", "even", "not comparable"]
EQUAL = 0.01  # bytes may differ by this share and still count as equal


def outcome(row: Mapping[str, Any]) -> Outcome | None:
    """How a row does against its rival at the same bytes; None without a rival."""
    rival = row.get("rival")
    if not rival:
        return None
    if abs(rival["bytes"] - 1) > EQUAL:
        return "not comparable"
    change = rival["nll_over_rival"]
    return "loses" if change["low"] > 0 else "wins" if change["high"] < 0 else "even"


def verdict(row: Mapping[str, Any]) -> str | None:
    """One sentence: who wins at the same bytes, by how much, how surely; None without a rival."""
    found = outcome(row)
    if found is None:
        return None
    rival = row["rival"]
    other = "the uniform cache of its bytes" if rival["name"].startswith("uniform = ") else rival["name"]
    if found == "not comparable":
        return f"{row['name']} and {other} are not comparable: bytes {rival['bytes']:.3f} to 1."
    change = rival["nll_over_rival"]
    ratio = row["perplexity"] / rival["perplexity"]
    numbers = (
        f"perplexity {row['perplexity']:.2f} against {rival['perplexity']:.2f} at {row['share']:.1%} of the full cache's "
        f"bytes (ratio {ratio:.3f}; ΔNLL {change['mean']:+.4f}, {CONFIDENCE:.0%} interval {change['low']:+.4f} to "
        f"{change['high']:+.4f})"
    )
    if found == "even":
        return f"{row['name']} and {other} cannot be told apart: {numbers}."
    return f"{row['name']} {'wins against' if found == 'wins' else 'loses to'} {other}: {numbers}."


def counted(count: int, thing: str) -> str:
    """`1 document`, `2 documents`."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def origin(result: Mapping[str, Any]) -> str:
    """Model, machine, text and protocol of one result, in sentences."""
    where, settings = result["environment"], result["settings"]
    unseen = ", so that compression never sees the question" if settings["retrieval_prefill"] == "exact" else ""
    return (
        f"{result['model']} on {where['device']}, {where['dtype']}, torch {where['torch']}, transformers "
        f"{where['transformers']}. Evaluation text only: {counted(settings['documents_per_text'], 'document')} of "
        f"{settings['max_tokens']} tokens from each of {', '.join(result['texts'])}; streaming prefill in chunks of "
        f"{settings['chunk_size']} tokens through the real cache, bytes counted in it (the L2 methods: "
        f"{settings.get('rank_every', settings['chunk_size'])} tokens a pass, which see one another in full). "
        "Retrieval: "
        f"{settings['retrieval_prefill']} prefill{unseen}, contexts of "
        f"{', '.join(map(str, settings['retrieval_lengths']))} tokens, exact match, Wilson intervals. ΔNLL: nats a "
        f"token, paired bootstrap over blocks of text, {CONFIDENCE:.0%} intervals."
    )


def report(results: Sequence[Mapping[str, Any]]) -> str:
    """All results as one page; each is `{"model", "texts", "environment", "settings", "rows"}`."""
    lines = ["# Ablation", ""]
    for result in results:
        rows = result["rows"]
        lines += [f"## {', '.join(dict.fromkeys(row['ablation'] for row in rows if row['ablation'] != 'all'))}", ""]
        lines += [origin(result), "", *table(rows)]
        if rows[-1]["ablation"] == "plans":
            lines += ["", *plan_table(rows)]
        sentences = [sentence for row in rows if (sentence := verdict(row))]
        if sentences:
            lines += ["", "At equal bytes:", "", *(f"- {sentence}" for sentence in sentences)]
        if "beyond" in result:
            lines += ["", *beyond_lines(result["beyond"])]
        lines.append("")
    return "\n".join(lines)


def plan_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Plans against uniform sink + window at the same bytes: ratios of perplexities, and facts found (the rival's)."""
    by_name = {row["name"]: row for row in rows}
    tasks, texts = list(rows[0]["retrieval"]), list(rows[0]["texts"])
    header = ["plan", "bytes", "geometric mean ÷ uniform's", *(f"{text} ÷" for text in texts), "÷ full cache's"]
    lines = ["| " + " | ".join([*header, *tasks]) + " |", "| --- " * (len(header) + len(tasks)) + "|"]
    full = rows[0]
    for row in rows:
        if "rival" not in row:
            continue
        rival = by_name[row["rival"]["name"]]
        cells = [row["name"], f"{row['share']:.2%}", f"{row['rival']['gmean_ratio']:.3f}"]
        cells += [f"{ratio:.3f}" for ratio in row["rival"]["text_ratios"].values()]
        cells.append(f"{row['perplexity_gmean'] / full['perplexity_gmean']:.3f}")
        for task in tasks:
            mine, other, whole = (one["retrieval"][task] for one in (row, rival, full))
            cells.append(f"{mine['correct']} (uniform {other['correct']}, full {whole['correct']}) of {mine['total']}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def beyond_lines(beyond: Mapping[str, Any]) -> list[str]:
    """Mean NLL inside the trained context, and in the last quarter of the text beyond it."""
    rows, context = beyond["rows"], beyond["context"]
    last = max(row["tokens"] for row in rows)
    lines = [
        f"Past the trained context of {context} tokens ({beyond['text']}, {last} tokens streamed), NLL in nats:",
        "",
    ]
    lines += ["| contender | inside the context | last quarter | MB at the end |", "| --- | --- | --- | --- |"]
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = [row for row in rows if row["name"] == name]
        inside = fmean(row["nll"] for row in mine if row["tokens"] <= context)
        late = fmean(row["nll"] for row in mine if row["tokens"] > 0.75 * last)
        lines.append(f"| {name} | {inside:.3f} | {late:.3f} | {mine[-1]['nbytes'] / 1e6:.1f} |")
    return lines


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A Markdown table, one line a contender."""
    tasks, texts = list(rows[0]["retrieval"]), list(rows[0]["texts"])
    header = ["contender", "bytes", "mean MB", "peak MB", "perplexity", *texts, "accuracy", "KL", "ΔNLL to full (95 %)"]
    header += [*tasks, "s"]
    lines = ["| " + " | ".join(header) + " |", "| --- " * len(header) + "|"]
    for row in rows:
        change = row["nll_over_full"]
        cells = [
            row["name"],
            f"{row['share']:.1%}",
            f"{row['nbytes_mean'] / 1e6:.2f}",
            f"{row['nbytes_peak'] / 1e6:.2f}",
        ]
        cells += [f"{row['perplexity']:.2f}", *(f"{row['texts'][text]['perplexity']:.2f}" for text in texts)]
        cells += [f"{row['accuracy']:.1%}", f"{row['kl']:.4f}"]
        cells += [f"{change['mean']:+.4f} ({change['low']:+.4f} … {change['high']:+.4f})"]
        for task in tasks:
            found = row["retrieval"][task]
            cells.append(f"{found['correct']}/{found['total']} ({found['low']:.2f} … {found['high']:.2f})")
        lines.append("| " + " | ".join([*cells, f"{row['seconds']:.0f}"]) + " |")
    return lines
