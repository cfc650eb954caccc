"""Prices of divisions: expectations follow their formulas, and no other use of the slots costs less."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from kvcompress.core.retention import FULL, Retention
from kvcompress.planning.budget import Budget
from kvcompress.planning.policies import Planner
from kvcompress.planning.pricing import NEVER, WEIGHTS, Division, Pricing, full_head_counts
from kvcompress.planning.reference_plans import flat
from kvcompress.scores.selection_rule import SelectionRule, kept_query_slots
from tests.planning.test_policies import CONTEXT, KV_HEADS, LAYERS, WINDOWS, sensitivity


@pytest.fixture(scope="module")
def pricing() -> Pricing:
    return Pricing(sensitivity(), CONTEXT)


def best_of_all_ways(pricing: Pricing, slots: int, balance: float) -> Division:
    return pricing.best(slots, balance, range(len(pricing.ways)), WEIGHTS)


@pytest.fixture
def planner() -> Planner:
    return Planner(sensitivity(), "some/model", 64, 2, CONTEXT, 0.5)


def test_ways_are_windows_and_what_was_measured(pricing: Pricing) -> None:
    found = [(way.score, way.part) for way in pricing.ways]
    assert found == [("", 0.0), ("expected_attention", 0.5), ("key_diff", 0.5)]
    prices = sensitivity().option_prices().reshape(4, -1)
    sizes = [*(window + 4 for window in WINDOWS), CONTEXT]
    assert list(pricing.sizes) == sizes
    for way, of in zip(pricing.ways[1:], (prices[:2], prices[2:]), strict=True):
        assert (way.text[:2] == NEVER).all()  # nothing was measured below 132 slots
        for head in range(LAYERS * KV_HEADS):
            expected = np.interp(sizes[2:], [132, 516, CONTEXT], [*of[:, head], 0.0])
            np.testing.assert_allclose(way.text[2:, head], expected)
        assert way.lost is not None
        assert (way.lost[:, -1] == 0).all()


def test_success_is_what_its_formula_says(pricing: Pricing) -> None:
    generator = np.random.default_rng(3)
    held = generator.integers(140, CONTEXT + 1, LAYERS * KV_HEADS)
    ways = generator.integers(0, 3, len(held))
    measured = sensitivity()
    carried, lost = measured.retrieval.reshape(6, -1), measured.lost.reshape(6, 4, -1)
    total = 0.0
    for fact, i in itertools.product(range(6), range(64)):
        distance, gone = (i + 0.5) / 64 * CONTEXT, 0.0
        for head, slots in enumerate(held):
            if not ways[head]:
                gone += carried[fact, head] if slots < distance else 0.0
            else:
                of = lost[fact, :2, head] if ways[head] == 1 else lost[fact, 2:, head]
                grid = np.interp(pricing.sizes, [132, 516, CONTEXT], [*of, 0.0])
                gone += np.interp(slots, pricing.sizes, grid)
        total += np.exp(-gone)
    assert pricing.success(held, ways) == pytest.approx(total / 6 / 64)


@pytest.mark.parametrize("share", [0.15, 0.3, 0.6])
def test_no_head_would_rather_use_its_slots_in_another_way(pricing: Pricing, share: float) -> None:
    slots = int(share * CONTEXT * pricing.heads)
    found = best_of_all_ways(pricing, slots, 0.0)
    assert found.text < pricing.best(slots, 0.0).text
    for head, slots in enumerate(found.held):
        each = [np.interp(slots, pricing.sizes, way.text[:, head]) for way in pricing.ways]
        assert each[found.ways[head]] == min(each)


def test_facts_move_heads_to_the_score_that_keeps_them(pricing: Pricing) -> None:
    slots = int(0.3 * CONTEXT * pricing.heads)
    blind, minded = best_of_all_ways(pricing, slots, 0.0), best_of_all_ways(pricing, slots, 20.0)
    assert minded.success > blind.success
    assert minded.text > blind.text
    keeping = 2  # key_diff, by whose choice little of a fact is lost
    carried = sensitivity().retrieval.mean(0).reshape(-1)
    keeps = (minded.ways == keeping) | (minded.held == CONTEXT)
    assert carried[keeps].sum() > carried[(blind.ways == keeping) | (blind.held == CONTEXT)].sum()


def test_a_plan_uses_every_head_in_the_way_it_is_priced(planner: Planner) -> None:
    cheap, budget = SelectionRule(observe=2), Budget.parse(0.25)
    plan = replace(planner, choosing=cheap).plan("select", budget)
    queries = kept_query_slots(plan, cheap)
    asking = sum(any(kept.score == "expected_attention" for kept in layer) for layer in plan.layers)
    assert queries == asking * 2 * KV_HEADS * 2 // 2 > 0
    held = plan.held(CONTEXT)
    assert 0.995 * planner.slots(budget) <= held + queries <= planner.slots(budget)
    kinds = {kept.score for kept in flat(plan) if kept != FULL}
    assert kinds == {"", "expected_attention", "key_diff"}
    for kept in flat(plan):
        if kept.score:
            assert kept.chosen == round(0.5 * (kept.chosen + kept.window))


@pytest.mark.parametrize("balance", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("share", [0.1, 0.2, 0.25, 0.5])
def test_by_its_own_measure_it_is_never_worse_than_windows(planner: Planner, share: float, balance: float) -> None:
    """Queries cost slots, so that in a tiny model choosing may not pay."""
    planner, budget = replace(planner, balance=balance), Budget.parse(share)
    priced, select = planner.best(budget), planner.plan("select", budget).made_from
    mine = select["expected_divergence"] - balance * select["expected_success"]
    assert mine <= priced.text - balance * priced.success + 1e-4


def test_an_option_that_saves_no_fact_is_no_better_than_its_window() -> None:
    measured = sensitivity()
    nothing = replace(measured, lost=np.repeat(measured.retrieval[:, None], len(measured.choices), 1))
    pricing = Pricing(nothing, CONTEXT)
    heads = pricing.heads
    chosen = pricing.success(np.full(heads, 516), np.ones(heads, dtype=int))
    assert chosen <= pricing.success(np.full(heads, 260), np.zeros(heads, dtype=int))
    few, many = (pricing.ways[1].facts[size] for size in (2, 3))
    assert (few > pricing.ways[0].facts[2]).all()
    assert (many <= few + 1e-12).all()


def test_as_many_full_heads_are_tried_as_the_model_has() -> None:
    assert full_head_counts(5) == [0, 1, 2, 3, 4, 5]
    many = full_head_counts(400)
    assert many[:33] == list(range(33))
    assert max(many) > 390
    assert max(np.diff(many)) <= 25


def test_scores_without_queries_take_nothing_from_the_budget(planner: Planner) -> None:
    measured = planner.sensitivity
    only = replace(measured, choices=measured.choices[2:], chosen=measured.chosen[2:], lost=measured.lost[:, 2:])
    budget = Budget.parse(0.25)
    plan = replace(planner, sensitivity=only).plan("select", budget)
    assert kept_query_slots(plan) == 0
    assert plan.held(CONTEXT) == planner.slots(budget)


def test_without_measured_options_there_are_windows(planner: Planner) -> None:
    measured = planner.sensitivity
    none = replace(measured, choices=[], chosen=measured.chosen[:0], lost=measured.lost[:, :0])
    plan = replace(planner, sensitivity=none).plan("select", Budget.parse(0.25))
    assert all(not kept.chosen for kept in flat(plan))
    assert plan.held(CONTEXT) == planner.slots(Budget.parse(0.25))


def test_a_short_context_leaves_windows(planner: Planner) -> None:
    """No measured option is shorter than 100 tokens, so none is offered there."""
    plan = replace(planner, context=100).plan("select", Budget.parse(0.5))
    assert all(not kept.chosen for kept in flat(plan))


@pytest.mark.parametrize(("way", "window"), [(0, 200), (1, 100), (2, 100)])
def test_retention_of_a_way(pricing: Pricing, way: int, window: int) -> None:
    found = pricing.retention(Retention(4, 200), way)
    assert found == Retention(4, window, 200 - window, pricing.ways[way].score)
    assert pricing.retention(FULL, way) == FULL
    assert pricing.retention(Retention(4, 1), way) == Retention(4, 1)
