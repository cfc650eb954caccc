"""Policies by name: each makes a retention plan from a budget."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from kvcompress.core.errors import InputError
from kvcompress.core.head_classes import ClassificationFile
from kvcompress.core.plan import RetentionPlan
from kvcompress.core.retention import FULL, Retention
from kvcompress.planning.budget import Budget
from kvcompress.planning.knapsack import level, scaled
from kvcompress.planning.pricing import WEIGHTS, Division, Pricing
from kvcompress.planning.reference_plans import class_table_plan, flat, inverted, shuffled
from kvcompress.scores.selection_rule import SelectionRule, kept_query_slots
from kvcompress.sensitivity.prices import Sensitivity


@dataclass
class Planner:
    """Makes plans for one model at one context length.

    Parameters
    ----------
    itemsize: bytes of an element of the cache.
    context: tokens at which a budget is counted.
    balance: value of answering every question about a far fact, nats a token of text.
    classifications: head classes, required by the two policies of the class table.
    choosing: rule by which the cache of a `select` plan selects keys.
    early: factor by which `select` favours early layers (`favour_early_layers`) [default: 1, prices alone].
    """

    sensitivity: Sensitivity
    model_id: str
    head_dim: int
    itemsize: int
    context: int
    balance: float
    classifications: ClassificationFile | None = None
    seed: int = 0
    choosing: SelectionRule = field(default_factory=SelectionRule)
    early: float = 1.0
    _best: dict[Budget, Division] = field(default_factory=dict, repr=False)

    @cached_property
    def pricing(self) -> Pricing:
        return Pricing(self.sensitivity, self.context)

    @property
    def heads(self) -> int:
        return self.sensitivity.layers * self.sensitivity.kv_heads

    def slots(self, budget: Budget) -> int:
        return budget.slots(self.heads, self.context, 2 * self.head_dim * self.itemsize)

    def plan(self, policy: str, budget: Budget) -> RetentionPlan:
        """Make the plan of a policy. Raises `InputError` for an unknown policy."""
        if policy not in POLICIES:
            raise InputError(f"unknown policy {policy!r}, expected one of {', '.join(POLICIES)}")
        return POLICIES[policy](self, budget)

    def best(self, budget: Budget) -> Division:
        """Division of the policy `priced`."""
        if budget not in self._best:
            self._best[budget] = self.pricing.best(self.slots(budget), self.balance)
        return self._best[budget]

    def plan_of_slots(self, held: np.ndarray, policy: str, budget: Budget, **made_from: Any) -> RetentionPlan:
        """Plan with sinks and a window in every head's slots, or the full cache if they reach the context."""
        return self._plan([self.retention(int(slots)) for slots in held], held, policy, budget, made_from)

    def plan_of_division(self, found: Division, policy: str, budget: Budget, **made_from: Any) -> RetentionPlan:
        """Plan of a division, with its expected cost."""
        expected = {
            "balance": self.balance,
            "retrieval_heads": found.retrieval_heads,
            "expected_divergence": round(found.text, 5),
            "expected_success": round(found.success, 4),
        }
        kept = [
            self.pricing.retention(self.retention(int(slots)), int(way))
            for slots, way in zip(found.held, found.ways, strict=True)
        ]
        return self._plan(kept, found.held, policy, budget, expected | made_from)

    def retention(self, slots: int) -> Retention:
        """Sinks and a window in so many slots; the full cache if they reach the context."""
        if slots >= self.context:
            return FULL
        sinks = min(self.sensitivity.sinks, slots - 1)
        return Retention(sinks, slots - sinks)

    def _plan(
        self, kept: Sequence[Retention], held: np.ndarray, policy: str, budget: Budget, made_from: dict[str, Any]
    ) -> RetentionPlan:
        width = self.sensitivity.kv_heads
        layers = tuple(tuple(kept[i : i + width]) for i in range(0, len(kept), width))
        spent = int(np.minimum(held, self.context).sum())
        figures = {budget.kind: budget.value, "context_length": self.context}
        figures |= {"share": spent / (self.heads * self.context)} if budget.kind != "share" else {}
        origin = {"texts": self.sensitivity.origin.get("texts", []), **made_from}
        query_heads = int(self.sensitivity.origin["num_attention_heads"])
        return RetentionPlan(layers, query_heads, self.model_id, policy, figures, origin)


def uniform(planner: Planner, budget: Budget) -> RetentionPlan:
    """Equal sinks and window for every head."""
    return planner.plan_of_slots(evenly(planner.slots(budget), planner.heads), "uniform", budget)


def evenly(slots: int, heads: int) -> np.ndarray:
    """`slots` over `heads`, the remainder spread over them."""
    return np.diff(np.arange(heads + 1) * slots // heads)


def priced(planner: Planner, budget: Budget) -> RetentionPlan:
    """Windows by measured price (`kvcompress.planning.pricing`)."""
    return planner.plan_of_division(planner.best(budget), "priced", budget)


def retrieval_heads(planner: Planner, budget: Budget) -> RetentionPlan:
    """Keep the full retrieval heads of `priced`, and give all other heads equal windows."""
    slots, count = planner.slots(budget), planner.best(budget).retrieval_heads
    held = np.full(planner.heads, planner.context)
    rest = planner.pricing.by_retrieval[count:]
    held[rest] = evenly(slots - count * planner.context, len(rest))
    return planner.plan_of_slots(held, "retrieval_heads", budget, retrieval_heads=count)


def class_table(planner: Planner, budget: Budget) -> RetentionPlan:
    """Retentions that the class table recommends, for any budget."""
    file, shape = planner.classifications, planner.sensitivity
    if file is None:
        raise InputError("the policies of the class table need a classification file")
    table = class_table_plan(file, shape.kv_heads)
    found, expected = (
        (table.num_layers, table.num_attention_heads),
        (shape.layers, shape.origin["num_attention_heads"]),
    )
    if found != expected:
        raise InputError(
            f"the classes are of another model than the prices: {found} layers and query heads, expected {expected}"
        )
    figures = {"share": table.share(planner.context), "context_length": planner.context}
    return replace(table, model_id=planner.model_id, budget=figures, made_from={"thresholds_of": file.taxonomy})


def class_table_scaled(planner: Planner, budget: Budget) -> RetentionPlan:
    """Slots of the class table, all multiplied by one factor that fits the budget."""
    table, slots = class_table(planner, budget), planner.slots(budget)
    shape = np.array([float(kept.held(planner.context)) for kept in flat(table)]).clip(1)
    held = scaled(shape, slots, 1, planner.context)
    rest = slots - int(held.sum())  # lost to rounding: one slot each to the first heads with room
    held[np.flatnonzero(held < planner.context)[: max(rest, 0)]] += 1
    return planner.plan_of_slots(held, "class_table_scaled", budget)


def random(planner: Planner, budget: Budget) -> RetentionPlan:
    """Control: the retentions of `priced`, dealt to random heads."""
    return shuffled(priced(planner, budget), planner.seed)


def inverse(planner: Planner, budget: Budget) -> RetentionPlan:
    """Control: the retentions of `priced`, the largest to the heads that had the smallest."""
    return inverted(priced(planner, budget))


def select(planner: Planner, budget: Budget) -> RetentionPlan:
    """Windows and keys that scores select, by measured price (`kvcompress.planning.pricing`).

    Queries that the cache keeps for scores count against the budget
    (`kvcompress.scores.selection_rule.kept_query_slots`). If they cost too much, heads select by other scores, or hold
    windows alone.
    """
    found = [affordable(planner, budget, menu) for menu in planner.pricing.menus()]
    best = min((one for one in found if one), key=lambda one: one.text - planner.balance * one.success)
    return planner.plan_of_division(best, "select", budget, early=planner.early)


def affordable(planner: Planner, budget: Budget, menu: Sequence[int]) -> Division | None:
    """Best division in these ways that leaves room for the queries it needs; None if there is too little room."""
    slots, spare = planner.slots(budget), 0
    while slots - spare >= planner.heads:  # the division decides which layers select, and so keep queries
        found = planner.pricing.best(slots - spare, planner.balance, menu, WEIGHTS)
        if planner.early != 1:
            found = favour_early_layers(planner, found)
        needed = kept_query_slots(planner.plan_of_division(found, "select", budget), planner.choosing)
        if needed <= spare:
            return replace(found, held=level(found.held, planner.context, spare - needed))
        spare = needed
    return None


def favour_early_layers(planner: Planner, found: Division) -> Division:
    """Give the first third of the layers `planner.early` times as many slots relative to the others.

    Prices are measured on one layer at a time in a text that was read in full. In a text that streams through a
    compressed cache, an early layer's loss enters the keys and values of all layers above it and accumulates, which no
    price of a single passage contains.
    """
    shape = planner.sensitivity
    early = np.arange(planner.heads) < shape.layers // 3 * shape.kv_heads
    held = favoured(found.held, early, planner.early, planner.pricing.least(found.held, found.ways), planner.context)
    return planner.pricing.expected(held, found.ways, found.retrieval_heads)


def favoured(held: np.ndarray, early: np.ndarray, factor: float, least: np.ndarray, most: int) -> np.ndarray:
    """Equal slots in total, those of `early` heads multiplied by `factor` relative to the others.

    held: slots of every head, `[head]`. Heads that hold `most` keep it. No other head falls below its `least` or rises
    above `most`.
    """
    full = held >= most
    fixed = np.where(full, held, least)
    found = scaled(held * np.where(early, factor, 1.0), int(held.sum()), fixed, np.where(full, held, most))
    return level(found, most, int(held.sum() - found.sum()))


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
