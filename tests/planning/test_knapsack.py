"""Budgets in three units, and spending them: exact sums, and no better division by brute force."""

import itertools
from typing import Any

import numpy as np
import pytest

from kvcompress.core.errors import InputError
from kvcompress.planning.budget import Budget
from kvcompress.planning.knapsack import hull, pieces, spend


def test_budgets_are_read_and_counted() -> None:
    assert Budget.parse("25%") == Budget.parse(0.25) == Budget("share", 0.25)
    assert Budget.parse("512 tokens").slots(90, 2048, 512) == 512 * 90
    assert Budget.parse("40 MB").slots(90, 2048, 512) == 40_000_000 // 512
    assert Budget.parse("6.25%").slots(90, 2048, 512) == 11520
    assert [Budget.parse(text).label for text in ("6.25%", "512 tokens", "40MB")] == ["6.25", "512tokens", "40MB"]
    refused: list[Any] = ["", "25", "-3%", "0%", "101%", "nan%", True, None, 0.0, 1.5]
    for wrong in refused:
        with pytest.raises(InputError, match="budget"):
            Budget.parse(wrong)
    with pytest.raises(InputError, match="less than one slot"):
        Budget.parse("1 B").slots(90, 2048, 512)


def test_hull_skips_what_is_never_worth_it() -> None:
    sizes, prices = np.array([1, 2, 3, 4]), np.array([10.0, 9.5, 2.0, 0.0])
    assert hull(sizes, prices) == [0, 2, 3]


def test_spending_is_exact_and_as_good_as_trying_everything() -> None:
    generator = np.random.default_rng(0)
    sizes = np.array([2, 4, 8, 16])
    for _ in range(30):
        prices = np.sort(generator.random((4, 3)), 0)[::-1].copy()
        prices[-1] = 0
        offers = pieces(sizes, prices)
        for slots in (6, 13, 20, 31, 48):
            held = spend(offers, 3, 2, 16, slots)
            assert held.sum() == slots
            assert ((held >= 2) & (held <= 16)).all()
            mine = sum(np.interp(held[i], sizes, prices[:, i]) for i in range(3))
            possible = [c for c in itertools.product(range(4), repeat=3) if sizes[list(c)].sum() <= slots]
            best = min(sum(prices[c[i], i] for i in range(3)) for c in possible)
            relaxed = best - prices.max()  # a piece may be taken in part; no more than one is
            assert relaxed <= mine <= prices[0].sum() + 1e-9
            if slots in (6, 48):
                assert mine == pytest.approx(best)


def test_whole_heads_come_first_and_too_much_is_refused() -> None:
    sizes, prices = np.array([2, 16]), np.array([[3.0, 2.0, 1.0], [0, 0, 0]])
    held = spend(pieces(sizes, prices), 3, 2, 16, 24, full=[2])
    assert held[2] == 16
    assert held.sum() == 24
    assert held[0] == 6
    with pytest.raises(ValueError, match="cannot be divided"):
        spend(pieces(sizes, prices), 3, 2, 16, 17, full=[2])
    with pytest.raises(ValueError, match="cannot be divided"):
        spend(pieces(sizes, prices), 3, 2, 16, 49)


def test_what_no_head_pays_for_is_spread_evenly() -> None:
    held = spend([], 4, 2, 16, 30)
    assert sorted(held) == [7, 7, 8, 8]
