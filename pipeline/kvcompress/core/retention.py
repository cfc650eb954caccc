"""Retention: the keys that one KV head may keep. The shared definition of analysis, cache and reports.

With `sinks` s and `window` w, the query at position p sees the keys {0 ... s-1} and {p-w+1 ... p}, its own key
included. Positions are those of the full sequence and are never renumbered. A window of -1 is unbounded; a pruned head
sees nothing, holds nothing and contributes exactly zero.

A head with `chosen` k > 0 (strategy `select`) also sees the k older keys that its score ranks highest. They depend on
the text, so `positions` and `sees` cover sinks and window only, and the cache records the chosen keys. Until s + w + k
tokens were seen, such a head sees all of them.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

from kvcompress.core.errors import InputError

Strategy = Literal["sink_window", "window_only", "full", "prune", "select"]
STRATEGIES: tuple[Strategy, ...] = ("sink_window", "window_only", "full", "prune", "select")
# Words of the published classification files: "none" means full, "snapkv" means select with that score.
ALIASES: dict[str, Strategy] = {"none": "full", "snapkv": "select"}
ALIAS_SCORE = "snapkv"  # score of an alias of select that names none
UNBOUNDED = -1


def without_alias(strategy: str, score: str) -> tuple[str, str]:
    """Translate a strategy of the published files; others are returned as they are."""
    if strategy not in ALIASES:
        return strategy, score
    return ALIASES[strategy], score or (ALIAS_SCORE if ALIASES[strategy] == "select" else "")


class _Fields(NamedTuple):
    sinks: int
    window: int
    chosen: int = 0
    score: str = ""


class Retention(_Fields):
    """Keys that one KV head keeps.

    Parameters
    ----------
    sinks: number of first keys.
    window: number of most recent keys; -1 is unbounded, 0 is pruned.
    chosen: number of other keys, chosen by `score` [default: 0].
    score: name of the score that ranks them (`kvcompress.scores`); empty without chosen keys [default: ""].

    Raises `InputError` for numbers that contradict each other.
    """

    __slots__ = ()

    def __new__(cls, sinks: int, window: int, chosen: int = 0, score: str = "") -> "Retention":
        self = super().__new__(cls, sinks, window, chosen, score)
        if self.sinks < 0 or self.window < UNBOUNDED or (self.pruned and self.sinks):
            raise InputError(
                f"invalid retention: {self.sinks} sinks with window {self.window}; sinks must be at least 0, the window"
                " at least 1, -1 (unbounded), or 0 without sinks (pruned)"
            )
        if self.chosen < 0 or (self.chosen and self.window < 1) or (self.chosen > 0) != bool(self.score):
            raise InputError(
                f"invalid retention: {self.chosen} chosen keys by score {self.score!r} with window {self.window};"
                " expected none without a score, or at least 1 with a score and a window of at least 1"
            )
        return self

    @classmethod
    def from_row(
        cls, strategy: str, sink_size: int, window_size: int, select_size: int = 0, score: str = ""
    ) -> "Retention":
        """Read the fields of a plan or classification file.

        `window_only` ignores `sink_size`; `full` and `prune` ignore both sizes; a window of -1 is full whatever the
        strategy. Raises `InputError` for an unknown strategy or for sizes that contradict it.
        """
        strategy, score = without_alias(strategy, score)
        if strategy not in STRATEGIES:
            raise InputError(f"unknown strategy {strategy!r}, expected one of {', '.join(STRATEGIES)}")
        if sink_size < 0:
            raise InputError(f"sink_size is {sink_size}, expected 0 or more")
        if strategy != "select" and (select_size or score):
            raise InputError(
                f"select_size {select_size} and score {score!r} belong to strategy 'select', found {strategy!r}"
            )
        if select_size < 0 or (select_size and not score):
            raise InputError(
                f"select_size is {select_size} with score {score!r}, expected 0, or 1 or more with a score"
            )
        if strategy == "prune":
            return PRUNED
        if strategy == "full" or window_size == UNBOUNDED:
            return FULL
        if window_size < 1:
            raise InputError(f"window_size is {window_size}, expected at least 1, or -1 for no bound")
        sinks = 0 if strategy == "window_only" else sink_size
        return cls(sinks, window_size, select_size, score if select_size else "")

    def to_row(self) -> dict[str, Any]:
        """Return the fields of a plan file; `select_size` and `score` only if keys are chosen."""
        row = {"strategy": self.strategy, "sink_size": 0 if self.unbounded else self.sinks, "window_size": self.window}
        return row | ({"select_size": self.chosen, "score": self.score} if self.chosen else {})

    @property
    def strategy(self) -> Strategy:
        if self.pruned:
            return "prune"
        if self.unbounded:
            return "full"
        return "select" if self.chosen else "sink_window" if self.sinks else "window_only"

    @property
    def unbounded(self) -> bool:
        return self.window == UNBOUNDED

    @property
    def pruned(self) -> bool:
        return self.window == 0

    @property
    def capacity(self) -> int | None:
        """Largest number of slots that this head ever holds; None if it grows with the text."""
        return None if self.unbounded else 0 if self.pruned else self.sinks + self.window + self.chosen

    def held(self, seen: int) -> int:
        """Slots held after `seen` tokens."""
        capacity = self.capacity
        return seen if capacity is None else min(seen, capacity)

    def positions(self, seen: int) -> list[int]:
        """Positions held after `seen` tokens, in order, without chosen keys.

        The next query finds these before its own key is added. For a head that selects they are sinks and window, or
        all positions as long as it has slots for all.
        """
        if self.unbounded:
            return list(range(seen))
        if self.pruned:
            return []
        recent = 0 if self.chosen and self.held(seen) == seen else max(seen - self.window, 0)
        return [*range(min(self.sinks, recent)), *range(recent, seen)]

    def sees(self, query: int, key: int) -> bool:
        """True if the query at position `query` attends to the key at position `key`, without chosen keys."""
        if key > query or self.pruned:
            return False
        if self.chosen and self.held(query + 1) == query + 1:
            return True
        return self.unbounded or key < self.sinks or key > query - self.window


FULL = Retention(0, UNBOUNDED)
PRUNED = Retention(0, 0)


def union(heads: Sequence[Retention]) -> Retention:
    """Join query heads to the least that contains each: the largest sinks, window and selection.

    Raises `InputError` for heads that select by different scores, because no one selection contains both.
    """
    if any(kept.unbounded for kept in heads):
        return FULL
    most = max(kept.chosen for kept in heads)
    sinks, window = max(kept.sinks for kept in heads), max(kept.window for kept in heads)
    return Retention(sinks, window, most, _one_score(heads) if most else "")


def intersection(heads: Sequence[Retention]) -> Retention:
    """Join query heads to the most that each allows: the smallest sinks, window and selection; pruned if any is.

    Raises `InputError` if all select, by different scores.
    """
    if any(kept.pruned for kept in heads):
        return PRUNED
    bounded = [kept for kept in heads if not kept.unbounded]
    if not bounded:
        return FULL
    least = min(kept.chosen for kept in bounded)
    sinks, window = min(kept.sinks for kept in bounded), min(kept.window for kept in bounded)
    return Retention(sinks, window, least, _one_score(bounded) if least else "")


def _one_score(heads: Sequence[Retention]) -> str:
    scores = sorted({kept.score for kept in heads if kept.chosen})
    if len(scores) > 1:
        raise InputError(f"query heads of one KV head select by {' and '.join(scores)}, expected one score")
    return scores[0]


JOINS: dict[str, Callable[[Sequence[Retention]], Retention]] = {"union": union, "intersection": intersection}


def join_query_heads(heads: Sequence[Retention], kv_heads: int, rule: str = "union") -> list[Retention]:
    """Join one layer's query heads into `kv_heads` KV heads, each serving `len(heads) / kv_heads` neighbours."""
    if rule not in JOINS:
        raise InputError(f"unknown rule {rule!r} for joining query heads, expected one of {', '.join(JOINS)}")
    if kv_heads < 1 or len(heads) % kv_heads:
        raise InputError(f"{len(heads)} query heads cannot be shared by {kv_heads} KV heads")
    group = len(heads) // kv_heads
    return [JOINS[rule](heads[head * group : (head + 1) * group]) for head in range(kv_heads)]


def require_each_once(found: Iterable[tuple[int, int]], expected: set[tuple[int, int]], what: str) -> None:
    """Raise ValueError unless `found` is `expected`, each (layer, head) once; names the first that differs."""
    rest = set(expected)
    for layer, head in found:
        if (layer, head) not in expected:
            raise ValueError(f"{what} {head} of layer {layer} does not exist in this model")
        if (layer, head) not in rest:
            raise ValueError(f"{what} {head} of layer {layer} occurs twice")
        rest.discard((layer, head))
    if rest:
        layer, head = min(rest)
        others = f" (and {len(rest) - 1} more)" if len(rest) > 1 else ""
        raise ValueError(f"{what} {head} of layer {layer} is missing{others}")
