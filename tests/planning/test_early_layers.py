"""Early layers favoured by `select`: equal slots in total, the requested ratio, and the expected cost of the result."""

import numpy as np
import pytest

from kvcompress.planning.budget import Budget
from kvcompress.planning.policies import Planner, favour_early_layers, favoured
from kvcompress.planning.pricing import NEVER, WEIGHTS
from kvcompress.planning.reference_plans import flat
from tests.planning.test_policies import BUDGETS, CONTEXT, KV_HEADS, LAYERS, sensitivity


def planner(early: float) -> Planner:
    return Planner(sensitivity(), "some/model", 64, 2, CONTEXT, 0.5, early=early)


def test_the_first_third_of_the_layers_is_early() -> None:
    """Of 5 layers the first one."""
    division = planner(1.0).pricing.best(6000, 0.5)
    found = favour_early_layers(planner(2.0), division)
    bounded = division.held < CONTEXT
    more = found.held / division.held > 1
    assert more[:KV_HEADS][bounded[:KV_HEADS]].all()
    assert not more[KV_HEADS:].any()


def test_slots_move_to_early_heads_in_the_ratio_asked_for() -> None:
    held, early = np.array([100, 300, 400, 200, 300, 300]), np.array([True, True, False, False, False, False])
    found = favoured(held, early, 2.0, np.full(6, 20), 1000)
    assert found.sum() == held.sum()
    ratio = found / held
    assert ratio[:2] / ratio[2:].mean() == pytest.approx([2, 2], rel=0.02)
    assert ratio[2:] == pytest.approx(np.full(4, ratio[2:].mean()), abs=0.01)


def test_full_heads_stay_full_and_no_head_leaves_its_bounds() -> None:
    generator = np.random.default_rng(1)
    for _ in range(50):
        held = generator.integers(20, 1001, 12)
        held[generator.integers(12)] = 1000
        least = np.minimum(generator.integers(20, 300, 12), held)
        found = favoured(held, np.arange(12) < 4, 3.0, least, 1000)
        assert found.sum() == held.sum()
        assert (found >= least).all()
        assert (found <= 1000).all()
        assert (found[held == 1000] == 1000).all()


@pytest.mark.parametrize("budget", BUDGETS)
def test_plans_spend_the_same_and_more_of_it_early(budget: float | str) -> None:
    amount = Budget.parse(budget)
    plain, early = (planner(factor).plan("select", amount) for factor in (1.0, 2.0))
    first = LAYERS // 3
    spent = [[sum(kept.held(CONTEXT) for kept in flat(plan)), 0] for plan in (plain, early)]
    for of, plan in zip(spent, (plain, early), strict=True):
        of[1] = sum(kept.held(CONTEXT) for layer in plan.layers[:first] for kept in layer)
    assert spent[1][0] == pytest.approx(spent[0][0], rel=0.01)  # queries to choose by may differ
    if amount.kind == "share" and 0.1 < amount.value < 1:  # with less, other ways may be taken than without
        assert spent[1][1] > spent[0][1]


def test_what_is_expected_is_that_of_the_plan_as_made() -> None:
    pricing = planner(1.0).pricing
    best = pricing.best(6000, 0.5, range(len(pricing.ways)), WEIGHTS)
    again = pricing.expected(best.held, best.ways, best.retrieval_heads)
    assert (again.text, again.success) == (pytest.approx(best.text), pytest.approx(best.success))
    plain, early = (planner(factor).plan("select", Budget.parse(0.25)).made_from for factor in (1.0, 2.0))
    assert early["expected_divergence"] > plain["expected_divergence"]  # prices do not ask for it


def test_no_head_chooses_where_its_way_was_not_measured() -> None:
    pricing = planner(1.0).pricing
    ways = np.arange(LAYERS * KV_HEADS) % 3
    least = pricing.least(np.full(len(ways), CONTEXT), ways)
    for head, (way, slots) in enumerate(zip(ways, least, strict=True)):
        at = list(pricing.sizes).index(slots)
        assert pricing.ways[way].text[at, head] < NEVER
        assert at == 0 or pricing.ways[way].text[at - 1, head] == NEVER
    assert (pricing.least(np.full(len(ways), 40), ways) <= 40).all()
