"""Policies by name: how a budget of slots becomes a retention plan."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from kvcompress.core.errors import InputError
from kvcompress.core.head_classes import load_classifications
from kvcompress.core.plan import RetentionPlan
from kvcompress.core.retention import FULL, Retention
from kvcompress.planning.budget import Budget
from kvcompress.planning.early_layers import favour, is_early
from kvcompress.planning.knapsack import level, scaled
from kvcompress.planning.pricing import Priced, Pricing
from kvcompress.planning.reference_plans import class_table_plan, inverted, shuffled
from kvcompress.planning.select_pricing import ChoosingPricing
from kvcompress.scores.selection_rule import SelectionRule, kept_query_slots
from kvcompress.sensitivity.prices import Sensitivity


@dataclass
class Planner:
    """Makes plans for one model at one context length.

    `balance`: nats a token of text that it is worth to answer every question about far facts. `classifications`: the class
    table's file, needed by its two policies alone. `choosing`: how a cache of the policy `select` chooses keys; `early`:
    how much more than by price its plans give to early layers (`kvcompress.planning.early_layers`), 1 for prices alone.
    """

    sensitivity: Sensitivity
    model_id: str
    head_dim: int
    itemsize: int  # bytes an element of the cache
    context: int
    balance: float
    classifications: Path | None = None
    seed: int = 0
    choosing: SelectionRule = field(default_factory=SelectionRule)
    early: float = 1.0
    _best: dict[Budget, Priced] = field(default_factory=dict, repr=False)

    @cached_property
    def pricing(self) -> Pricing:
        return Pricing(self.sensitivity, self.context)

    @cached_property
    def choosing_pricing(self) -> ChoosingPricing:
        return ChoosingPricing(self.sensitivity, self.context)

    @property
    def heads(self) -> int:
        return self.sensitivity.layers * self.sensitivity.kv_heads

    def slots(self, budget: Budget) -> int:
        return budget.slots(self.heads, self.context, 2 * self.head_dim * self.itemsize)

    def plan(self, policy: str, budget: Budget) -> RetentionPlan:
        """The plan of a policy. Raises `InputError` for an unknown one."""
        if policy not in POLICIES:
            raise InputError(f"unknown policy {policy!r}, expected one of {', '.join(POLICIES)}")
        return POLICIES[policy](self, budget)

    def of_slots(self, held: np.ndarray, policy: str, budget: Budget, **made_from: Any) -> RetentionPlan:
        """Slots of every head -> sinks + window, or the full cache where they reach the context's length."""
        kept = [retention(int(slots), self.context, self.sensitivity.sinks) for slots in held]
        width = self.sensitivity.kv_heads
        layers = tuple(tuple(kept[i : i + width]) for i in range(0, len(kept), width))
        spent = int(np.minimum(held, self.context).sum())
        figures = {budget.kind: budget.value, "context_length": self.context}
        figures |= {"share": spent / (self.heads * self.context)} if budget.kind != "share" else {}
        origin = {"texts": self.sensitivity.origin.get("texts", []), **made_from}
        query_heads = int(self.sensitivity.origin["num_attention_heads"])
        return RetentionPlan(layers, query_heads, self.model_id, policy, figures, origin)

    def of_division(self, found: Priced, policy: str, budget: Budget) -> RetentionPlan:
        """A plan that says what is expected of it."""
        return self.of_slots(
            found.held,
            policy,
            budget,
            balance=self.balance,
            retrieval_heads=found.retrieval_heads,
            expected_divergence=round(found.text, 5),
            expected_success=round(found.success, 4),
        )

    def best(self, budget: Budget) -> Priced:
        """The division that `priced` takes."""
        if budget not in self._best:
            self._best[budget] = self.pricing.best(self.slots(budget), self.balance)
        return self._best[budget]


def retention(slots: int, context: int, sinks: int) -> Retention:
    """Sinks + window in so many slots; the full cache where they reach the context's length."""
    if slots >= context:
        return FULL
    sinks = min(sinks, slots - 1)
    return Retention(sinks, slots - sinks)


def uniform(planner: Planner, budget: Budget) -> RetentionPlan:
    """The same sinks and window for every head."""
    return planner.of_slots(evenly(planner.slots(budget), planner.heads), "uniform", budget)


def evenly(slots: int, heads: int) -> np.ndarray:
    """`slots` over `heads`, the remainder spread over them."""
    return np.diff(np.arange(heads + 1) * slots // heads)


def priced(planner: Planner, budget: Budget) -> RetentionPlan:
    """Retention by measured price (`kvcompress.planning.pricing`)."""
    return planner.of_division(planner.best(budget), "priced", budget)


def retrieval_heads(planner: Planner, budget: Budget) -> RetentionPlan:
    """As many full retrieval heads as `priced` has, the same window for the rest."""
    slots, count = planner.slots(budget), planner.best(budget).retrieval_heads
    held = np.full(planner.heads, planner.context)
    rest = planner.pricing.by_retrieval[count:]
    held[rest] = evenly(slots - count * planner.context, len(rest))
    return planner.of_slots(held, "retrieval_heads", budget, retrieval_heads=count)


def class_table(planner: Planner, budget: Budget) -> RetentionPlan:
    """What the class table recommends, whatever the budget."""
    if planner.classifications is None:
        raise InputError("the class table's policies need a classification file")
    found = class_table_plan(planner.classifications, planner.sensitivity.kv_heads)
    if (found.num_layers, found.num_attention_heads) != (
        planner.sensitivity.layers,
        planner.sensitivity.origin["num_attention_heads"],
    ):
        raise InputError(f"{planner.classifications} describes another model than the sensitivity")
    own = {"share": found.share(planner.context), "context_length": planner.context}
    return RetentionPlan(
        found.layers,
        found.num_attention_heads,
        planner.model_id,
        "class_table",
        own,
        {"thresholds_of": load_classifications(planner.classifications).taxonomy},
    )


def class_table_scaled(planner: Planner, budget: Budget) -> RetentionPlan:
    """The class table's slots, all multiplied by one factor so that they meet the budget."""
    table, slots = class_table(planner, budget), planner.slots(budget)
    shape = np.array([float(kept.held(planner.context)) for layer in table.layers for kept in layer]).clip(1)
    held = scaled(shape, slots, 1, planner.context)
    rest = slots - int(held.sum())  # what rounding left over: one slot each to the first that have room
    held[np.flatnonzero(held < planner.context)[: max(rest, 0)]] += 1
    return planner.of_slots(held, "class_table_scaled", budget)


def random(planner: Planner, budget: Budget) -> RetentionPlan:
    """A control: the retentions of `priced`, dealt to random heads."""
    return shuffled(priced(planner, budget), planner.seed)


def inverse(planner: Planner, budget: Budget) -> RetentionPlan:
    """A control: the retentions of `priced`, the most to the heads that had the least."""
    return inverted(priced(planner, budget))


def select(planner: Planner, budget: Budget) -> RetentionPlan:
    """Windows and keys that scores choose, by measured price (`kvcompress.planning.select_pricing`).

    What the cache keeps of queries to choose by comes out of the budget (`kvcompress.scores.selection_rule.kept_query_slots`); where
    that makes them too dear, heads choose by other scores, or not at all.
    """
    found = [affordable(planner, budget, menu) for menu in planner.choosing_pricing.menus()]
    best = min((one for one in found if one), key=lambda one: one.text - planner.balance * one.success)
    return selective(planner, best, budget)


def affordable(planner: Planner, budget: Budget, menu: Sequence[int]) -> Priced | None:
    """The best division in these ways that leaves room for the queries it needs; None where there is too little."""
    pricing, slots, spare = planner.choosing_pricing, planner.slots(budget), 0
    while slots - spare >= planner.heads:  # which layers choose, and so keep queries, depends on the division
        found = favoured(planner, pricing.best(slots - spare, planner.balance, menu))
        needed = kept_query_slots(selective(planner, found, budget), planner.choosing)
        if needed <= spare:
            return replace(found, held=level(found.held, planner.context, spare - needed))
        spare = needed
    return None


def favoured(planner: Planner, found: Priced) -> Priced:
    """The same ways with more slots for early layers, and what is expected of that."""
    pricing, shape = planner.choosing_pricing, planner.sensitivity
    if planner.early == 1:
        return found
    assert found.ways is not None
    early = is_early(shape.layers, shape.kv_heads)
    held = favour(found.held, early, planner.early, pricing.least(found.held, found.ways), planner.context)
    return pricing.expected(held, found.ways, found.retrieval_heads)


def selective(planner: Planner, found: Priced, budget: Budget) -> RetentionPlan:
    """The plan of a division that says how each head uses its slots."""
    plan, width = planner.of_division(found, "select", budget), planner.sensitivity.kv_heads
    assert found.ways is not None
    layers = tuple(
        tuple(
            planner.choosing_pricing.retention(kept, int(way))
            for kept, way in zip(layer, found.ways[i * width : (i + 1) * width], strict=True)
        )
        for i, layer in enumerate(plan.layers)
    )
    return replace(plan, layers=layers, made_from={**plan.made_from, "early": planner.early})


POLICIES: dict[str, Callable[[Planner, Budget], RetentionPlan]] = {
    "uniform": uniform,
    "class_table": class_table,
    "class_table_scaled": class_table_scaled,
    "retrieval_heads": retrieval_heads,
    "priced": priced,
    "select": select,
    "random": random,
    "inverse": inverse,
}
WITHOUT_BUDGET = ("class_table",)
WITHOUT_PRICES = ("uniform", "class_table", "class_table_scaled")
