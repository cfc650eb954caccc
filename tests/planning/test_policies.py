"""Policies: every budget is hit, every policy keeps what its name promises, and the best plan is the best of all counts."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from kvcompress.core.errors import InputError
from kvcompress.core.head_classes import ClassificationFile, HeadClassification, HeadType
from kvcompress.core.plan import RetentionPlan
from kvcompress.core.retention import FULL
from kvcompress.planning.budget import Budget
from kvcompress.planning.policies import POLICIES, WITHOUT_BUDGET, Planner
from kvcompress.planning.pricing import Pricing
from kvcompress.planning.reference_plans import flat
from kvcompress.scores.selection_rule import kept_query_slots
from kvcompress.sensitivity.prices import SelectOption, Sensitivity

LAYERS, KV_HEADS, CONTEXT = 5, 3, 1024
WINDOWS = [16, 64, 256, 900]


def sensitivity(seed: int = 0) -> Sensitivity:
    generator = np.random.default_rng(seed)
    shape = (len(WINDOWS), LAYERS, KV_HEADS)
    fisher = np.sort(generator.exponential(size=shape) * generator.exponential(5, size=(1, LAYERS, KV_HEADS)), 0)[::-1]
    joint = generator.exponential(size=(2, *shape[1:]))
    facts = 0.1 * generator.exponential(size=shape[1:]) ** 3 * generator.uniform(0.5, 1, size=(6, 1, 1))
    origin = {"num_attention_heads": 2 * KV_HEADS, "texts": ["a", "b"]}
    choices = [SelectOption(score, 0.5, size) for score in ("expected_attention", "key_diff") for size in (128, 512)]
    # Chosen keys are worth most where little is kept, and of facts one score keeps nothing, the other most.
    worth = np.array([0.5, 0.8, 0.9, 1.0])[:, None, None]
    chosen = worth * np.concatenate([fisher[1:3], fisher[1:3]])
    lost = np.stack([facts, 0.9 * facts, 0.2 * facts, 0.1 * facts], 1)
    return Sensitivity(WINDOWS, 4, CONTEXT, 100, 100, fisher.copy(), joint, facts, origin, choices, chosen, lost)


@pytest.fixture(scope="module")
def classifications() -> ClassificationFile:
    kinds = [HeadType.SINK_POSITIONAL, HeadType.SINK_MIXED, HeadType.GATHERING]
    heads = []
    for layer in range(LAYERS):
        for head in range(2 * KV_HEADS):
            kind = kinds[(layer + head // 2) % 3]
            full = kind is HeadType.GATHERING
            bounded = {} if full else {"keep_sinks": True, "compression_strategy": "sink_window"}
            heads.append(HeadClassification(layer, head, kind, 0.9, recommended_window=-1 if full else 8, **bounded))
    return ClassificationFile(classifications=heads)


@pytest.fixture
def planner(classifications: ClassificationFile) -> Planner:
    return Planner(sensitivity(), "some/model", 64, 2, CONTEXT, 0.5, classifications)


BUDGETS = [0.0625, "12.5%", 0.25, "50%", 1.0, "100 tokens", "300 KB"]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy not in WITHOUT_BUDGET])
def test_every_budget_is_hit(planner: Planner, policy: str, budget: float | str, tmp_path: Path) -> None:
    amount = Budget.parse(budget)
    plan = planner.plan(policy, amount)
    wanted = planner.slots(amount)
    held = plan.held(CONTEXT) + kept_query_slots(plan)
    assert held == (pytest.approx(wanted, rel=0.005) if policy == "select" else wanted)
    assert held <= wanted
    if amount.kind == "bytes":
        assert held * 256 == pytest.approx(amount.value, rel=0.005)
    plan.save(tmp_path / "plan.json")
    again = RetentionPlan.load(tmp_path / "plan.json")
    assert again == plan
    assert (again.model_id, again.policy) == ("some/model", policy)
    assert again.budget["context_length"] == CONTEXT
    assert again.budget[amount.kind] == amount.value


def held(plan: RetentionPlan) -> np.ndarray:
    return np.array([kept.held(CONTEXT) for kept in flat(plan)])


def test_uniform_heads_differ_by_one_slot_at_most(planner: Planner) -> None:
    assert np.ptp(held(planner.plan("uniform", Budget.parse("12.5%")))) <= 1


def test_controls_deal_the_same_retentions(planner: Planner) -> None:
    budget = Budget.parse(0.25)
    priced = planner.plan("priced", budget)
    for name in ("random", "inverse"):
        control = planner.plan(name, budget)
        assert Counter(flat(control)) == Counter(flat(priced))
        assert control != priced
        assert control.policy == name
    order = np.argsort(held(priced), kind="stable")
    turned = held(planner.plan("inverse", budget))[order]
    assert (np.diff(turned) <= 0).all()


def test_retrieval_heads_are_those_that_carry_facts(planner: Planner) -> None:
    planner.balance, budget = 5.0, Budget.parse(0.5)
    count = planner.best(budget).retrieval_heads
    assert 0 < count < LAYERS * KV_HEADS
    plan = planner.plan("retrieval_heads", budget)
    carried = planner.sensitivity.retrieval.mean(0).reshape(-1)
    full = [i for i, kept in enumerate(flat(plan)) if kept == FULL]
    assert set(full) == set(np.argsort(-carried)[:count].tolist())
    assert np.ptp(np.delete(held(plan), full)) <= 1


def test_the_number_of_retrieval_heads_is_the_best_of_all(planner: Planner) -> None:
    for share in (0.125, 0.25, 0.5):
        budget, pricing = Budget.parse(share), planner.pricing
        best, slots, values = planner.best(budget), planner.slots(budget), []
        for count in range(LAYERS * KV_HEADS + 1):
            try:
                found = pricing.divide(slots, count)
            except ValueError:
                break
            values.append(found.text - planner.balance * found.success)
        assert best.text - planner.balance * best.success == pytest.approx(min(values))


def test_with_many_heads_not_every_count_is_tried() -> None:
    layers = 12
    generator = np.random.default_rng(3)
    fisher = np.sort(generator.exponential(size=(4, layers, 4)), 0)[::-1].copy()
    facts = 0.02 * generator.exponential(size=(6, layers, 4))
    many = Sensitivity(
        WINDOWS, 4, CONTEXT, 100, 100, fisher, np.ones((2, layers, 4)), facts, {}, [], facts[:0], facts[:, :0]
    )
    pricing, slots, balance = Pricing(many, CONTEXT), layers * 4 * CONTEXT * 9 // 10, 5.0
    found = pricing.best(slots, balance)
    values = {}
    for count in range(layers * 4 * 9 // 10 + 1):
        one = pricing.divide(slots, count)
        values[count] = one.text - balance * one.success
    assert found.retrieval_heads > 32  # where steps are taken
    assert found.retrieval_heads % (found.retrieval_heads // 16) == 0
    assert abs(found.retrieval_heads - min(values, key=lambda count: values[count])) <= 2


def test_balance_trades_text_for_facts(planner: Planner) -> None:
    slots, pricing = planner.slots(Budget.parse(0.25)), planner.pricing
    ends = [pricing.best(slots, balance) for balance in (0.0, 0.05, 5.0)]
    assert [one.text for one in ends] == sorted(one.text for one in ends)
    assert [one.success for one in ends] == sorted(one.success for one in ends)
    assert ends[0].success < ends[-1].success


def test_expectations_at_the_ends(planner: Planner) -> None:
    pricing, heads = planner.pricing, LAYERS * KV_HEADS
    windows = np.zeros(heads, dtype=int)
    everything = pricing.expected(np.full(heads, CONTEXT), windows, 0)
    assert (everything.text, everything.success) == (0, 1)
    least = pricing.expected(np.full(heads, WINDOWS[0] + 4), windows, 0)
    assert least.text == pytest.approx(planner.sensitivity.prices()[0].sum())
    distances = (np.arange(64) + 0.5) / 64 * CONTEXT  # beyond all windows nothing of a fact is left
    total = planner.sensitivity.retrieval.reshape(6, -1).sum(1)
    expected = np.mean([np.exp(-total) if distance > 20 else np.ones(6) for distance in distances])
    assert least.success == pytest.approx(expected)


def test_priced_buys_more_than_uniform_and_controls(planner: Planner) -> None:
    planner.balance = 0.0
    budget = Budget.parse(0.25)
    windows = np.zeros(LAYERS * KV_HEADS, dtype=int)
    cost = {
        name: planner.pricing.expected(held(planner.plan(name, budget)), windows, 0).text
        for name in POLICIES
        if name != "select"
    }
    assert cost["priced"] < min(cost[name] for name in ("uniform", "random", "inverse", "class_table_scaled"))


def test_the_scaled_class_table_keeps_its_shape(planner: Planner) -> None:
    table = held(planner.plan("class_table", Budget.parse(0.25)))
    scaled = held(planner.plan("class_table_scaled", Budget.parse(0.25)))
    assert planner.plan("class_table", Budget.parse(0.5)) == planner.plan("class_table", Budget.parse(0.25))
    for size in set(table):
        assert np.ptp(scaled[table == size]) <= 1
    assert scaled[table == 12].max() < scaled[table == CONTEXT].min()


def test_invalid_requests_are_refused(planner: Planner, classifications: ClassificationFile) -> None:
    with pytest.raises(InputError, match="unknown policy 'best'"):
        planner.plan("best", Budget.parse(0.25))
    with pytest.raises(InputError, match="less than one slot"):
        planner.plan("priced", Budget.parse("1 KB"))
    without = Planner(sensitivity(), "m", 64, 2, CONTEXT, 0.5)
    with pytest.raises(InputError, match="need a classification file"):
        without.plan("class_table", Budget.parse(0.25))
    small = Planner(sensitivity(), "m", 64, 2, 12, 0.5)
    with pytest.raises(InputError, match="no measured window is shorter than a context of 12"):
        small.plan("priced", Budget.parse(0.5))
    other = sensitivity()
    other.origin = {**other.origin, "num_attention_heads": 3}
    with pytest.raises(InputError, match="of another model than the prices"):
        Planner(other, "m", 64, 2, CONTEXT, 0.5, classifications).plan("class_table", Budget.parse(0.25))
