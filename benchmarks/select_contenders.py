"""Who competes where heads choose keys: every score in all heads alike, and plans by price of as many bytes."""

from collections.abc import Iterable, Sequence
from typing import Any

from kvcompress.core.errors import InputError
from kvcompress.core.plan import RetentionPlan
from kvcompress.core.retention import Retention
from kvcompress.evaluation.contenders import UNIFORM, Contender, full_cache, of_plan
from kvcompress.methods import AdaptiveCompressor
from kvcompress.models.architecture import Architecture
from kvcompress.planning.budget import Budget
from kvcompress.planning.policies import Planner
from kvcompress.scores.registry import SCORES
from kvcompress.scores.selection_rule import SelectionRule


def select_contenders(
    config: Any,
    shares: Sequence[float],
    tokens: int,
    sinks: int = 4,
    recent: float = 0.5,
    scores: Iterable[str] = tuple(SCORES),
    choosing: SelectionRule | None = None,
    more: int = 0,
    windows: Sequence[int] = (),
    adaptive: Iterable[str] = (),
) -> dict[str, Contender]:
    """The full cache and uniform plans `select <score> <share>`, each with the uniform sink + window of the same bytes.

    A head holds round(share * tokens) + more slots: sinks, of the rest a window of the part `recent`, and the others are
    chosen by the score. With `windows` there is one more plan for each, `..., window <w>`, whose window is that long. Of the
    scores among `adaptive` there is also `adaptive <score> <share>`, with as many slots in every layer, divided among its
    heads by the prompt. Where a score keeps queries, they take their room out of these slots. Raises `InputError` for
    shares that leave nothing to choose.
    """
    shape = Architecture.of_config(config)
    found, names, divided = [full_cache(shape)], tuple(scores), set(adaptive)
    size = shape.num_layers, shape.num_key_value_heads, shape.num_attention_heads
    rule = choosing or SelectionRule()
    kept_queries = -(-rule.observe * shape.num_attention_heads // (2 * shape.num_key_value_heads))  # in slots of a head
    for share in shares:
        slots, rival = round(share * tokens) + more, f"uniform {share:.2%}"
        if not 0 <= sinks < slots < tokens:
            raise InputError(
                f"{share:.2%} of {tokens} tokens and {more} are {slots} slots, expected fewer than all tokens and more than"
                f" {sinks} sinks"
            )
        even = RetentionPlan.uniform(Retention(sinks, slots - sinks), *size)
        found.append(of_plan(rival, UNIFORM, "select", even))
        for score in names:
            room = slots - sinks - (kept_queries if rule.score(score).needs_queries else 0)
            for fixed in (None, *windows):
                window, suffix = (round(recent * room), "") if fixed is None else (fixed, f", window {fixed}")
                if not 0 < window < room:
                    raise InputError(
                        f"{share:.2%} of {tokens} tokens and {more} are {sinks} sinks and {room} more slots with {score},"
                        f" expected room for a window{f' of {fixed}' if fixed else ''} and for keys to choose"
                    )
                kept, family = Retention(sinks, window, room - window, score), f"select {score}{suffix}"
                plan = RetentionPlan.uniform(kept, *size, policy=family)
                name = f"select {score} {share:.2%}{suffix}"
                found.append(of_plan(name, family, "select", plan, rival, choosing))
                if score in divided:
                    kind = f"adaptive {score}"
                    compressor = AdaptiveCompressor(sinks + room, score, sinks, window, choosing=choosing)
                    name, family = f"{kind} {share:.2%}{suffix}", f"{kind}{suffix}"
                    found.append(Contender(name, family, "select", compressor, sinks + room, None, rival))
    return {contender.name: contender for contender in found}


def policy_contenders(
    planner: Planner,
    policies: Iterable[str],
    shares: Sequence[float],
    tokens: int,
    choosing: SelectionRule,
    more: int = 0,
    label: str = "",
) -> dict[str, Contender]:
    """A plan `POLICY SHARE` + `label` of every policy, of as many slots in all as `select_contenders` gives its plans.

    Their rivals are the uniform plans there. Budgets count at the planner's context. Raises `InputError` for an unknown
    policy.
    """
    found = []
    for share in shares:
        budget = Budget.parse(f"{round(share * tokens) + more} tokens")
        for policy in policies:
            name, plan = f"{policy} {share:.2%}{label}", planner.plan(policy, budget)
            found.append(of_plan(name, policy, "select", plan, f"uniform {share:.2%}", choosing))
    return {contender.name: contender for contender in found}
