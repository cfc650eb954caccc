"""Files for the report page of an invented model: 3 layers, 4 query heads and 2 KV heads each; no model runs."""

from pathlib import Path
from typing import Any

from kvcompress.core.artifacts import write_json
from kvcompress.core.head_classes import HeadClassification, HeadType, ModelInfo, save_classifications
from kvcompress.core.head_statistics import HeadStatistics, save_statistics
from kvcompress.core.plan import RetentionPlan
from kvcompress.core.retention import FULL, Retention
from stages.report import main
from tests.project.project import ROOT

LAYERS, HEADS, KV_HEADS = 3, 4, 2
KINDS = (HeadType.SINK_POSITIONAL, HeadType.GATHERING, HeadType.SINK_MIXED, HeadType.MIXED, HeadType.DEAD)
ENVIRONMENT = {"device": "abacus", "threads": 1, "dtype": "float32", "torch": "2.11.0", "transformers": "5.17.0"}
SETTINGS = {
    "max_tokens": 256,
    "documents_per_text": 1,
    "chunk_size": 64,
    "retrieval_prefill": "exact",
    "retrieval_lengths": [256],
    "context": 192,
}


def head(layer: int, number: int) -> HeadStatistics:
    sink, local = 0.1 * layer + 0.01 * number, 0.05 * (number + 1)
    preference = {"sink": sink, "recent": 0.2, "local": local, "global": 1 - sink - local}
    said = {"mean_entropy": 1.0 + layer + 0.25 * number, "std_entropy": 0.5, "max_attention_mean": 0.3}
    said |= {"uniformity_score": 0.4, "induction_score": 0.125 * number}
    return HeadStatistics(
        layer, number, position_preference=preference, sink_ratio=sink, relative_position_dist=[0.5, 0.5], **said
    )


def classified(layer: int, number: int) -> HeadClassification:
    kind = KINDS[(layer * HEADS + number) % len(KINDS)]
    if kind in (HeadType.SINK_POSITIONAL, HeadType.SINK_MIXED):
        return HeadClassification(layer, number, kind, 0.9, False, True, 8 + layer, True, 4, False, "sink_window")
    return HeadClassification(layer, number, kind, 0.9)


def row(name: str, family: str, share: float, perplexity: float, rival: tuple[str, float, float] | None = None) -> dict:
    """`rival`: name, and the ends of the interval of ΔNLL."""
    grid = [{"length": 256, "depth": depth, "correct": int(share > depth), "total": 1} for depth in (0.25, 0.75)]
    found = {"correct": sum(cell["correct"] for cell in grid), "total": 2, "share": 0.5, "low": 0.1, "high": 0.9}
    change = {"mean": 0.02, "low": 0.01, "high": 0.03} if share < 1 else {"mean": 0.0, "low": 0.0, "high": 0.0}
    result: dict[str, Any] = {"name": name, "family": family, "ablation": "plans", "share": share, "tokens": 255}
    result |= {"perplexity": perplexity, "perplexity_gmean": perplexity, "accuracy": 0.4, "kl": 0.01, "seconds": 1.0}
    result |= {"nbytes_mean": 1000, "nbytes_peak": 1100, "texts": {"prose": {"perplexity": perplexity}}}
    result |= {"nll_over_full": change, "retrieval": {"passkey": {**found, "grid": grid}}}
    if rival:
        against, low, high = rival
        result["rival"] = {"name": against, "perplexity": 20.0, "bytes": 1.0, "gmean_ratio": 1.0}
        result["rival"] |= {
            "text_ratios": {"prose": 1.0},
            "nll_over_rival": {"mean": (low + high) / 2, "low": low, "high": high},
        }
    return result


def result(model: str, rows: list[dict]) -> list[dict[str, Any]]:
    return [{"model": model, "texts": ["prose"], "environment": ENVIRONMENT, "settings": SETTINGS, "rows": rows}]


def comparison(model: str) -> list[dict[str, Any]]:
    rows = [row("full cache", "full", 1.0, 18.0)]
    for size, share, bounds in (("25", 0.25, (-0.02, -0.01)), ("50", 0.5, (-0.01, 0.01))):
        rows.append(row(f"priced-{size}", "priced", share, 19.0, (f"uniform = priced-{size}", *bounds)))
        rows.append(row(f"uniform = priced-{size}", "uniform sink + window", share, 20.0))
    rows.append(row("random-25", "random", 0.25, 25.0, ("uniform = priced-25", 0.1, 0.2)))
    rival = "uniform = select-25"
    later = [
        row("full cache", "full", 1.0, 17.0),
        row("select-25", "select", 0.25, 17.5, (rival, -0.2, -0.1)),
        row(rival, "uniform sink + window", 0.25, 18.0),
        row("snapkv 25%", "snapkv", 0.25, 17.8, (rival, -0.1, -0.05)),
    ]
    later[1]["nll_over"] = {
        "snapkv 25%": {"mean": -0.03, "low": -0.05, "high": -0.01},
        rival: later[1]["nll_over_full"],
    }
    found = result(model, rows)
    return [found[0] | {"continuation": later}]


def ablation(model: str) -> list[dict[str, Any]]:
    rows = [row("full cache", "full", 1.0, 18.0), row("4 + 60", "uniform sink + window", 0.25, 21.0)]
    rows.append(row("class table", "class table", 0.7, 24.0, ("uniform = class table", 0.1, 0.2)))
    return result(model, [*rows, row("uniform = class table", "uniform sink + window", 0.7, 20.0)])


def benchmark(model: str) -> list[dict[str, Any]]:
    rows = []
    for i, name in enumerate(("full", "head_aware priced-25")):
        speed = {
            "first_token_ms": {"median": 90.0 + i},
            "prefill_tokens_per_s": 700.0,
            "compress_ms": None,
            "decode_tokens_per_s": 12.5,
            "decode_ms": {"median": 80.0, "p10": 70.0, "p90": 95.0},
            "bytes_mean": 2e6,
            "bytes_peak": 3e6,
            "peak_device_bytes": None,
            "tokens": 8,
            "perplexity": 9.5,
            "accuracy": 0.5,
        }
        nll = {"mean": 0.1 * i, "low": None, "high": None}
        settings = "plan: class_table" if i else "DynamicCache, SDPA"
        rows.append(
            {
                "name": name,
                "settings": settings,
                **speed,
                "to_full": {
                    "decode_times_faster": 1.0 + i,
                    "bytes_share": 1.0 - 0.5 * i,
                    "perplexity_ratio": 1.0,
                    "nll": nll,
                },
            }
        )
    step: dict[str, Any] = {"batch": 1, "megabytes": 1.0}
    for part in ("step", "attention"):
        step |= {
            f"{part}_ms": 10.0,
            f"{part}_p10": 9.0,
            f"{part}_p90": 12.0,
            f"{part}_ratio": 1.0,
            f"{part}_limit_ms": 2.0,
        }
    growth = [{"contender": row["name"], "context": context, **step} for row in rows for context in (64, 128)]
    settings = {"num_samples": 1, "max_tokens": 64, "max_new_tokens": 8, "turn": 4, "growth_rounds": 3}
    result = {"model": model, "environment": ENVIRONMENT, "settings": settings, "samples": ["prose"], "rows": rows}
    return [result | {"growth": growth, "weight_bytes": 1e6, "copy_bytes_per_s": 1e9}]


def write_files(folder: Path, model: str = "maker/made-up", speed: bool = False) -> Path:
    """`data` and `reports` in `folder`."""
    places = [(i, j) for i in range(LAYERS) for j in range(HEADS)]
    info = ModelInfo(
        num_layers=LAYERS, num_heads=HEADS, sink_size=4, local_window=8, recent_ratio=0.1, num_key_value_heads=KV_HEADS,
        model_id=model, revision="1", documents=2, queries=512, max_tokens=256,
    )  # fmt: skip
    save_statistics(folder / "data/head_statistics.json", [head(*place) for place in places], info)
    save_classifications(
        folder / "data/refined_classifications.json", [classified(*place) for place in places], info, "refined"
    )
    prices = [
        {"layer": i, "kv_head": j, "price": i + 0.5 * j, "facts": 0.25 * j - 0.1, "sinks": 4, "window": 128}
        for i in range(LAYERS)
        for j in range(KV_HEADS)
    ]
    write_json(folder / "reports/prices/prices.json", prices)
    for size, window in (("25", 60), ("6.25", 12)):
        kept = ((FULL, Retention(4, window)), *((Retention(4, window),) * KV_HEADS,) * (LAYERS - 1))
        plan = RetentionPlan(kept, HEADS, model, "priced", {"share": float(size) / 100})
        plan.save(folder / "reports/plans" / model.replace("/", "--") / f"priced-{size}.json")
    write_json(folder / "reports/ablation/ablation.json", ablation(model))
    write_json(folder / "reports/plan_comparison/plan_comparison.json", comparison(model))
    if speed:
        write_json(folder / "reports/benchmark/benchmark.json", benchmark(model))
    return folder


def made_page(folder: Path) -> str:
    """Return the page that the stage writes from these files."""
    main(ROOT / "params.yaml", folder / "data", folder / "reports")
    return (folder / "reports/index.html").read_text()
