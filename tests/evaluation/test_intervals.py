"""Intervals: known values, and blocks that matter."""

import numpy as np
import pytest

from kvcompress.evaluation.intervals import BLOCK, paired_difference, wilson


def test_wilson_has_the_published_values() -> None:
    """Brown, Cai and DasGupta 2001: for 0 of n the upper bound is z² / (n + z²)."""
    z = 1.959963985
    assert wilson(0, 10).high == pytest.approx(z**2 / (10 + z**2), abs=1e-6)
    interval = wilson(9, 10)
    assert interval.mean == 0.9
    assert (interval.low, interval.high) == (pytest.approx(0.5958, abs=1e-3), pytest.approx(0.9821, abs=1e-3))


def test_no_difference_and_a_constant_one() -> None:
    values = np.random.default_rng(0).normal(size=(3, 300))
    assert paired_difference(values, values) == (0, 0, 0)
    found = paired_difference(values + 0.5, values)
    assert found.low == pytest.approx(0.5)
    assert found.high == pytest.approx(0.5)


def test_an_interval_contains_its_mean_and_covers() -> None:
    """Of 60 independent samples with mean 0.1, about 95 % of the intervals hold it."""
    generator, hits = np.random.default_rng(1), 0
    for _ in range(60):
        found = paired_difference(generator.normal(0.1, 1, (4, 511)), np.zeros((4, 511)))
        assert found.low <= found.mean <= found.high
        hits += found.low <= 0.1 <= found.high
    assert hits >= 50


def test_tokens_that_move_together_do_not_count_as_many() -> None:
    generator = np.random.default_rng(2)
    independent = generator.normal(size=(4, 16 * BLOCK))
    together = np.repeat(generator.normal(size=(4, 16)), BLOCK, axis=1)
    narrow, wide = (paired_difference(x, np.zeros_like(x)) for x in (independent, together))
    assert wide.high - wide.low > 4 * (narrow.high - narrow.low)
