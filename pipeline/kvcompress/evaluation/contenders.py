"""Contenders: everything that is compared, with the rival that holds the same bytes."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcompress.core.errors import InputError
from kvcompress.core.head_classes import HeadType, load_classifications
from kvcompress.core.plan import RetentionPlan, named_plans
from kvcompress.core.retention import FULL as WHOLE
from kvcompress.core.retention import Retention
from kvcompress.evaluation.params import BASELINES, FULL, HEAD_AWARE, METHODS, AblationParams, BenchmarkParams
from kvcompress.evaluation.perplexity import FULL_CACHE
from kvcompress.methods import (
    AdaptiveCompressor,
    FixSizeL2Compressor,
    HeadAwareCompressor,
    L2Compressor,
    RecentOnlyCompressor,
    StreamingLLMCompressor,
)
from kvcompress.methods.compressor import Compressor
from kvcompress.models.architecture import Architecture
from kvcompress.planning.reference_plans import class_table_plan, inverted, per_layer, shuffled, uniform_at
from kvcompress.scores.registry import SCORES
from kvcompress.scores.selection_rule import SelectionRule, kept_query_slots

UNIFORM = "uniform sink + window"
ABLATIONS = ("sink_importance", "window_size", "head_aware")
# Wider windows for the class table, as a milder reading of the same classes.
WIDE = {HeadType.SINK_POSITIONAL: 128, HeadType.TRUE_POSITIONAL: 128, HeadType.SINK_MIXED: 256}
# The published report's own, bolder recommendation for mixed heads.
BOLD = {HeadType.MIXED: 32}
SINKS = 4  # of uniform caches
ADAPTIVE = "adaptive "  # before a score: slots are divided among the heads of a layer by the prompt (Ada-KV)
SKIPPED = (0, 1)  # layers that the L2 methods leave full in the benchmark


@dataclass(frozen=True)
class Contender:
    """One compressed cache in a comparison.

    Parameters
    ----------
    name: unique in a comparison.
    family: the method; in a figure its contenders share a colour and a line.
    compressor: None for the default cache of transformers.
    plan: the retention plan, None for a method that has none.
    rival: name of the contender that holds the same bytes, None if there is none.
    ablation: the ablation it belongs to.
    settings: the method's settings in words.
    first_eviction: query position from which a head may miss a key; 0 if nothing is evicted.
    """

    name: str
    family: str
    compressor: Compressor | None = None
    plan: RetentionPlan | None = None
    rival: str | None = None
    ablation: str = ""
    settings: str = ""
    first_eviction: int = 0


Contenders = dict[str, Contender]


def by_name(contenders: Iterable[Contender]) -> Contenders:
    """Return contenders by name, in their order and each once."""
    return {contender.name: contender for contender in contenders}


def compressors_of(contenders: Mapping[str, Contender]) -> dict[str, Compressor]:
    """Return the compressors by the contenders' names."""
    return {name: one.compressor for name, one in contenders.items() if one.compressor is not None}


def of_plan(
    name: str,
    family: str,
    plan: RetentionPlan,
    rival: str | None = None,
    ablation: str = "",
    choosing: SelectionRule | None = None,
) -> Contender:
    capacities = [kept.capacity for layer in plan.layers for kept in layer if kept.capacity is not None]
    compressor = HeadAwareCompressor.from_plan(plan, selection_rule=choosing)
    return Contender(name, family, compressor, plan, rival, ablation, first_eviction=min(capacities, default=0))


def uniform(config: Any, kept: Retention, **origin: Any) -> RetentionPlan:
    """Return the plan in which every KV head keeps the same."""
    shape = Architecture.of_config(config)
    return RetentionPlan.uniform(kept, shape.num_layers, shape.num_key_value_heads, shape.num_attention_heads, **origin)


def full_cache(config: Any) -> Contender:
    return of_plan(FULL_CACHE, "full", uniform(config, WHOLE), ablation="all")


# Plans and published scores


def fitting(plan: RetentionPlan, file: str | Path, config: Any) -> RetentionPlan:
    """Return the plan. Raises `InputError` if the plan of `file` is for a model of another shape."""
    shape = Architecture.of_config(config)
    plan.require_shape(shape.num_layers, shape.num_key_value_heads, shape.num_attention_heads, file)
    return plan


def score_name(score: str, share: float) -> str:
    """Return the name of a score's contender: "select snapkv 25%" or "adaptive snapkv 25%"."""
    return f"{score if score.startswith(ADAPTIVE) else f'select {score}'} {100 * share:g}%"


def plan_files(
    paths: Sequence[str | Path],
    scores: Sequence[str] = (),
    shares: Sequence[float] = (),
    taken: Collection[str] = (),
) -> dict[str, Path]:
    """Return plan files by the names that `plan_contenders` gives them: see `named_plans`."""
    others = {FULL_CACHE, *taken, *(score_name(score, share) for score in scores for share in shares)}
    sizes = {f"{100 * share:g}%" for share in shares}
    rivals = {f"uniform = {name}" for name in (*sizes, *(Path(path).stem for path in paths))}
    return named_plans(paths, others | sizes | rivals)


def plan_contenders(
    config: Any,
    tokens: int,
    paths: Sequence[str | Path],
    scores: Sequence[str] = (),
    shares: Sequence[float] = (),
    choosing: SelectionRule | None = None,
    taken: Collection[str] = (),
) -> Contenders:
    """Return the full cache, plans from files, and published scores, each with a uniform rival of the same bytes.

    Bytes are equal after `tokens` tokens, kept queries included. Contenders that hold the same share a rival.

    Parameters
    ----------
    scores: names in SCORES, or "adaptive NAME". Every head, of "adaptive" every layer, has the same number of slots:
        half of them, sinks aside, are a window, the others are selected.
    shares: shares of the full cache that scores hold, which names them: "select snapkv 25%".
    choosing: how heads select [default: the library's rule].
    taken: names of other contenders, which no plan may have.

    Raises `InputError` for a plan of another model's shape, an unknown score, or a share that leaves nothing to select.
    """
    found, rivals = [full_cache(config)], {}

    def rival_of(plan: RetentionPlan, name: str) -> list[Contender]:
        """Return the uniform rival as a list, which is empty if it competes already."""
        held = plan.held(tokens) + kept_query_slots(plan, choosing)
        if held in rivals:
            return []
        rivals[held] = f"uniform = {name}"
        even = uniform_at(plan, tokens, SINKS, kept_query_slots(plan, choosing))
        return [of_plan(rivals[held], UNIFORM, even, ablation="plans")]

    for name, path in plan_files(paths, scores, shares, taken).items():
        plan = fitting(RetentionPlan.load(path), path, config)
        new = rival_of(plan, name)
        rival = rivals[plan.held(tokens) + kept_query_slots(plan, choosing)]
        found += [of_plan(name, plan.policy, plan, rival, "plans", choosing), *new]
    for share in shares if scores else ():
        slots = round(share * tokens)
        if not SINKS < slots < tokens:
            raise InputError(
                f"{share:g} of {tokens} tokens is {slots} slots a head, expected more than {SINKS} sinks and fewer than"
                " all tokens"
            )
        even = uniform(config, Retention(SINKS, slots - SINKS))
        found += rival_of(even, f"{100 * share:g}%")
        rival = rivals[even.held(tokens)]
        found += [even_budget(name, share, slots, rival, config, choosing) for name in scores]
    return by_name(found)


def even_budget(
    name: str, share: float, slots: int, rival: str, config: Any, choosing: SelectionRule | None = None
) -> Contender:
    """Return a published score with `slots` slots in every KV head, room for the queries it keeps included.

    Raises `InputError` for an unknown score, or if nothing is left to select.
    """
    score, rule, shape = name.removeprefix(ADAPTIVE), choosing or SelectionRule(), Architecture.of_config(config)
    if score not in SCORES:
        raise InputError(f"compare_plans.scores has {name!r}, expected {', '.join(SCORES)}, or '{ADAPTIVE}' before one")
    queries = 0
    if rule.score(score).needs_queries:
        queries = -(-rule.observe * shape.num_attention_heads // (2 * shape.num_key_value_heads))  # slots of a head
    room = slots - SINKS - queries
    window = round(room / 2)
    if not 0 < window < room:
        raise InputError(
            f"{share:g} of the full cache leaves {room} slots a head besides {SINKS} sinks and the queries of {name},"
            " expected room for a window and for selected keys"
        )
    label = score_name(name, share)
    family = label.rpartition(" ")[0]
    if name.startswith(ADAPTIVE):
        adaptive = AdaptiveCompressor(SINKS + room, score, SINKS, window, selection_rule=choosing)
        return Contender(label, family, adaptive, None, rival, "plans", first_eviction=SINKS + room)
    plan = uniform(config, Retention(SINKS, window, room - window, score), policy=family)
    return of_plan(label, family, plan, rival, "plans", choosing)


# Ablations


def ablation_contenders(
    ablations: Sequence[str], config: Any, params: AblationParams, classifications: str | Path | None = None
) -> Contenders:
    """Return the contenders of the named ablations, the full cache first, rivals included.

    Raises `InputError` for classifications that cannot be read.
    """
    found = [full_cache(config)]
    if "window_size" in ablations or "sink_importance" in ablations:
        found += [
            of_plan(f"4 + {size - 4}", UNIFORM, uniform(config, Retention(4, size - 4)), ablation="window_size")
            for size in params.sizes
        ]
    if "window_size" in ablations:
        middle = params.sizes[len(params.sizes) // 2]
        fixed, once = FixSizeL2Compressor(middle, 0.5), L2Compressor(0.5, middle)
        found += [
            Contender(name, family, compressor, ablation="window_size", first_eviction=middle)
            for name, family, compressor in (
                (f"fix_size_l2 {middle}", "fix_size_l2", fixed),
                ("l2_compress 0.5", "l2_compress", once),
            )
        ]
    if "sink_importance" in ablations:
        found += sink_contenders(config, params)
    if "head_aware" in ablations:
        assert classifications is not None
        found += class_table_contenders(config, params, classifications)
    return by_name(found)


def sink_contenders(config: Any, params: AblationParams) -> list[Contender]:
    """Return caches with and without sinks at equal bytes: no sinks at every size, other counts at the middle one."""
    found = [
        of_plan(f"0 + {size}", "window only", uniform(config, Retention(0, size)), f"4 + {size - 4}", "sink_importance")
        for size in params.sizes
    ]
    middle = params.sizes[len(params.sizes) // 2]
    for sinks in params.sink_counts:
        if sinks not in (0, 4):
            plan, name = uniform(config, Retention(sinks, middle - sinks)), f"{sinks} + {middle - sinks}"
            found.append(of_plan(name, "other sink counts", plan, f"4 + {middle - 4}", "sink_importance"))
    return found


def class_table_contenders(config: Any, params: AblationParams, classifications: str | Path) -> list[Contender]:
    """Return the class table and its variants, each with its rival, and the controls of the table."""
    heads, tokens, family = Architecture.of_config(config).num_key_value_heads, params.max_tokens, "class table"
    found, file = [], load_classifications(classifications)
    for name, windows in ((family, {}), (f"{family}, wide", WIDE), (f"{family}, bold", BOLD)):
        plan, rival = class_table_plan(file, heads, windows), f"uniform = {name}"
        found.append(of_plan(name, family, plan, rival, "head_aware"))
        found.append(of_plan(rival, UNIFORM, uniform_at(plan, tokens), ablation="head_aware"))
    table, rival = class_table_plan(file, heads), found[1].name
    controls = {f"random {seed}": ("random", shuffled(table, seed)) for seed in range(params.random_seeds)}
    controls |= {"inverted": ("inverted", inverted(table)), "per layer": ("per layer", per_layer(table, tokens))}
    return found + [of_plan(name, kind, plan, rival, "head_aware") for name, (kind, plan) in controls.items()]


def beyond_contenders(config: Any, classifications: str | Path | None, size: int) -> Contenders:
    """Return caches of `size` slots a head for a text longer than the trained context.

    StreamingLLM (arXiv 2309.17453) claims that sinks + window stay stable at any length if positions are counted inside
    the cache. The others count positions in the text: the same cache, one without sinks, and the class table.
    """
    found = [
        Contender(f"4 + {size - 4}, positions in the cache", UNIFORM, StreamingLLMCompressor(4, size - 4, "cache")),
        Contender(f"4 + {size - 4}, positions of the text", UNIFORM, StreamingLLMCompressor(4, size - 4)),
        Contender(f"0 + {size}, positions of the text", "window only", RecentOnlyCompressor(size)),
    ]
    if classifications:
        plan = class_table_plan(
            load_classifications(classifications), Architecture.of_config(config).num_key_value_heads
        )
        found.append(of_plan("class table, positions of the text", "class table", plan))
    return by_name(found)


# Benchmark


def benchmark_contenders(
    methods: Sequence[str],
    config: Any,
    params: BenchmarkParams,
    classifications: str | Path | None,
    plans: Iterable[str | Path] = (),
) -> list[Contender]:
    """Return the full cache, then the named methods in the order of METHODS, each once.

    `head_aware` is the class table of `classifications`, unless that is None, and every plan file.
    Raises `InputError` for an unknown method, and for files that are missing or for another model.
    """
    require_known(methods)
    found = [Contender(FULL, FULL, settings="DynamicCache, SDPA")]
    found += [
        baseline(method, Architecture.of_config(config).num_layers, params) for method in BASELINES if method in methods
    ]
    if HEAD_AWARE in methods:
        if classifications is not None:
            table = class_table_plan(
                load_classifications(classifications), Architecture.of_config(config).num_key_value_heads
            )
            found.append(head_aware(HEAD_AWARE, fitting(table, classifications, config)))
        for name, path in named_plans(plans).items():
            plan = fitting(RetentionPlan.load(path), path, config)
            found.append(head_aware(f"{HEAD_AWARE} {name}", plan))
    return list(by_name(found).values())


def require_known(methods: Iterable[str]) -> None:
    """Raise `InputError` for an unknown method."""
    for method in methods:
        if method not in METHODS:
            raise InputError(f"--method is {method!r}, expected one of {', '.join(METHODS)}")


def head_aware(name: str, plan: RetentionPlan) -> Contender:
    return Contender(name, HEAD_AWARE, HeadAwareCompressor.from_plan(plan), plan, settings=f"plan: {plan.policy}")


def baseline(method: str, layers: int, params: BenchmarkParams) -> Contender:
    """Return a baseline that keeps `params.share` of the prompt in a model of `layers` layers, all counted.

    The L2 methods leave the first two layers full, as their paper does, and keep less in the others; if these two alone
    exceed the share, no layer is full. Raises `InputError` if a share is no more than the sinks.
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
    settings, compressor = of[method]
    return Contender(method, method, compressor, settings=settings)
