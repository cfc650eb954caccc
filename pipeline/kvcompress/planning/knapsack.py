"""Division of slots among heads by price: the fractional knapsack over the heads' price curves.

The price of a head falls with its slots. On the lower convex hull of the curve every piece has a rate, price for each
slot, and the rates fall from piece to piece. The best division of a budget therefore takes the pieces of all heads in
the order of their rates until no slot is left (Dantzig 1957; equivalent to one price of memory, lambda, for all heads).
At most one piece is taken in part, and the sum is exact.
"""

import itertools
from collections.abc import Collection
from typing import NamedTuple

import numpy as np


class Piece(NamedTuple):
    """Fall of the price of `head` by `rate` for each slot from `low` to `high` slots."""

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
    """Pieces of all heads with a positive rate, best first. sizes: `[size]`, ascending. prices: `[size, head]`."""
    found = []
    for head in range(prices.shape[1]):
        curve = np.minimum.accumulate(prices[:, head])
        corners = hull(sizes, curve)
        for a, b in itertools.pairwise(corners):
            rate = float((curve[a] - curve[b]) / (sizes[b] - sizes[a]))
            if rate > 0:
                found.append(Piece(rate, head, int(sizes[a]), int(sizes[b])))
    return sorted(found, key=lambda piece: -piece.rate)


def spend(offers: list[Piece], heads: int, least: int, most: int, slots: int, full: Collection[int] = ()) -> np.ndarray:
    """Slots of every head, `slots` in total: heads in `full` get `most`, every other head at least `least`.

    Raises ValueError if the minimum exceeds `slots` or `slots` exceed what the heads can hold.
    """
    held = np.full(heads, least)
    held[list(full)] = most
    left = slots - int(held.sum())
    if left < 0 or slots > heads * most:
        raise ValueError(f"{slots} slots cannot be divided among {heads} heads of {least} to {most}")
    served = set(full)
    for _, head, low, high in offers:
        if left == 0:
            break
        if head not in served:
            taken = min(high - low, left)
            held[head] += taken
            left -= taken
    return level(held, most, left)


def scaled(shape: np.ndarray, slots: int, least: int | np.ndarray = 1, most: int | np.ndarray = 2**31) -> np.ndarray:
    """Whole slots in proportion to `shape`, within `least` and `most`, as many as fit into `slots`."""

    def at(factor: float) -> np.ndarray:
        return np.clip(np.floor(factor * shape), least, most).astype(int)

    low, high = 0.0, float(slots)
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if int(at(middle).sum()) <= slots else (low, middle)
    return at(low)


def level(held: np.ndarray, most: int, left: int) -> np.ndarray:
    """Distribute `left` more slots, first to the heads with the fewest, until all hold the same number."""
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
