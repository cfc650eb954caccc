"""Tables of results in README.md and docs/, made from the published results in reports/devices/.

Run: python -m tools.update_docs

A page marks each table: `<!-- kernel: begin reports/devices/nvidia-h100/kernel_cost.json -->` … `<!-- kernel: end -->`.
`PAGES` names the blocks of every page. Nothing here reads a result that the pipeline writes on this machine: those are in
reports/ and on the report page. To publish a result, copy it into the folder of its device and run this program.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.decode import WINDOW
from kvcompress.core.artifacts import read_json, read_text, write_text
from kvcompress.core.errors import InputError, said_in_a_sentence
from kvcompress.evaluation.params import CONTINUATION
from kvcompress.reporting.comparison import (
    by_size,
    conclusion,
    facts_cells,
    leading_cells,
    origin,
    plan_table,
    rows_of,
    title,
)
from kvcompress.reporting.tables import change, markdown

Report = Mapping[str, Any]
PUBLISHED = "reports/devices/"
MARKED = re.compile(r"(<!-- (\w+): begin (\S+) -->).*?(<!-- \2: end -->)", re.DOTALL)
MODELS = {"pythia-2.8b": "Pythia-2.8b", "llama-3-8b": "Llama-3-8B"}


# ---- Quality ----


def ablation(results: Sequence[Report]) -> str:
    """All contenders of an ablation, smallest first, and the class table against the uniform cache of its bytes."""
    rows = rows_of(results)
    header = ["contender (sinks + window)", "bytes", "perplexity", "ΔNLL to the full cache", *rows[0]["retrieval"]]
    table = markdown(header, ([*leading_cells(row), *facts_cells(row)] for row in by_size(rows)))
    (classes,) = (row for row in rows if row["name"] == "class table")
    return f"{origin(results[0])}\n\n{table}\n\n**{conclusion(classes)}**"


def plans(results: Sequence[Report]) -> str:
    """Plans against uniform caches of the same bytes, and the outcome of the policies that price heads."""
    (result,) = results
    sentences = [f"- {conclusion(row)}" for row in result["rows"] if row["family"] in ("priced", "select")]
    return "\n\n".join([origin(result), plan_table(result["rows"]), "\n".join(sentences)])


def plans_without_select(results: Sequence[Report]) -> str:
    """The table of `plans` without the policy select, whose plans in this result were made by an earlier rule."""
    (result,) = results
    return plans([{**result, "rows": [row for row in result["rows"] if row["family"] != "select"]}])


def selection(result: Report) -> str:
    """Heads that select keys by content, after an exact prefill."""
    settings, rows = result["settings"], result["rows"]
    use = "calibration" if settings["calibration"] else "evaluation"
    streamed = ", streamed in" if settings.get("retrieval_prefill") == "streaming" else ""
    made = (
        f"{_where(result)}, torch {result['environment']['torch']}. Documents of each {use} text: "
        f"{settings['documents_per_text']}. A prompt of {settings['context']:,} tokens is read exactly and compressed; "
        f"perplexity is that of the next {settings['continuation']:,}. Facts: contexts of "
        f"{settings['retrieval_length']:,} tokens{streamed}. {_sizes(settings)}"
    )
    tasks, texts = list(rows[0]["retrieval"]), list(rows[0]["texts"])
    header = ["contender", "bytes at the end", "mean", "geometric mean", *texts, "÷ uniform's", "ΔNLL to full"]
    header += [f"{task} of {rows[0]['retrieval'][task]['total']}" for task in tasks]
    lines = []
    for row in rows:
        cells = [row["name"], f"{row['share']:.1%}", f"{row['mean_share']:.1%}", f"{row['perplexity_gmean']:.2f}"]
        cells += [f"{row['texts'][text]['perplexity']:.2f}" for text in texts]
        cells.append(f"{row['rival']['gmean_ratio']:.3f}" if "rival" in row else "")
        cells.append(change(row["nll_over_full"]))
        found = (row["retrieval"][task] for task in tasks)
        lines.append([*cells, *(f"{one['correct']} ({one['low']:.2f} … {one['high']:.2f})" for one in found)])
    return f"{made}\n\n{markdown(header, lines)}"


HEADLINE = {  # row of the comparison after an exact prefill, at a quarter of the cache -> name in the README
    "full cache": "full cache",
    "uniform = select-25": "sink + window in every head",
    "uniform = priced-25": "sink + window in every head",
    "select snapkv 25%": "SnapKV, even budget",
    "select leverage 25%": "Compactor, even budget",
    "adaptive snapkv 25%": "Ada-KV with SnapKV",
    "priced-25": "**`priced`**",
    "select-25": "**`select`**",
}


def headline(result: Report) -> str:
    """The project's plans and published methods at a quarter of the cache, after an exact prefill."""
    rows = {row["name"]: row for row in result["continuation"]}
    (full, *_), settings = rows.values(), result["settings"]
    tasks = {"passkey": "passkeys", "needle": "facts in prose"}
    found = (f"{name} of {full['retrieval'][task]['total']}" for task, name in tasks.items())
    lines = [
        (
            name,
            f"{rows[row]['perplexity_gmean']:.2f}",
            "" if row == full["name"] else f"{rows[row]['perplexity_gmean'] / full['perplexity_gmean'] - 1:+.1%}",
            f"{rows[row]['kl']:.3f}",
            *(str(rows[row]["retrieval"][task]["correct"]) for task in tasks),
            f"{rows[row]['share']:.1%}",
        )
        for row, name in HEADLINE.items()
        if row in rows
    ]
    table = markdown(("cache", "perplexity", "against full", "KL to full", *found, "bytes"), lines)
    return (
        f"{table}\n\n"
        f"{result['model']}, {_where(result)}. {settings['context']:,} tokens are read and compressed, "
        f"perplexity and KL are those "
        f"of the next {settings['max_tokens'] - settings['context']:,} ({settings['documents_per_text']} "
        f"documents of each of "
        f"{len(result['texts'])} texts). Passkeys (a number in monotonous text) and facts in prose hide anywhere in "
        f"{settings['retrieval_lengths'][0]:,} tokens."
    )


def continuation(result: Report) -> str:
    """All contenders after an exact prefill, smallest first."""
    rows, (full, *_) = by_size(result["continuation"]), result["continuation"]
    header = [
        "contender",
        "bytes",
        "perplexity",
        "÷ full",
        "ΔNLL to the full cache",
        "KL",
        "same top token",
        *full["retrieval"],
    ]
    lines = [
        (
            title(row),
            f"{row['share']:.1%}",
            f"{row['perplexity_gmean']:.2f}",
            f"{row['perplexity_gmean'] / full['perplexity_gmean']:.3f}",
            change(row["nll_over_full"]),
            f"{row['kl']:.4f}",
            f"{row['same_top']:.1%}",
            *facts_cells(row),
        )
        for row in rows
    ]
    return f"{origin(result, CONTINUATION)}\n\n{markdown(header, lines)}"


def _sizes(settings: Mapping[str, Any]) -> str:
    half, share = settings["continuation"] // 2, settings["shares"][0]
    if not settings["growing"]:
        return f"Each cache holds {100 * share:g}% of the prompt."
    return (
        f"Each cache holds {100 * share:g}% of the prompt plus {half} tokens: the mean size, over the continuation, of a "
        "cache that also keeps every new token."
    )


def _where(result: Report) -> str:
    return f"{result['environment']['device']}, {result['environment']['dtype']}"


# ---- Speed and memory ----


def kernel(report: Report) -> str:
    """One token's attention in one layer: dense, by head group, and by the kernel."""
    fields = ("limit_us", "dense_us", "by_group_us", "kernel_us")
    rows = [
        (
            cost["shape"],
            *(f"{cost[field]:.1f}" for field in fields),
            f"{cost['kernel_ratio']:.2f}",
            f"{cost['kernel_share']:.2f}",
        )
        for cost in report["costs"]
    ]
    header = ("query/KV heads × size", "limit µs", "dense SDPA", "SDPA by group", "kernel", "× dense", "of the limit")
    made = f"{_device(report)}. A large copy moves {report['copy_gb_per_s']:,.0f} GB/s."
    return f"{made} Heads that are not full hold {WINDOW} keys.\n\n{markdown(header, rows)}"


def steps(report: Report) -> str:
    """Whole decode steps; a plan's ratio is to the full cache that took turns with it."""
    costs, rows = report["step"]["costs"], []
    for cost in costs:
        rival = next((name for name in cost["faster_than"] if name.startswith("full")), None)
        ratio = f"{cost['faster_than'][rival]:.2f} × {_named(rival)}" if rival and "plan" in cost["contender"] else ""
        numbers = f"{cost['ms']:.2f}", f"{cost['tokens_per_s']:,.0f}", f"{cost['share_of_limit']:.2f}"
        rows.append((_named(cost["contender"]), "yes" if cost["captured"] else "no", *numbers, ratio))
    made = (
        f"{MODELS[report['step']['model']]} with random weights, batch {costs[0]['batch']}, {costs[0]['context']:,} tokens. "
        f"The plan keeps {report['share']:.0%} of the cache and {report['full_heads']:.1%} of the KV heads whole. "
        f"{_device(report)}."
    )
    header = ("decode step", "CUDA graph", "ms", "tokens/s", "of the limit", "faster than full")
    return f"{made}\n\n{markdown(header, rows)}"


def batch(report: Report) -> str:
    """The largest batch, in a sentence."""
    found = report["batch"]
    return (
        f"In {found['cap_bytes'] / 1e9:.0f} GB, weights included, {MODELS[found['model']]} decodes **{found['plan']} rows "
        f"of {found['context']:,} tokens with the plan and {found['full']} with the full cache** ({found['ratio']:.2f} ×). "
        f"Both were found by running them. {_device(report)}."
    )


def prefill(report: Report) -> str:
    """Prefill of long prompts: time against a dense cache, and memory."""

    def sizes(cost: Report) -> list[str]:
        return [f"{cost[name]:,.0f}" for name in ("cache_mb", "peak_mb")]

    rows = [
        (cost["contender"], f"{cost['tokens']:,}", f"{cost['ms']:,.0f}", f"{cost['faster']:.2f}", *sizes(cost))
        for cost in report["costs"]
    ]
    header = ("prefill", "tokens", "ms", "× dense", "cache MB", "peak MB above the weights")
    return f"{MODELS[report['model']]}, batch 1, the same plan. {_device(report)}.\n\n{markdown(header, rows)}"


def choosing(report: Report) -> str:
    """Cost of selecting keys at the end of a prompt and while decoding."""
    costs, rows = report["costs"], []
    for cost in costs:
        window = cost["rival"] == cost["contender"]
        scoring, ratio = ("", "") if window else (f"{cost['scoring']:.1%}", f"{cost['step_ratio']:.3f}")
        sizes = f"{cost['cache_mb']:.0f}", f"{cost['evidence_mb']:.1f}"
        rows.append((cost["contender"], f"{cost['prefill_ms']:.0f}", scoring, f"{cost['step_ms']:.2f}", ratio, *sizes))
    if report["like"]:
        models = " and ".join(sorted(set(report["like"].values())))
        heads = (
            f"Heads take turns at the retentions of plans for {models}; windows have as many slots in "
            f"all. Keys are selected"
        )
    else:
        heads = f"Every KV head has {costs[0]['slots']:,} slots, half of them for keys that are selected"
    made = (
        f"{MODELS.get(report['model'], report['model'])} with random weights, {costs[0]['tokens']:,} tokens, batch "
        f"{costs[0]['batch']}, {report['steps']:,} decode steps. {heads}, anew after {report['every']} tokens or "
        f"fewer. {_device(report)}."
    )
    header = (
        "heads hold",
        "prefill ms",
        "selection's part",
        "step ms",
        "÷ window's",
        "cache MB",
        "queries, positions MB",
    )
    return f"{made}\n\n{markdown(header, rows)}"


def scaling(report: Report) -> str:
    """Seconds of each stage in one process and in several."""
    where = report["environment"]
    rows = []
    for row in report["rows"]:
        ratios = ("", "") if row["stage"] == "loading" else (f"{row['faster']:.2f}", f"{row['weak_efficiency']:.2f}")
        rows.append((row["stage"], f"{row['one_s']:.1f}", f"{row['several_s']:.1f}", *ratios))
    made = (
        f"{report['model']}, {report['documents']} documents of {report['tokens']:,} tokens, {where['device']} with "
        f"{report['cores']} cores, {where['dtype']}, torch {where['torch']}."
    )
    header = ("", "1 process, s", f"{report['processes']} processes, s", "times faster", "weak scaling")
    return f"{made}\n\n{markdown(header, rows)}"


def long(report: Report) -> str:
    """Memory against the length of a document."""
    rows = []
    for row in report["rows"]:
        numbers = row["cache_mb"], row["beside_cache_mb"], row.get("observed_s", row.get("seconds"))
        rows.append((f"{row['tokens']:,}", *(f"{number:.1f}" for number in numbers)))
    made = (
        f"A random model of {report['layers']} layer and {report['heads']} head of {report['head_dim']}, "
        f"{report['dtype']}, chunks of {report['chunk_size']}, torch {report['torch']}."
    )
    header = ("tokens", "keys and values, MB", "everything else at the peak, MB", "seconds")
    return f"{made}\n\n{markdown(header, rows)}"


def _named(contender: str) -> str:
    return "full, this cache" if contender == "full" else contender


def _device(report: Report) -> str:
    return f"{report['device']}, {report['dtype']}, torch {report['torch']}"


# ---- Pages ----

Blocks = Mapping[str, Callable[[Any], str]]
SELECTIONS = ("selection_more", "selection", "selection_less", "streamed_passkeys", "passkeys_by_price", "early")
PAGES: dict[str, Blocks] = {
    "README.md": {"headline": headline},
    "docs/results.md": {
        "continuation": continuation,
        "plans_gpu": plans_without_select,
        "plans": plans,
        "streaming": plans,
        "ablation": ablation,
        **dict.fromkeys((*SELECTIONS, "selection_others", "adaptive"), selection),
    },
    "docs/speed.md": {"kernel": kernel, "steps": steps, "batch": batch, "prefill": prefill}
    | {"choosing": choosing, "choosing_plans": choosing},
    "docs/scaling.md": {"scaling": scaling, "long": long},
}


def current(page: str, folder: Path, blocks: Blocks) -> str:
    """Return the page with every block made from its result; paths of results start from `folder`.

    Raises `InputError` if a block is missing or twice there, or its result is not a published one.
    """
    found = MARKED.findall(page)
    if sorted(name for _, name, _, _ in found) != sorted(blocks):
        raise InputError(
            f"the page has the blocks {[name for _, name, _, _ in found]}, expected {sorted(blocks)} once each"
        )
    for _, name, path, _ in found:
        if not path.startswith(PUBLISHED):
            raise InputError(f"the block {name} is made from {path}, expected a file under {PUBLISHED}")
    return MARKED.sub(lambda one: f"{one[1]}\n\n{blocks[one[2]](read_json(folder / one[3]))}\n\n{one[4]}", page)


def main(folder: Annotated[Path, typer.Option(help="The project's folder.")] = Path(".")) -> None:
    """Rewrite the tables of results in README.md and docs/."""
    for name, blocks in PAGES.items():
        write_text(folder / name, current(read_text(folder / name), folder, blocks))


if __name__ == "__main__":
    with said_in_a_sentence():
        typer.run(main)
