"""Who competes in which ablation: a name, a compressor, and whom it has to beat at the same bytes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcompress.core.head_classes import HeadType, load_classifications
from kvcompress.core.plan import RetentionPlan
from kvcompress.core.retention import FULL, Retention
from kvcompress.evaluation.params import AblationParams
from kvcompress.methods import FixSizeL2Compressor, HeadAwareCompressor, L2Compressor
from kvcompress.methods.compressor import Compressor
from kvcompress.models.architecture import Architecture
from kvcompress.planning.reference_plans import class_table_plan, inverted, per_layer, shuffled, uniform_at
from kvcompress.scores.selection_rule import SelectionRule, kept_query_slots

FULL_CACHE, UNIFORM = "full cache", "uniform sink + window"
# Wider windows for the class table, as a milder reading of the same classes.
WIDE = {HeadType.SINK_POSITIONAL: 128, HeadType.TRUE_POSITIONAL: 128, HeadType.SINK_MIXED: 256}
# The published report's own, bolder recommendation for mixed heads.
BOLD = {HeadType.MIXED: 32}


@dataclass(frozen=True)
class Contender:
    """`family` groups the points of one line in a figure; `rival` names who has the same bytes, None for no one.

    `first_eviction` is the query position from which a head may miss a key; `plan` is None where there is none.
    """

    name: str
    family: str
    ablation: str
    compressor: Compressor
    first_eviction: int
    plan: RetentionPlan | None = None
    rival: str | None = None


def of_plan(
    name: str,
    family: str,
    ablation: str,
    plan: RetentionPlan,
    rival: str | None = None,
    choosing: SelectionRule | None = None,
) -> Contender:
    capacities = [kept.capacity for layer in plan.layers for kept in layer if kept.capacity is not None]
    compressor = HeadAwareCompressor.from_plan(plan, choosing=choosing)
    return Contender(name, family, ablation, compressor, min(capacities, default=0), plan, rival)


def full_cache(shape: Architecture) -> Contender:
    kept = RetentionPlan.uniform(FULL, shape.num_layers, shape.num_key_value_heads, shape.num_attention_heads)
    return of_plan(FULL_CACHE, "full", "all", kept)


def with_rival(name: str, family: str, ablation: str, plan: RetentionPlan, tokens: int) -> list[Contender]:
    """A plan, and the uniform plan that holds as much after `tokens` tokens, queries to choose by counted."""
    rival = f"uniform = {name}"
    return [
        of_plan(name, family, ablation, plan, rival),
        of_plan(rival, UNIFORM, ablation, uniform_at(plan, tokens, more=kept_query_slots(plan))),
    ]


def plan_contenders(config: Any, tokens: int, paths: Iterable[str | Path]) -> dict[str, Contender]:
    """The full cache and plans from files, each with its uniform rival; plans that hold the same share one.

    Raises `InputError` where a plan is for a model of another shape.
    """
    shape = Architecture.of_config(config)
    found, rivals = [full_cache(shape)], dict[int, str]()
    for path in paths:
        plan, name = RetentionPlan.load(path), Path(path).stem
        plan.require_shape(shape.num_layers, shape.num_key_value_heads, shape.num_attention_heads, path)
        held = plan.held(tokens) + kept_query_slots(plan)
        if held in rivals:
            found.append(of_plan(name, plan.policy, "plans", plan, rivals[held]))
        else:
            found += with_rival(name, plan.policy, "plans", plan, tokens)
            rivals[held] = found[-1].name
    return {contender.name: contender for contender in found}


class Field:
    """The contenders of the seed's ablations for one model; documents have `params.max_tokens` tokens."""

    def __init__(self, config: Any, params: AblationParams) -> None:
        self.shape, self.params = Architecture.of_config(config), params

    def uniform(self, sinks: int, window: int) -> RetentionPlan:
        shape = self.shape
        kept = Retention(sinks, window)
        return RetentionPlan.uniform(kept, shape.num_layers, shape.num_key_value_heads, shape.num_attention_heads)

    def window_size(self) -> list[Contender]:
        """Sinks + window of growing size."""
        found = []
        for size in self.params.sizes:
            found.append(of_plan(f"4 + {size - 4}", UNIFORM, "window_size", self.uniform(4, size - 4)))
        middle = self.params.sizes[len(self.params.sizes) // 2]
        found.append(
            Contender(f"fix_size_l2 {middle}", "fix_size_l2", "window_size", FixSizeL2Compressor(middle, 0.5), middle)
        )
        found.append(Contender("l2_compress 0.5", "l2_compress", "window_size", L2Compressor(0.5, middle), middle))
        return found

    def sink_importance(self) -> list[Contender]:
        """With and without sinks at equal bytes: window alone for every size, more and fewer sinks for one."""
        found = []
        for size in self.params.sizes:
            plan = self.uniform(0, size)
            found.append(of_plan(f"0 + {size}", "window only", "sink_importance", plan, rival=f"4 + {size - 4}"))
        middle = self.params.sizes[len(self.params.sizes) // 2]
        for sinks in self.params.sink_counts:
            if sinks not in (0, 4):
                name, plan = f"{sinks} + {middle - sinks}", self.uniform(sinks, middle - sinks)
                rival = f"4 + {middle - 4}"
                found.append(of_plan(name, "other sink counts", "sink_importance", plan, rival))
        return found

    def head_aware(self, classifications: str | Path) -> list[Contender]:
        """The class table and its variants, each with its rival, and the controls of the table."""
        heads = self.shape.num_key_value_heads
        file = load_classifications(classifications)
        table = class_table_plan(file, heads)
        found = []
        for name, windows in (("class table", {}), ("class table, wide", WIDE), ("class table, bold", BOLD)):
            plan = class_table_plan(file, heads, windows)
            found += with_rival(name, "class table", "head_aware", plan, self.params.max_tokens)
        rival = found[1].name
        for seed in range(self.params.random_seeds):
            found.append(of_plan(f"random {seed}", "random", "head_aware", shuffled(table, seed), rival))
        found.append(of_plan("inverted", "inverted", "head_aware", inverted(table), rival))
        per = per_layer(table, self.params.max_tokens)
        found.append(of_plan("per layer", "per layer", "head_aware", per, rival))
        return found


ABLATIONS = ("sink_importance", "window_size", "head_aware")


def contenders_for(
    ablations: Sequence[str], config: Any, params: AblationParams, classifications: str | Path | None = None
) -> dict[str, Contender]:
    """Contenders of the named ablations by name, the full cache first, rivals included, nothing twice."""
    field = Field(config, params)
    found = [full_cache(field.shape)]
    if "window_size" in ablations or "sink_importance" in ablations:
        found += field.window_size() if "window_size" in ablations else field.window_size()[: len(params.sizes)]
    if "sink_importance" in ablations:
        found += field.sink_importance()
    if "head_aware" in ablations:
        assert classifications is not None
        found += field.head_aware(classifications)
    return {contender.name: contender for contender in found}
