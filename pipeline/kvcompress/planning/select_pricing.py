"""The policy `select`: how many slots a head gets, and whether some of them hold keys that a score chooses.

As in `pricing` two things are weighed, text against facts. Every head has several price curves, one for windows alone and
one for each score and part that were measured. What it would lose of the facts it carries is a second curve beside each:
of a window the share of distances beyond it, of chosen keys what was measured. With a weight mu on facts,

    cost(head, slots) = min over its curves of text + mu * facts lost

and budgets are spent on these costs (`spending`) for many mu, each with many numbers of heads that stay full. Taken is the
division with the best `text - balance * success`, the objective of `pricing`, which knows that facts need all their heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kvcompress.core.retention import Retention
from kvcompress.planning.knapsack import pieces, spend
from kvcompress.planning.pricing import DISTANCES, Priced, Pricing, numbers
from kvcompress.scores.registry import make_score
from kvcompress.sensitivity.prices import Sensitivity
from kvcompress.sensitivity.selection_outputs import chosen_of

WEIGHTS = (0.0, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # of facts, in units of the balance
NEVER = 1e9  # nats: of sizes for which a way was not measured


@dataclass(frozen=True)
class Way:
    """How a head's slots are used: `text` `[size, head]` nats a token, `lost` `[fact, size, head]` of what it carried.

    A window alone has the part 0; it loses all of a fact beyond it and nothing of a nearer one.
    """

    score: str
    part: float
    text: np.ndarray
    lost: np.ndarray


class ChoosingPricing:
    """Prices of windows and of chosen keys at one context length.

    Of windows alone where no choices were measured: for a model with a sliding window of its own, or short documents.
    """

    def __init__(self, sensitivity: Sensitivity, context: int) -> None:
        self.windows = Pricing(sensitivity, context)
        self.sinks, self.context, self.heads = sensitivity.sinks, context, self.windows.heads
        self.sizes, carried = self.windows.sizes, self.windows.carried
        everything = np.repeat(carried[:, None], len(self.sizes), 1)
        self.ways = [Way("", 0.0, self.windows.prices, everything)]
        prices = sensitivity.choice_prices().reshape(-1, self.heads)
        lost = sensitivity.lost.reshape(*sensitivity.lost.shape[:2], self.heads)
        for score, part in dict.fromkeys(choice[:2] for choice in sensitivity.choices):
            of = [i for i, choice in enumerate(sensitivity.choices) if choice[:2] == (score, part)]
            measured = np.array([sensitivity.choices[i].size for i in of]) + self.sinks
            of = [i for i, size in zip(of, measured, strict=True) if size < context]
            measured = np.append(measured[: len(of)], context)
            if of:
                text = along(self.sizes, measured, np.vstack([prices[of], np.zeros(self.heads)]))
                text[self.sizes < measured[0]] = NEVER
                ended = np.concatenate([lost[:, of], np.zeros((len(lost), 1, self.heads))], 1)
                self.ways.append(Way(score, part, text, np.stack([along(self.sizes, measured, one) for one in ended])))

    @cached_property
    def costs(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(text, facts lost on average) of every way, `[size, head]`."""
        windows = self.ways[0].lost.clip(0).mean(0) * (1 - self.sizes[:, None] / self.context)
        return [(self.ways[0].text, windows)] + [(way.text, way.lost.clip(0).mean(0)) for way in self.ways[1:]]

    def divide(self, slots: int, full: int, weight: float, allowed: Sequence[int]) -> Priced:
        """Slots for every head, `full` heads that carry most held whole, the others used in one of the `allowed` ways.

        Raises ValueError where it is too much.
        """
        whole = [int(head) for head in self.windows.by_retrieval[:full]]
        costs = np.min([text + weight * facts for text, facts in (self.costs[way] for way in allowed)], axis=0)
        least = min(int(self.sizes[0]), slots // self.heads)
        held = spend(pieces(self.sizes, costs), self.heads, least, self.context, slots, whole)
        text, facts = (
            interpolated(self.sizes, np.stack([self.costs[way][i] for way in allowed]), held) for i in range(2)
        )
        taken = np.argmin(text + weight * facts, axis=0)
        ways = np.array(allowed)[taken]
        return Priced(held, full, float(text[taken, np.arange(self.heads)].sum()), self.success(held, ways), ways)

    def expected(self, held: np.ndarray, ways: np.ndarray, full: int) -> Priced:
        """What is expected of heads that have these slots and use them in these ways, `full` of them full for facts."""
        text = interpolated(self.sizes, np.stack([way.text for way in self.ways]), held)  # [way, head]
        return Priced(held, full, float(text[ways, np.arange(self.heads)].sum()), self.success(held, ways), ways)

    def least(self, held: np.ndarray, ways: np.ndarray) -> np.ndarray:
        """Slots below which a head's way was not measured, `[head]`, or what it holds where that is fewer."""
        smallest = np.array([self.sizes[np.argmax((way.text < NEVER).all(1))] for way in self.ways])
        return np.minimum(smallest[ways], held)

    def success(self, held: np.ndarray, ways: np.ndarray) -> float:
        """Expected probability that a token of an answer is still right (`pricing`).

        A window loses what lies beyond it; a choice loses what was measured, wherever the fact is.
        """
        distance = (np.arange(DISTANCES) + 0.5) / DISTANCES * self.context
        gone = np.zeros((len(self.ways[0].lost), DISTANCES))
        for i, way in enumerate(self.ways):
            of = np.flatnonzero(ways == i)
            if len(of):
                lost = interpolated(self.sizes, way.lost[..., of], held[of])  # [fact, head]
                gone += lost.sum(1, keepdims=True) if way.part else lost @ (held[of, None] < distance)
        return float(np.exp(-gone.clip(0)).mean())

    def best(self, slots: int, balance: float, allowed: Sequence[int] | None = None) -> Priced:
        """The division that weighs best, over numbers of full heads and weights of facts; of all ways, or those allowed."""
        found = []
        for weight in WEIGHTS if balance else WEIGHTS[:1]:
            for full in numbers(self.heads):
                try:
                    found.append(self.divide(slots, full, weight * balance, allowed or range(len(self.ways))))
                except ValueError:  # more full heads than slots
                    break
        return min(found, key=lambda one: one.text - balance * one.success)

    def menus(self) -> list[list[int]]:
        """Ways to choose from: all, those whose scores keep no queries, windows alone."""
        free = [i for i, way in enumerate(self.ways) if not way.part or not make_score(way.score).needs_queries]
        return [list(menu) for menu in dict.fromkeys((tuple(range(len(self.ways))), tuple(free), (0,)))]

    def retention(self, kept: Retention, way: int) -> Retention:
        """What a head keeps that has these slots and uses them in this way."""
        found = self.ways[way]
        if not found.part or kept.unbounded:
            return kept
        chosen = chosen_of(kept.window, found.part)
        return Retention(kept.sinks, kept.window - chosen, chosen, found.score) if chosen else kept


def along(sizes: np.ndarray, measured: np.ndarray, curves: np.ndarray) -> np.ndarray:
    """Curves `[measured size, head]` at other sizes, `[size, head]`, straight from point to point."""
    return np.stack([np.interp(sizes, measured, curve) for curve in curves.T], 1)


def interpolated(sizes: np.ndarray, curves: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Every head's curve of `[.., size, head]` at its own slots, `[.., head]`."""
    low = (np.searchsorted(sizes, held, side="right") - 1).clip(0, len(sizes) - 2)
    part = ((held - sizes[low]) / (sizes[low + 1] - sizes[low])).clip(0, 1)
    heads = np.arange(len(held))
    return np.asarray(curves[..., low, heads] * (1 - part) + curves[..., low + 1, heads] * part)
