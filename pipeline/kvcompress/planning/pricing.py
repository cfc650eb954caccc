"""The policy `priced`: retrieval heads stay full, every other head gets the window that its price is worth.

Two things are weighed. Text: the expected divergence from the full cache, nats a token, summed over heads. Facts: the
probability that a token of the answer to a far question is still right. A fact at distance d loses what every head whose
cache ends before d carried of it,

    success = mean over facts and distances of exp(- sum over heads that do not reach d of what they carried)

so that half a retrieval circuit is worth little and the whole of it much. The `k` heads that carry most stay full, k is
the number that minimises `text - balance * success`, and the rest of the budget is spent by price (`spending`).
"""

from dataclasses import dataclass

import numpy as np

from kvcompress.core.errors import InputError
from kvcompress.planning.knapsack import pieces, spend
from kvcompress.sensitivity.prices import Sensitivity

DISTANCES = 64  # at which a fact is looked for, evenly over the context


@dataclass
class Priced:
    """A division of slots, `held` `[kv head, all layers]`, and what is expected of it."""

    held: np.ndarray
    retrieval_heads: int
    text: float  # nats a token
    success: float  # probability of a token of an answer
    ways: np.ndarray | None = None  # `[kv head]`, where a head may use its slots in several (`choosing`)


class Pricing:
    """A model's prices at one context length; heads are flat, layer by layer."""

    def __init__(self, sensitivity: Sensitivity, context: int) -> None:
        sinks, windows = sensitivity.sinks, np.array(sensitivity.windows)
        fitting = windows + sinks < context
        if not fitting.any():
            raise InputError(f"no measured window is shorter than a context of {context} tokens")
        prices = sensitivity.prices().reshape(len(windows), -1)[fitting]
        self.context, self.heads = context, prices.shape[1]
        self.sizes = np.append(windows[fitting] + sinks, context)
        self.prices = np.vstack([prices, np.zeros(self.heads)])  # [size, head]
        self.offers = pieces(self.sizes, self.prices)
        self.carried = sensitivity.retrieval.reshape(len(sensitivity.retrieval), -1)  # [fact, head]
        self.by_retrieval = np.argsort(-self.carried.mean(0), kind="stable")

    def text(self, held: np.ndarray) -> float:
        """Expected divergence, nats a token, of heads with these slots."""
        return float(sum(np.interp(held[i], self.sizes, self.prices[:, i]) for i in range(self.heads)))

    def success(self, held: np.ndarray) -> float:
        """Expected probability that a token of an answer is still right."""
        distance = (np.arange(DISTANCES) + 0.5) / DISTANCES * self.context
        lost = self.carried @ (held[:, None] < distance)  # [fact, distance]
        return float(np.exp(-lost.clip(0)).mean())

    def divide(self, slots: int, retrieval_heads: int) -> Priced:
        """Slots for every head, with the heads that carry most of the facts full. Raises ValueError where it is too much."""
        least = min(int(self.sizes[0]), slots // self.heads)
        whole = [int(head) for head in self.by_retrieval[:retrieval_heads]]
        held = spend(self.offers, self.heads, least, self.context, slots, whole)
        return Priced(held, retrieval_heads, self.text(held), self.success(held))

    def best(self, slots: int, balance: float) -> Priced:
        """The division with the number of retrieval heads that weighs best."""
        found = []
        for count in numbers(self.heads):
            try:
                found.append(self.divide(slots, count))
            except ValueError:  # more full heads than slots
                break
        return min(found, key=lambda one: one.text - balance * one.success)


def numbers(heads: int) -> list[int]:
    """How many full heads are tried: all numbers up to 32, then in steps of 3 %."""
    return [count for count in range(heads + 1) if count <= 32 or not count % (count // 16)]
