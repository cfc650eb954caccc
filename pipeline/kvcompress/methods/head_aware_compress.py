"""Head-aware compression: every KV head keeps what its own query heads need.

Retentions come from a classification (one for each query head) or from a plan (one for each KV head), or are the same
for all heads. Under grouped-query attention a KV head serves several query heads, whose retentions are joined: by default
to the smallest that contains them all.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers.cache_utils import Cache

from kvcompress.cache.ragged_cache import RaggedCache
from kvcompress.core.errors import InputError
from kvcompress.core.head_classes import load_classifications
from kvcompress.core.plan import RetentionPlan
from kvcompress.core.retention import FULL, JOINS, Retention, join_query_heads, without_alias
from kvcompress.methods.compressor import PlanCompressor
from kvcompress.models.architecture import Architecture
from kvcompress.scores.selection_rule import SelectionRule

__all__ = ["HeadAwareCompressor", "HeadCompressionConfig", "head_aware_compress"]


@dataclass(frozen=True)
class HeadCompressionConfig:
    """Strategy, sinks and window of one head, with the seed's field names; a view of `retention`.

    `head_idx` counts query heads in a classification and KV heads in a plan. `sink_window` keeps `sink_size` first and
    `window_size` last keys, `window_only` drops the sinks, `full` keeps all keys, `prune` none; `select` also keeps the
    `select_size` other keys that `score` ranks highest. A `window_size` of -1 is unbounded.
    Raises `InputError` for an unknown strategy or sizes that contradict it.
    """

    layer_idx: int
    head_idx: int
    strategy: str = "full"
    keep_sinks: bool = True
    sink_size: int = 4
    window_size: int = 8
    select_size: int = 0
    score: str = ""
    retention: Retention = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        where = f"layer {self.layer_idx}, head {self.head_idx}"
        if self.layer_idx < 0 or self.head_idx < 0:
            raise InputError(f"{where}: layer and head are counted from 0")
        strategy, score = without_alias(self.strategy, self.score)
        sinks = self.sink_size if self.keep_sinks else 0
        try:
            kept = Retention.from_row(strategy, sinks, self.window_size, self.select_size, score)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        for name, value in (("strategy", strategy), ("score", score), ("retention", kept)):
            object.__setattr__(self, name, value)


class HeadAwareCompressor(PlanCompressor):
    """Keep in every KV head what its retention says.

    Parameters
    ----------
    retention : `[layer][head]`
    query_heads : whether heads of `retention` are query heads, to be joined, or KV heads [default: True]
    join : rule for the query heads of one KV head, "union" or "intersection" [default: "union"]
    skip_layers : layers that stay full [default: none]
    made_for : number of query heads of the model that retentions of KV heads were made for [default: any]
    selection_rule : options of heads that select: interval of selections, number of last queries, scores

    Raises `InputError` for layers of unequal width, impossible numbers, an unknown rule or an unknown score.
    """

    def __init__(
        self,
        retention: Sequence[Sequence[Retention]],
        query_heads: bool = True,
        join: str = "union",
        skip_layers: Iterable[int] = (),
        made_for: int | None = None,
        selection_rule: SelectionRule | None = None,
    ) -> None:
        super().__init__(skip_layers)
        self.selection_rule = selection_rule or SelectionRule()
        if not retention or len({len(layer) for layer in retention}) != 1:
            raise InputError("a compressor needs at least one layer, and the same number of heads in every layer")
        if join not in JOINS:
            raise InputError(f"unknown rule {join!r} for joining query heads, expected one of {', '.join(JOINS)}")
        self.retention = tuple(tuple(layer) for layer in retention)
        self.query_heads, self.join, self.made_for = query_heads, join, made_for
        for name in self.scores:
            self.selection_rule.score(name)

    @classmethod
    def from_classifications(
        cls,
        path: str | Path,
        join: str = "union",
        skip_layers: Iterable[int] = (),
        selection_rule: SelectionRule | None = None,
    ) -> "HeadAwareCompressor":
        """Read a classification file of this project or of the published study. Raises `InputError`."""
        retention = [[head.retention for head in layer] for layer in load_classifications(path).layers]
        return cls(retention, join=join, skip_layers=skip_layers, selection_rule=selection_rule)

    @classmethod
    def from_plan(
        cls,
        plan: str | Path | RetentionPlan,
        skip_layers: Iterable[int] = (),
        selection_rule: SelectionRule | None = None,
    ) -> "HeadAwareCompressor":
        """Take a retention plan or its file. Raises `InputError`."""
        plan = plan if isinstance(plan, RetentionPlan) else RetentionPlan.load(plan)
        return cls(
            plan.layers,
            query_heads=False,
            skip_layers=skip_layers,
            made_for=plan.num_attention_heads,
            selection_rule=selection_rule,
        )

    @classmethod
    def from_model_config(
        cls,
        config: Any,
        default_strategy: str = "sink_window",
        sink_size: int = 4,
        window_size: int = 8,
        skip_layers: Iterable[int] = (),
        select_size: int = 0,
        score: str = "",
        selection_rule: SelectionRule | None = None,
    ) -> "HeadAwareCompressor":
        """Use the same strategy for every head of the model. Raises `InputError` for an unknown one or a bad size."""
        shape = Architecture.of_config(config)
        head = Retention.from_row(default_strategy, sink_size, window_size, select_size, score)
        retention = [[head] * shape.num_key_value_heads] * shape.num_layers
        return cls(retention, query_heads=False, skip_layers=skip_layers, selection_rule=selection_rule)

    @property
    def scores(self) -> set[str]:
        return {head.score for layer in self.retention for head in layer if head.chosen}

    def plan_for(self, architecture: Architecture) -> Sequence[Sequence[Retention]]:
        if len(self.retention) != architecture.num_layers:
            raise InputError(f"this compressor is made for {len(self.retention)} layers, not {architecture.num_layers}")
        width, kv_heads = len(self.retention[0]), architecture.num_key_value_heads
        made_for = width if self.query_heads else self.made_for
        if not self.query_heads and width != kv_heads:
            raise InputError(f"this compressor is made for {width} KV heads a layer, not {kv_heads}")
        # 0 query heads: read from a cache, which does not reveal them.
        if made_for and architecture.num_attention_heads not in (0, made_for):
            raise InputError(
                f"this compressor is made for {made_for} query heads a layer, not {architecture.num_attention_heads}"
            )
        return (
            [join_query_heads(layer, kv_heads, self.join) for layer in self.retention]
            if self.query_heads
            else self.retention
        )

    def get_compression_summary(self) -> dict[str, Any]:
        """Return counts over all heads (query or KV heads, see `heads_are`); skipped layers count as full.

        `mean_bounded_slots` is the mean of sinks + window + selected keys over the bounded heads, None without any.
        `chosen_keys` (selected keys in all) and `scores` (heads by score) are present only if heads select.
        """
        heads = [FULL if i in self.skip_layers else head for i, layer in enumerate(self.retention) for head in layer]
        strategies = Counter(head.strategy for head in heads)
        slots = [head.capacity for head in heads if head.capacity]
        scores = Counter(head.score for head in heads if head.chosen)
        selecting = {"chosen_keys": sum(head.chosen for head in heads), "scores": dict(sorted(scores.items()))}
        return {
            "num_layers": len(self.retention),
            "heads_per_layer": len(self.retention[0]),
            "heads_are": "query heads" if self.query_heads else "KV heads",
            "total_heads": len(heads),
            "strategies": dict(sorted(strategies.items())),
            "compressible_heads": sum(not head.unbounded for head in heads),
            "heads_with_sinks": sum(head.sinks > 0 for head in heads),
            "mean_bounded_slots": sum(slots) / len(slots) if slots else None,
            "skip_layers": sorted(self.skip_layers),
            **(selecting if scores else {}),
        }


@lru_cache(maxsize=8)  # a generation loop passes the same path at every token
def _of_classifications(path: str, modified: int, skip_layers: tuple[int, ...]) -> HeadAwareCompressor:
    return HeadAwareCompressor.from_classifications(path, skip_layers=skip_layers)


def head_aware_compress(
    past_key_values: Cache,
    classifications_path: str | Path | None = None,
    compressor: HeadAwareCompressor | None = None,
    num_layers: int = 32,
    num_heads: int = 32,
    default_sink_size: int = 4,
    default_window_size: int = 8,
    skip_layers: Sequence[int] = (),
) -> RaggedCache:
    """Compress a cache by `compressor`, else by a classification file, else uniformly.

    `num_layers` and `num_heads` (query heads a layer) matter only in the last case; with `compressor` all other
    arguments are ignored. A model inside `attached` can read the result. Raises `InputError` and `CacheUseError`.
    """
    if compressor is None and classifications_path is not None:
        modified = Path(classifications_path).stat().st_mtime_ns if Path(classifications_path).is_file() else 0
        compressor = _of_classifications(str(classifications_path), modified, tuple(skip_layers))
    if compressor is None:
        uniform = Retention.from_row("sink_window", default_sink_size, default_window_size)
        compressor = HeadAwareCompressor([[uniform] * num_heads] * num_layers, skip_layers=skip_layers)
    return compressor.compress(past_key_values)
