"""Spending slots where they buy most: the fractional knapsack over the heads' price curves.

A head's price falls with its slots. On the lower convex hull of its curve every piece buys at a rate of its own, and the
rates fall from piece to piece; so the best division of a budget takes the pieces of all heads in the order of their
rates until nothing is left (Dantzig 1957; the same as one price of memory, lambda, for all heads). At most one piece is
taken in part, and the sum is exact.
"""

import itertools
from collections.abc import Collection
from typing import NamedTuple

import numpy as np


class Piece(NamedTuple):
    """From `low` to `high` slots the price of head `head` falls by `rate` a slot."""

    rate: float
    head: int
    low: int
    high: int


def hull(sizes: np.ndarray, prices: np.ndarray) -> list[int]:
    """Indices of the lower convex hull of a falling curve, from the smallest size on."""
    found: list[int] = []
    for i in range(len(sizes)):
        while len(found) >= 2:
            a, b = found[-2], found[-1]
            before = (prices[a] - prices[b]) * (sizes[i] - sizes[b])
            after = (prices[b] - prices[i]) * (sizes[b] - sizes[a])
            if before > after:
                break
            found.pop()
        found.append(i)
    return found


def pieces(sizes: np.ndarray, prices: np.ndarray) -> list[Piece]:
    """All heads' pieces that buy anything, best rate first; `sizes` `[size]` ascending, `prices` `[size, head]`."""
    found = []
    for head in range(prices.shape[1]):
        curve = np.minimum.accumulate(prices[:, head])
        corners = hull(sizes, curve)
        for a, b in itertools.pairwise(corners):
            rate = float((curve[a] - curve[b]) / (sizes[b] - sizes[a]))
            if rate > 0:
                found.append(Piece(rate, head, int(sizes[a]), int(sizes[b])))
    return sorted(found, key=lambda piece: -piece.rate)


def spend(
    offers: list[Piece], heads: int, least: int, most: int, slots: int, whole: Collection[int] = ()
) -> np.ndarray:
    """Slots of every head, `slots` in all: heads in `whole` get `most`, every other at least `least`.

    Raises ValueError where that is already too much or `slots` exceed what the heads can hold.
    """
    held = np.full(heads, least)
    held[list(whole)] = most
    left = slots - int(held.sum())
    if left < 0 or slots > heads * most:
        raise ValueError(f"{slots} slots cannot be divided among {heads} heads of {least} to {most}")
    chosen = set(whole)
    for _, head, low, high in offers:
        if left == 0:
            break
        if head not in chosen:
            taken = min(high - low, left)
            held[head] += taken
            left -= taken
    return level(held, most, left)


def scaled(shape: np.ndarray, slots: int, least: int | np.ndarray = 1, most: int | np.ndarray = 2**31) -> np.ndarray:
    """Whole slots in proportion to `shape`, within `least` and `most`, together as many as fit into `slots`."""

    def at(factor: float) -> np.ndarray:
        return np.clip(np.floor(factor * shape), least, most).astype(int)

    low, high = 0.0, float(slots)
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if int(at(middle).sum()) <= slots else (low, middle)
    return at(low)


def level(held: np.ndarray, most: int, left: int) -> np.ndarray:
    """Give `left` more slots, the poorest heads first, until all have the same."""
    order = np.argsort(held, kind="stable")
    low, high = int(held.min()), most
    while low < high:  # the highest water level that the slots reach
        middle = (low + high + 1) // 2
        low, high = (middle, high) if int((middle - held).clip(0).sum()) <= left else (low, middle - 1)
    raised = np.maximum(held, low)
    rest = left - int((raised - held).sum())
    for head in order:
        if rest > 0 and raised[head] == low and low < most:
            raised[head] += 1
            rest -= 1
    return raised
