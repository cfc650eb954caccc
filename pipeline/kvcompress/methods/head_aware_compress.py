"""Head-aware compression: every KV head keeps what its own query heads need.

The wishes come from a classification (one a query head), from a retention plan (one a KV head) or are the same for all.
Under grouped-query attention a KV head serves several query heads and their wishes are joined, by default to the least
that contains them all.
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
    """`wishes[layer][head]`: query heads where `query_heads`, else KV heads, which are used as they are.

    `made_for`: the number of query heads of the model that KV heads' wishes were made for, None for any.

    `join` names the rule for the query heads of one KV head ("union" or "intersection"). `skip_layers` stay full.
    `choosing` says how heads that select do it: how often, and by how many of the last queries.
    Raises `InputError` for layers of unequal width, an unknown rule or an unknown score.
    """

    def __init__(
        self,
        wishes: Sequence[Sequence[Retention]],
        query_heads: bool = True,
        join: str = "union",
        skip_layers: Iterable[int] = (),
        made_for: int | None = None,
        choosing: SelectionRule | None = None,
    ) -> None:
        super().__init__(skip_layers)
        self.choosing = choosing or SelectionRule()
        if not wishes or len({len(layer) for layer in wishes}) != 1:
            raise InputError("a compressor needs at least one layer, and the same number of heads in every layer")
        if join not in JOINS:
            raise InputError(f"unknown rule {join!r} for joining query heads, expected one of {', '.join(JOINS)}")
        self.wishes = tuple(tuple(layer) for layer in wishes)
        self.made_for = made_for
        self.query_heads, self.join = query_heads, join
        for name in self.scores():
            self.choosing.score(name)

    @classmethod
    def from_classifications(
        cls,
        path: str | Path,
        join: str = "union",
        skip_layers: Iterable[int] = (),
        choosing: SelectionRule | None = None,
    ) -> "HeadAwareCompressor":
        """From a classification file, as this project or the published study wrote it. Raises `InputError`."""
        rows = load_classifications(path).layers
        wishes = [[head.retention for head in layer] for layer in rows]
        return cls(wishes, join=join, skip_layers=skip_layers, choosing=choosing)

    @classmethod
    def from_plan(
        cls, plan: str | Path | RetentionPlan, skip_layers: Iterable[int] = (), choosing: SelectionRule | None = None
    ) -> "HeadAwareCompressor":
        """From a retention plan or its file. Raises `InputError`."""
        plan = plan if isinstance(plan, RetentionPlan) else RetentionPlan.load(plan)
        made_for = plan.num_attention_heads
        return cls(plan.layers, query_heads=False, skip_layers=skip_layers, made_for=made_for, choosing=choosing)

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
        choosing: SelectionRule | None = None,
    ) -> "HeadAwareCompressor":
        """The same for every head of the model. Raises `InputError` for an unknown strategy or a bad size."""
        shape = Architecture.of_config(config)
        sizes = sink_size, window_size, select_size
        kept = Retention.from_row(default_strategy, *sizes, score)
        wishes = [[kept] * shape.num_key_value_heads] * shape.num_layers
        return cls(wishes, query_heads=False, skip_layers=skip_layers, choosing=choosing)

    def scores(self) -> set[str]:
        return {kept.score for layer in self.wishes for kept in layer if kept.chosen}

    def kept(self, shape: Architecture) -> Sequence[Sequence[Retention]]:
        if len(self.wishes) != shape.num_layers:
            raise InputError(f"this compressor is made for {len(self.wishes)} layers, not {shape.num_layers}")
        width = len(self.wishes[0])
        if not self.query_heads:
            if width != shape.num_key_value_heads:
                raise InputError(
                    f"this compressor is made for {width} KV heads a layer, not {shape.num_key_value_heads}"
                )
            if self.made_for and shape.num_attention_heads not in (0, self.made_for):
                raise InputError(
                    f"this compressor is made for {self.made_for} query heads a layer, not {shape.num_attention_heads}"
                )
            return self.wishes
        if shape.num_attention_heads not in (0, width):
            raise InputError(
                f"this compressor is made for {width} query heads a layer, not {shape.num_attention_heads}"
            )
        return [join_query_heads(layer, shape.num_key_value_heads, self.join) for layer in self.wishes]

    def get_compression_summary(self) -> dict[str, Any]:
        """Counts over all heads (of `heads_are`), skipped layers counted as full.

        `mean_bounded_slots` is the mean of sinks + window + chosen keys over the heads with a bound, None without such a
        head. `chosen_keys` and `scores` stand there only where heads select: keys chosen in all, and heads by score.
        """
        heads = [FULL if i in self.skip_layers else kept for i, layer in enumerate(self.wishes) for kept in layer]
        strategies = Counter(kept.strategy for kept in heads)
        slots = [kept.capacity for kept in heads if kept.capacity]
        scores = Counter(kept.score for kept in heads if kept.chosen)
        selecting = {"chosen_keys": sum(kept.chosen for kept in heads), "scores": dict(sorted(scores.items()))}
        return {
            "num_layers": len(self.wishes),
            "heads_per_layer": len(self.wishes[0]),
            "heads_are": "query heads" if self.query_heads else "KV heads",
            "total_heads": len(heads),
            "strategies": dict(sorted(strategies.items())),
            "compressible_heads": sum(not kept.unbounded for kept in heads),
            "heads_with_sinks": sum(kept.sinks > 0 for kept in heads),
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
    """Compress a cache by a compressor, else by a classification file, else uniformly.

    `num_layers` and `num_heads` (query heads a layer) are needed only in the last case; `compressor` makes all others
    idle. The result is read by a model inside `attached`. Raises `InputError` and `CacheUseError` as `compress` does.
    """
    if compressor is None and classifications_path is not None:
        modified = Path(classifications_path).stat().st_mtime_ns if Path(classifications_path).is_file() else 0
        compressor = _of_classifications(str(classifications_path), modified, tuple(skip_layers))
    if compressor is None:
        uniform = Retention.from_row("sink_window", default_sink_size, default_window_size)
        compressor = HeadAwareCompressor([[uniform] * num_heads] * num_layers, skip_layers=skip_layers)
    return compressor.compress(past_key_values)
