"""Who takes part in the benchmark: the methods by the names a user knows, each at the share of the prompt it may keep."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcompress.core.errors import InputError
from kvcompress.core.head_classes import load_classifications
from kvcompress.core.plan import RetentionPlan
from kvcompress.evaluation.benchmark_params import BASELINES, FULL, HEAD_AWARE, METHODS, BenchmarkParams
from kvcompress.methods.compressor import Compressor
from kvcompress.methods.fix_size_l2 import FixSizeL2Compressor
from kvcompress.methods.head_aware_compress import HeadAwareCompressor
from kvcompress.methods.l2_compress import L2Compressor
from kvcompress.methods.recent_only import RecentOnlyCompressor
from kvcompress.methods.streaming_llm import StreamingLLMCompressor
from kvcompress.models.architecture import Architecture
from kvcompress.planning.reference_plans import class_table_plan

SKIPPED = (0, 1)  # layers that the L2 methods leave full


@dataclass(frozen=True)
class Entrant:
    """`compressor` is None for transformers' own cache, `plan` where no plan decides; `settings` in words."""

    name: str
    method: str
    settings: str
    compressor: Compressor | None = None
    plan: RetentionPlan | None = None


def baseline(method: str, layers: int, params: BenchmarkParams) -> Entrant:
    """A baseline that keeps `params.share` of the prompt in a model of `layers` layers, all counted.

    The L2 methods leave the first two layers full, as their paper does, and the others pay for it; where that is more
    than the share, they leave none. Raises `InputError` where a share is no more than the sinks.
    """
    slots, sinks = round(params.share * params.max_tokens), params.sinks
    if slots <= sinks:
        raise InputError(
            f"benchmark.share is {params.share} of benchmark.max_tokens {params.max_tokens}, which is {slots} slots a "
            f"head, expected more than benchmark.sinks {sinks}"
        )
    skip = SKIPPED if params.share * layers > len(SKIPPED) else ()
    part = (params.share * layers - len(skip)) / (layers - len(skip))
    ranked = max(round(part * params.max_tokens), 1)
    full = f", layers {' and '.join(map(str, skip))} full" if skip else ""
    of: dict[str, tuple[str, Compressor]] = {
        "l2_compress": (
            f"smallest {part:.1%} of key norms, once, after the prompt{full}",
            L2Compressor(part, prune_after=params.max_tokens - 1, skip_layers=skip),
        ),
        "fix_size_l2": (
            f"{ranked} slots, half recent, half by key norm{full}",
            FixSizeL2Compressor(ranked, keep_ratio=0.5, skip_layers=skip),
        ),
        "streaming_llm": (
            f"{sinks} sinks + window of {slots - sinks}",
            StreamingLLMCompressor(sinks, slots - sinks),
        ),
        "recent_only": (f"window of {slots}", RecentOnlyCompressor(slots)),
    }
    return Entrant(method, method, *of[method])


def head_aware(name: str, plan: RetentionPlan, where: str | Path, config: Any) -> Entrant:
    """An entrant for a plan. Raises `InputError` where the plan from `where` is for a model of another shape."""
    shape = Architecture.of_config(config)
    plan.require_shape(shape.num_layers, shape.num_key_value_heads, shape.num_attention_heads, where)
    return Entrant(name, HEAD_AWARE, f"plan: {plan.policy}", HeadAwareCompressor.from_plan(plan), plan)


def require_known(methods: Iterable[str]) -> None:
    """Raise `InputError` for a method that does not exist."""
    for method in methods:
        if method not in METHODS:
            raise InputError(f"--method is {method!r}, expected one of {', '.join(METHODS)}")


def entrants_for(
    methods: Sequence[str],
    config: Any,
    params: BenchmarkParams,
    classifications: str | Path | None,
    plans: Iterable[str | Path] = (),
) -> list[Entrant]:
    """The full cache first, then the named methods in the order of `METHODS`, nothing twice.

    `head_aware` stands for the class table of `classifications` (None for none of it), and for every plan file.
    Raises `InputError` for an unknown method, and for files that are missing or for another model.
    """
    require_known(methods)
    found = [Entrant(FULL, FULL, "DynamicCache, SDPA")]
    layers = Architecture.of_config(config).num_layers
    found += [baseline(method, layers, params) for method in BASELINES if method in methods]
    if HEAD_AWARE in methods:
        if classifications is not None:
            table = class_table_plan(
                load_classifications(classifications), Architecture.of_config(config).num_key_value_heads
            )
            found.append(head_aware(HEAD_AWARE, table, classifications, config))
        for path in plans:
            name = f"{HEAD_AWARE} {Path(path).stem}"
            found.append(head_aware(name, RetentionPlan.load(path), path, config))
    return list({entrant.name: entrant for entrant in found}.values())
