"""What a KV head may keep: the one word that analysis, cache and reports all speak.

The definition (everything else must agree with it): with `sinks` s and `window` w, the query at position p sees the
keys {0 ... s-1} and {p-w+1 ... p}, its own key included. Positions are those of the full sequence and are never
renumbered. A window of -1 has no bound; a pruned head sees nothing, holds nothing and contributes exactly zero.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from kvcompress.errors import InputError

Strategy = Literal["sink_window", "window_only", "full", "prune"]
STRATEGIES: tuple[Strategy, ...] = ("sink_window", "window_only", "full", "prune")
ALIASES: dict[str, Strategy] = {"none": "full"}  # the published classifications' word for "not decided: keep all"
UNBOUNDED = -1


class Retention(NamedTuple):
    """Numbers of sinks and of recent keys that one KV head keeps; window -1 is unbounded, window 0 is pruned."""

    sinks: int
    window: int

    @property
    def unbounded(self) -> bool:
        return self.window == UNBOUNDED

    @property
    def pruned(self) -> bool:
        return self.window == 0

    @property
    def capacity(self) -> int | None:
        """Most slots this head ever holds; None where it grows with the text."""
        return None if self.unbounded else 0 if self.pruned else self.sinks + self.window

    def held(self, seen: int) -> int:
        """Slots held after `seen` tokens."""
        capacity = self.capacity
        return seen if capacity is None else min(seen, capacity)

    def positions(self, seen: int) -> list[int]:
        """Positions held after `seen` tokens, in order: what the next query finds before its own key is added."""
        if self.unbounded:
            return list(range(seen))
        if self.pruned:
            return []
        recent = max(seen - self.window, 0)
        return [*range(min(self.sinks, recent)), *range(recent, seen)]

    def sees(self, query: int, key: int) -> bool:
        """Whether the query at position `query` attends to the key at position `key`."""
        if key > query or self.pruned:
            return False
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


FULL = Retention(0, UNBOUNDED)
PRUNED = Retention(0, 0)


@dataclass(frozen=True)
class HeadCompressionConfig:
    """The seed's form of the same: strategy, sinks and window of one head.

    `head_idx` counts query heads in a classification and KV heads in a plan. `sink_window` keeps `sink_size` first and
    `window_size` last keys, `window_only` drops the sinks, `full` keeps all, `prune` nothing. A `window_size` of -1 has
    no bound. Raises `InputError` for an unknown strategy, a negative sink size or a window that is neither -1 nor at
    least 1.
    """

    layer_idx: int
    head_idx: int
    strategy: str = "full"
    keep_sinks: bool = True
    sink_size: int = 4
    window_size: int = 8

    def __post_init__(self) -> None:
        where = f"layer {self.layer_idx}, head {self.head_idx}"
        if self.strategy in ALIASES:
            object.__setattr__(self, "strategy", ALIASES[self.strategy])
        if self.strategy not in STRATEGIES:
            raise InputError(f"{where}: unknown strategy {self.strategy!r}, expected one of {', '.join(STRATEGIES)}")
        if self.layer_idx < 0 or self.head_idx < 0:
            raise InputError(f"{where}: layer and head are counted from 0")
        if self.sink_size < 0:
            raise InputError(f"{where}: sink_size is {self.sink_size}, expected 0 or more")
        bounded = self.strategy in ("sink_window", "window_only")
        if bounded and self.window_size != UNBOUNDED and self.window_size < 1:
            raise InputError(f"{where}: window_size is {self.window_size}, expected at least 1, or -1 for no bound")

    @property
    def retention(self) -> Retention:
        if self.strategy == "prune":
            return PRUNED
        if self.strategy == "full" or self.window_size == UNBOUNDED:
            return FULL
        sinks = self.sink_size if self.strategy == "sink_window" and self.keep_sinks else 0
        return Retention(sinks, self.window_size)

    @classmethod
    def of(cls, layer: int, head: int, kept: Retention) -> "HeadCompressionConfig":
        """The config that says the same as a `Retention`."""
        if kept.pruned:
            return cls(layer, head, "prune", False, 0, 0)
        if kept.unbounded:
            return cls(layer, head, "full", False, 0, UNBOUNDED)
        return cls(layer, head, "sink_window" if kept.sinks else "window_only", kept.sinks > 0, kept.sinks, kept.window)


def union(wishes: Sequence[Retention]) -> Retention:
    """The least that contains every wish: the largest window, sinks if any query head wants them."""
    if any(kept.unbounded for kept in wishes):
        return FULL
    return Retention(max(kept.sinks for kept in wishes), max(kept.window for kept in wishes))


def intersection(wishes: Sequence[Retention]) -> Retention:
    """The most that every wish allows: the smallest window, sinks only if all want them; pruned if any is."""
    if any(kept.pruned for kept in wishes):
        return PRUNED
    bounded = [kept for kept in wishes if not kept.unbounded]
    if not bounded:
        return FULL
    return Retention(min(kept.sinks for kept in bounded), min(kept.window for kept in bounded))


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
