"""The tables of docs/speed.md, what a GPU was measured to take, made from the reports of `kernel_cost`, `step_cost` and
`prefill_cost`."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.kernel_cost import WINDOW

Report = Mapping[str, Any]
MODELS = {"pythia-2.8b": "Pythia-2.8b", "llama-3-8b": "Llama-3-8B"}


def kernel(report: Report) -> str:
    """One token's attention in one layer: dense, and by the kernel over ragged heads."""
    rows = [
        (
            cost["shape"],
            f"{cost['limit_us']:.1f}",
            f"{cost['dense_us']:.1f}",
            f"{cost['by_group_us']:.1f}",
            f"{cost['kernel_us']:.1f}",
            f"{cost['kernel_ratio']:.2f}",
            f"{cost['kernel_share']:.2f}",
        )
        for cost in report["costs"]
    ]
    head = ("query/KV heads × size", "limit µs", "dense SDPA", "SDPA by group", "kernel", "× dense", "of the limit")
    made = f"{_device(report)}, a large copy moves {report['copy_gb_per_s']:,.0f} GB/s."
    return f"{made} Heads that are not full hold {WINDOW} keys.\n\n{table(head, rows)}"


def steps(report: Report) -> str:
    """Whole decode steps; ratios are to the full cache that took turns with a contender."""
    found = report["step"]
    rows = []
    for cost in found["costs"]:
        rival = next((name for name in cost["faster_than"] if name.startswith("full")), None)
        rows.append(
            (
                _named(cost["contender"]),
                "yes" if cost["captured"] else "no",
                f"{cost['ms']:.2f}",
                f"{cost['tokens_per_s']:,.0f}",
                f"{cost['share_of_limit']:.2f}",
                f"{cost['faster_than'][rival]:.2f} × {_named(rival)}" if rival and "plan" in cost["contender"] else "",
            )
        )
    first = found["costs"][0]
    made = (
        f"{MODELS[found['model']]} with random weights, batch {first['batch']}, {first['context']:,} tokens, a plan that "
        f"keeps {report['share']:.0%} of the cache and {report['full_heads']:.1%} of the KV heads whole. {_device(report)}."
    )
    return (
        f"{made}\n\n{table(('decode step', 'CUDA graph', 'ms', 'tokens/s', 'of the limit', 'faster than full'), rows)}"
    )


def choosing(report: Report) -> str:
    """What choosing keys costs at the end of a prompt and while decoding, by score."""
    costs = report["costs"]
    rows = [
        (
            cost["contender"],
            f"{cost['prefill_ms']:.0f}",
            "" if cost["rival"] == cost["contender"] else f"{cost['scoring']:.1%}",
            f"{cost['step_ms']:.2f}",
            "" if cost["rival"] == cost["contender"] else f"{cost['step_ratio']:.3f}",
            f"{cost['cache_mb']:.0f}",
            f"{cost['evidence_mb']:.1f}",
        )
        for cost in costs
    ]
    head = ("heads hold", "prefill ms", "of it choosing", "step ms", "÷ window's", "cache MB", "beside it MB")
    made = (
        f"{MODELS.get(report['model'], report['model'])} with random weights, {costs[0]['tokens']:,} tokens, batch "
        f"{costs[0]['batch']}, {report['steps']:,} steps, {_holding(report)}. {_device(report)}."
    )
    return f"{made}\n\n{table(head, rows)}"


def _holding(report: Report) -> str:
    if report["like"]:
        models = " and ".join(sorted(set(report["like"].values())))
        return f"heads that keep in turn what those of {models} do by its plans, beside windows of as many slots in all"
    slots = report["costs"][0]["slots"]
    return f"{slots:,} slots in every KV head, half of them chosen, anew every {report['every']} tokens"


def batch(report: Report) -> str:
    """The largest batch, in a sentence."""
    found = report["batch"]
    return (
        f"Within {found['cap_bytes'] / 1e9:.0f} GB, weights included, decoding {MODELS[found['model']]} with "
        f"{found['context']:,} tokens a row fits **{found['plan']} rows with the plan and {found['full']} with the full "
        f"cache** ({found['ratio']:.2f} ×), found by running them."
    )


def prefill(report: Report) -> str:
    """Prefill of long prompts: time against a dense cache, and memory."""
    rows = [
        (
            cost["contender"],
            f"{cost['tokens']:,}",
            f"{cost['ms']:,.0f}",
            f"{cost['faster']:.2f}",
            f"{cost['cache_mb']:,.0f}",
            f"{cost['peak_mb']:,.0f}",
        )
        for cost in report["costs"]
    ]
    head = ("prefill", "tokens", "ms", "× dense", "cache MB", "peak MB beside weights")
    return f"{MODELS[report['model']]}, batch 1, the same plan.\n\n{table(head, rows)}"


def _named(contender: str) -> str:
    return "full, this cache" if contender == "full" else contender


def _device(report: Report) -> str:
    return f"{report['device']}, {report['dtype']}, torch {report['torch']}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
