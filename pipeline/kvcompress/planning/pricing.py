"""Price of a division of slots among heads, and the best division, at one context length.

Two costs are weighed. Text: the expected divergence from the full cache, nats a token, summed over heads. Facts: the
probability that a token of the answer to a far question is still right. A fact at distance d loses what every head
whose cache ends before d carried of it,

    success = mean over facts and distances of exp(- sum over heads that do not reach d of what they carried)

so that half a retrieval circuit is worth little and the whole circuit much. A division minimises
text - balance * success.

A head uses its slots in one of several ways: a window, or a window and keys that a score selected, one way for every
measured score and part. Each way has a price on text, and a part of the facts that is lost: for a window the share of
distances beyond it, for selected keys the measured loss. With a weight mu on facts,

    cost(head, slots) = min over ways of text + mu * facts lost

and the slots are spent on these costs (`knapsack`), for several mu, each with several numbers of heads that stay full:
those that carry most of the facts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvcompress.core.errors import InputError
from kvcompress.core.retention import Retention
from kvcompress.planning.knapsack import Piece, pieces, spend
from kvcompress.scores.registry import make_score
from kvcompress.sensitivity.prices import Sensitivity, selected_count

DISTANCES = 64  # at which a fact is looked for, evenly over the context
WEIGHTS = (0.0, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # of facts, in units of the balance
NEVER = 1e9  # nats: price at sizes for which a way was not measured
WINDOW = 0  # index of the way that holds a window alone


@dataclass(frozen=True)
class Way:
    """Use of a head's slots; the score is empty and the part 0 for a window alone.

    text: nats a token, `[size, head]`. facts: mean loss over facts and distances, `[size, head]`. lost: loss of every
    fact at any distance, `[fact, size, head]`; None for a window, which loses facts beyond it and no others.
    """

    score: str
    part: float
    text: np.ndarray
    facts: np.ndarray
    lost: np.ndarray | None = None


@dataclass
class Division:
    """Slots `held` and index of the way of every head, flat over layers, with the expected cost.

    retrieval_heads: number of heads that stay full for facts. text: nats a token. success: probability of a token of an
    answer.
    """

    held: np.ndarray
    ways: np.ndarray
    retrieval_heads: int
    text: float
    success: float


class Pricing:
    """Prices of a model's heads at one context length; heads are flat, layer by layer.

    There is only the way of windows if no select options were measured: for models with a sliding window, and for short
    documents.
    """

    def __init__(self, sensitivity: Sensitivity, context: int) -> None:
        sinks, windows = sensitivity.sinks, np.array(sensitivity.windows)
        fitting = windows + sinks < context
        if not fitting.any():
            raise InputError(f"no measured window is shorter than a context of {context} tokens")
        prices = sensitivity.prices().reshape(len(windows), -1)[fitting]
        self.context, self.heads = context, prices.shape[1]
        self.sizes = np.append(windows[fitting] + sinks, context)
        self.carried = sensitivity.retrieval.reshape(len(sensitivity.retrieval), -1)  # [fact, head]
        self.by_retrieval = np.argsort(-self.carried.mean(0), kind="stable")
        beyond = self.carried.clip(0).mean(0) * (1 - self.sizes[:, None] / context)
        self.ways = [Way("", 0.0, np.vstack([prices, np.zeros(self.heads)]), beyond)]
        self.ways += select_ways(sensitivity, self.sizes, context)
        self._offers: dict[tuple[float, tuple[int, ...]], list[Piece]] = {}

    def offers(self, weight: float, allowed: tuple[int, ...]) -> list[Piece]:
        """Pieces of the costs with this weight on facts, in the best of the `allowed` ways at every size."""
        if (weight, allowed) not in self._offers:
            costs = np.min([self.ways[way].text + weight * self.ways[way].facts for way in allowed], axis=0)
            self._offers[weight, allowed] = pieces(self.sizes, costs)
        return self._offers[weight, allowed]

    def divide(self, slots: int, full: int, weight: float = 0.0, allowed: Sequence[int] = (WINDOW,)) -> Division:
        """Division with the `full` heads that carry most held whole, and the others in the best of the `allowed` ways.

        Raises ValueError if the slots do not suffice.
        """
        whole = [int(head) for head in self.by_retrieval[:full]]
        least = min(int(self.sizes[0]), slots // self.heads)
        held = spend(self.offers(weight, tuple(allowed)), self.heads, least, self.context, slots, whole)
        text = interpolated(self.sizes, np.stack([self.ways[way].text for way in allowed]), held)
        facts = interpolated(self.sizes, np.stack([self.ways[way].facts for way in allowed]), held)
        return self.expected(held, np.array(allowed)[np.argmin(text + weight * facts, axis=0)], full)

    def expected(self, held: np.ndarray, ways: np.ndarray, full: int) -> Division:
        """Division with its expected text and success; `full` heads are full for facts."""
        text = interpolated(self.sizes, np.stack([way.text for way in self.ways]), held)  # [way, head]
        return Division(held, ways, full, float(text[ways, np.arange(self.heads)].sum()), self.success(held, ways))

    def success(self, held: np.ndarray, ways: np.ndarray) -> float:
        """Expected probability that a token of an answer is still right."""
        distance = (np.arange(DISTANCES) + 0.5) / DISTANCES * self.context
        gone = np.zeros((len(self.carried), DISTANCES))
        for i, way in enumerate(self.ways):
            of = np.flatnonzero(ways == i)
            if way.lost is None:
                gone += self.carried[:, of] @ (held[of, None] < distance)
            else:
                gone += interpolated(self.sizes, way.lost[..., of], held[of]).sum(1, keepdims=True)
        return float(np.exp(-gone.clip(0)).mean())

    def best(
        self,
        slots: int,
        balance: float,
        allowed: Sequence[int] = (WINDOW,),
        weights: Sequence[float] = WEIGHTS[:1],
    ) -> Division:
        """Best division over numbers of full heads and weights of facts (in units of the balance)."""
        found = []
        for weight in weights if balance else WEIGHTS[:1]:
            for full in full_head_counts(self.heads):
                try:
                    found.append(self.divide(slots, full, weight * balance, allowed))
                except ValueError:  # more full heads than slots
                    break
        return min(found, key=lambda one: one.text - balance * one.success)

    def least(self, held: np.ndarray, ways: np.ndarray) -> np.ndarray:
        """Slots below which a head's way was not measured, at most `held`, `[head]`."""
        smallest = np.array([self.sizes[np.argmax((way.text < NEVER).all(1))] for way in self.ways])
        return np.minimum(smallest[ways], held)

    def menus(self) -> list[tuple[int, ...]]:
        """Sets of ways to allow: all, those whose scores keep no queries, windows alone."""
        free = [i for i, way in enumerate(self.ways) if not way.part or not make_score(way.score).needs_queries]
        return list(dict.fromkeys((tuple(range(len(self.ways))), tuple(free), (WINDOW,))))

    def retention(self, kept: Retention, way: int) -> Retention:
        """Retention that uses the slots of `kept`, sinks and a window, in this way."""
        found = self.ways[way]
        if not found.part or kept.unbounded:
            return kept
        chosen = selected_count(kept.window, found.part)
        return Retention(kept.sinks, kept.window - chosen, chosen, found.score) if chosen else kept


def select_ways(sensitivity: Sensitivity, sizes: np.ndarray, context: int) -> list[Way]:
    """Ways of the select options that were measured below `context` tokens, at `sizes` slots."""
    heads = sensitivity.layers * sensitivity.kv_heads
    prices = sensitivity.option_prices().reshape(-1, heads)
    lost = sensitivity.lost.reshape(*sensitivity.lost.shape[:2], heads)
    found = []
    for (score, part), options in sensitivity.option_groups().items():
        of = [i for i in options if sensitivity.choices[i].size + sensitivity.sinks < context]
        if of:
            measured = np.array([*(sensitivity.choices[i].size + sensitivity.sinks for i in of), context])
            text = along(sizes, measured, np.vstack([prices[of], np.zeros(heads)]))
            text[sizes < measured[0]] = NEVER
            curves = np.concatenate([lost[:, of], np.zeros((len(lost), 1, heads))], 1)
            every = np.stack([along(sizes, measured, curve) for curve in curves])
            found.append(Way(score, part, text, every.clip(0).mean(0), every))
    return found


def full_head_counts(heads: int) -> list[int]:
    """Numbers of full heads to try: all up to 32, then in steps of 3 %."""
    return [count for count in range(heads + 1) if count <= 32 or not count % (count // 16)]


def along(sizes: np.ndarray, measured: np.ndarray, curves: np.ndarray) -> np.ndarray:
    """Curves `[measured size, head]` at other sizes, `[size, head]`, linear between points."""
    return np.stack([np.interp(sizes, measured, curve) for curve in curves.T], 1)


def interpolated(sizes: np.ndarray, curves: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Curve of every head, `[.., size, head]`, at its own slots, `[.., head]`."""
    low = (np.searchsorted(sizes, held, side="right") - 1).clip(0, len(sizes) - 2)
    part = ((held - sizes[low]) / (sizes[low + 1] - sizes[low])).clip(0, 1)
    heads = np.arange(len(held))
    return np.asarray(curves[..., low, heads] * (1 - part) + curves[..., low + 1, heads] * part)
