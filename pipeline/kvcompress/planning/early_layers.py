"""More for early layers than their prices say, because what they lose does not stay with them.

Prices look at one layer's output on a text that was read in full. While a text streams through a compressed cache, what
an early layer has lost goes into the keys and values of all layers above it, stays there, and meets what was lost before.
No single passage's price holds that: it builds up over the text.
"""

import numpy as np

from kvcompress.planning.knapsack import level, scaled


def is_early(layers: int, kv_heads: int) -> np.ndarray:
    """Which heads stand in the first third of the layers, bool `[kv head, all layers]`."""
    return np.arange(layers * kv_heads) < layers // 3 * kv_heads


def favour(held: np.ndarray, early: np.ndarray, factor: float, least: np.ndarray, most: int) -> np.ndarray:
    """The same slots in all, those of early heads `factor` times as many beside the others' as before.

    held: `[kv head]`, slots of every head. Heads that hold `most` keep it; no other head falls below its `least`, nor
    rises above `most`.
    """
    full = held >= most
    fixed = np.where(full, held, least)
    found = scaled(held * np.where(early, factor, 1.0), int(held.sum()), fixed, np.where(full, held, most))
    return level(found, most, int(held.sum() - found.sum()))
