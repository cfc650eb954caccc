"""What a KV head may keep: the one word that analysis, cache and reports all speak.

The definition (everything else must agree with it): with `sinks` s and `window` w, the query at position p sees the
keys {0 ... s-1} and {p-w+1 ... p}, its own key included. Positions are those of the full sequence and are never
renumbered. A window of -1 has no bound; a pruned head sees nothing, holds nothing and contributes exactly zero.

A head with `chosen` k > 0 (strategy `select`) sees k older keys besides, those that the score ranks highest. Which ones
depends on the text, so positions alone cannot say it: `positions` and `sees` are the part that is certain, the cache
records the rest (`kvcompress.scores.selection_rule`). Until s + w + k tokens were seen such a head sees all of them.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from kvcompress.core.errors import InputError

Strategy = Literal["sink_window", "window_only", "full", "prune", "select"]
STRATEGIES: tuple[Strategy, ...] = ("sink_window", "window_only", "full", "prune", "select")
# "none" is the published classifications' word for "not decided: keep all", "snapkv" theirs for select with that score.
ALIASES: dict[str, Strategy] = {"none": "full", "snapkv": "select"}
ALIAS_SCORE = "snapkv"  # what an alias of select ranks by where no score is named
UNBOUNDED = -1


class Retention(NamedTuple):
    """Numbers of sinks, of recent and of chosen keys that one KV head keeps.

    Window -1 is unbounded, window 0 is pruned. `score` names what ranks the `chosen` keys (`kvcompress.scores`); it is
    empty where none is chosen.
    """

    sinks: int
    window: int
    chosen: int = 0
    score: str = ""

    @property
    def unbounded(self) -> bool:
        return self.window == UNBOUNDED

    @property
    def pruned(self) -> bool:
        return self.window == 0

    @property
    def capacity(self) -> int | None:
        """Most slots this head ever holds; None where it grows with the text."""
        return None if self.unbounded else 0 if self.pruned else self.sinks + self.window + self.chosen

    def held(self, seen: int) -> int:
        """Slots held after `seen` tokens."""
        capacity = self.capacity
        return seen if capacity is None else min(seen, capacity)

    def positions(self, seen: int) -> list[int]:
        """Positions surely held after `seen` tokens, in order: what the next query finds before its own key is added.

        Of a head that selects these are sinks and window, and all while it has slots for all.
        """
        if self.unbounded:
            return list(range(seen))
        if self.pruned:
            return []
        recent = 0 if self.chosen and self.held(seen) == seen else max(seen - self.window, 0)
        return [*range(min(self.sinks, recent)), *range(recent, seen)]

    def sees(self, query: int, key: int) -> bool:
        """Whether the query at position `query` attends to the key at position `key`, chosen keys left aside."""
        if key > query or self.pruned:
            return False
        if self.chosen and self.held(query + 1) == query + 1:
            return True
        return self.unbounded or key < self.sinks or key > query - self.window


def require_possible(layers: Iterable[Iterable[Retention]]) -> None:
    """Raise `InputError` that names the first head whose numbers mean nothing."""
    for i, layer in enumerate(layers):
        for j, kept in enumerate(layer):
            if kept.sinks < 0 or kept.window < UNBOUNDED or (kept.pruned and kept.sinks):
                raise InputError(
                    f"layer {i}, head {j}: {kept.sinks} sinks and a window of {kept.window} mean nothing; expected sinks "
                    "of at least 0 and a window of at least 1, -1 for no bound, or 0 with no sinks for a pruned head"
                )
            if kept.chosen < 0 or (kept.chosen and kept.window < 1) or (kept.chosen > 0) != bool(kept.score):
                raise InputError(
                    f"layer {i}, head {j}: {kept.chosen} chosen keys by score {kept.score!r} beside a window of "
                    f"{kept.window} mean nothing; expected at least 1 with a score and a window of at least 1, or 0 with "
                    "none"
                )


FULL = Retention(0, UNBOUNDED)
PRUNED = Retention(0, 0)


@dataclass(frozen=True)
class HeadCompressionConfig:
    """The seed's form of the same: strategy, sinks and window of one head.

    `head_idx` counts query heads in a classification and KV heads in a plan. `sink_window` keeps `sink_size` first and
    `window_size` last keys, `window_only` drops the sinks, `full` keeps all, `prune` nothing; `select` keeps, beside
    sinks and window, the `select_size` older keys that `score` ranks highest (the published word `snapkv` is `select`
    with that score). A `window_size` of -1 has no bound. Raises `InputError` for an unknown strategy, a negative sink
    size, a window that is neither -1 nor at least 1, or a selection without a score or under another strategy.
    """

    layer_idx: int
    head_idx: int
    strategy: str = "full"
    keep_sinks: bool = True
    sink_size: int = 4
    window_size: int = 8
    select_size: int = 0
    score: str = ""

    def __post_init__(self) -> None:
        where = f"layer {self.layer_idx}, head {self.head_idx}"
        if self.strategy in ALIASES:
            named = ALIASES[self.strategy]
            if named == "select" and not self.score:
                object.__setattr__(self, "score", ALIAS_SCORE)
            object.__setattr__(self, "strategy", named)
        if self.strategy not in STRATEGIES:
            raise InputError(f"{where}: unknown strategy {self.strategy!r}, expected one of {', '.join(STRATEGIES)}")
        if self.layer_idx < 0 or self.head_idx < 0:
            raise InputError(f"{where}: layer and head are counted from 0")
        if self.sink_size < 0:
            raise InputError(f"{where}: sink_size is {self.sink_size}, expected 0 or more")
        bounded = self.strategy in ("sink_window", "window_only", "select")
        if bounded and self.window_size != UNBOUNDED and self.window_size < 1:
            raise InputError(f"{where}: window_size is {self.window_size}, expected at least 1, or -1 for no bound")
        if self.strategy != "select" and (self.select_size or self.score):
            raise InputError(
                f"{where}: select_size {self.select_size} and score {self.score!r} belong to strategy 'select', found"
                f" {self.strategy!r}"
            )
        if self.select_size < 0 or (self.select_size and not self.score):
            raise InputError(
                f"{where}: select_size is {self.select_size} with score {self.score!r}, expected 0 or more, and a score"
                " for more than 0"
            )

    @property
    def retention(self) -> Retention:
        if self.strategy == "prune":
            return PRUNED
        if self.strategy == "full" or self.window_size == UNBOUNDED:
            return FULL
        sinks = self.sink_size if self.strategy != "window_only" and self.keep_sinks else 0
        return Retention(sinks, self.window_size, self.select_size, self.score if self.select_size else "")

    @classmethod
    def of(cls, layer: int, head: int, kept: Retention) -> "HeadCompressionConfig":
        """The config that says the same as a `Retention`."""
        if kept.pruned:
            return cls(layer, head, "prune", False, 0, 0)
        if kept.unbounded:
            return cls(layer, head, "full", False, 0, UNBOUNDED)
        if kept.chosen:
            return cls(layer, head, "select", kept.sinks > 0, *kept)
        return cls(layer, head, "sink_window" if kept.sinks else "window_only", kept.sinks > 0, kept.sinks, kept.window)


def union(wishes: Sequence[Retention]) -> Retention:
    """The least that contains every wish: the largest window and selection, sinks if any query head wants them.

    Raises `InputError` where wishes select by different scores: no one choice contains both.
    """
    if any(kept.unbounded for kept in wishes):
        return FULL
    most = max(kept.chosen for kept in wishes)
    sinks, window = max(kept.sinks for kept in wishes), max(kept.window for kept in wishes)
    return Retention(sinks, window, most, _one_score(wishes) if most else "")


def intersection(wishes: Sequence[Retention]) -> Retention:
    """The most that every wish allows: the smallest window and selection, sinks only if all want them.

    Pruned if any is. Raises `InputError` where all select, by different scores.
    """
    if any(kept.pruned for kept in wishes):
        return PRUNED
    bounded = [kept for kept in wishes if not kept.unbounded]
    if not bounded:
        return FULL
    least = min(kept.chosen for kept in bounded)
    sinks, window = min(kept.sinks for kept in bounded), min(kept.window for kept in bounded)
    return Retention(sinks, window, least, _one_score(bounded) if least else "")


def _one_score(wishes: Sequence[Retention]) -> str:
    scores = sorted({kept.score for kept in wishes if kept.chosen})
    if len(scores) > 1:
        raise InputError(f"query heads of one KV head select by {' and '.join(scores)}, expected one score")
    return scores[0]


JOINS: dict[str, Callable[[Sequence[Retention]], Retention]] = {"union": union, "intersection": intersection}


def join_query_heads(wishes: Sequence[Retention], kv_heads: int, rule: str = "union") -> list[Retention]:
    """One layer's query-head wishes -> its KV heads' retention, `len(wishes) / kv_heads` query heads to each."""
    if rule not in JOINS:
        raise InputError(f"unknown rule {rule!r} for joining query heads, expected one of {', '.join(JOINS)}")
    if kv_heads < 1 or len(wishes) % kv_heads:
        raise InputError(f"{len(wishes)} query heads cannot be shared by {kv_heads} KV heads")
    group = len(wishes) // kv_heads
    return [JOINS[rule](wishes[head * group : (head + 1) * group]) for head in range(kv_heads)]


def require_each_once(found: Iterable[tuple[int, int]], wanted: set[tuple[int, int]], what: str) -> None:
    """Raise ValueError unless `found` is `wanted`, each (layer, head) once; names the first that is off."""
    rest = set(wanted)
    for layer, head in found:
        if (layer, head) not in wanted:
            raise ValueError(f"{what} {head} of layer {layer} does not exist in this model")
        if (layer, head) not in rest:
            raise ValueError(f"{what} {head} of layer {layer} stands there twice")
        rest.discard((layer, head))
    if rest:
        layer, head = min(rest)
        raise ValueError(
            f"{what} {head} of layer {layer} is missing" + (f" (and {len(rest) - 1} more)" if rest else "")
        )
