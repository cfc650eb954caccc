"""Confidence intervals: paired bootstrap for differences of NLL, Wilson for shares. The statistics are scipy's."""

from typing import NamedTuple

import numpy as np
from scipy import stats

BLOCK = 64  # predicted tokens a block: neighbouring tokens depend on each other, blocks much less
RESAMPLES = 9999
CONFIDENCE = 0.95


class Interval(NamedTuple):
    """An estimate with the bounds of its 95 % confidence interval."""

    mean: float
    low: float
    high: float


def paired_difference(first: np.ndarray, second: np.ndarray) -> Interval:
    """Return the mean of `first - second`, both `[document, token]`, with a bootstrap interval over blocks of tokens.

    Tokens of one text are not independent, so blocks of about `BLOCK` consecutive tokens of a document are drawn
    (Künsch 1989). Percentile bootstrap: scipy.stats.bootstrap.
    """
    difference = first - second
    pieces = np.array_split(difference, max(1, difference.shape[1] // BLOCK), axis=1)  # nearly equal lengths
    blocks = np.concatenate([piece.mean(1) for piece in pieces])
    mean = float(difference.mean())
    if np.ptp(blocks) == 0:
        return Interval(mean, mean, mean)
    result = stats.bootstrap(
        (blocks,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return Interval(mean, float(result.confidence_interval.low), float(result.confidence_interval.high))


def wilson(correct: int, total: int) -> Interval:
    """Return a share of successes with its Wilson score interval (Wilson 1927): scipy.stats.binomtest."""
    interval = stats.binomtest(correct, total).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(correct / total, float(interval.low), float(interval.high))
