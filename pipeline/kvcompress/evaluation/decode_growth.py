"""How the cost of a decode step grows with the context, beside what the memory's speed allows.

The limit: a step has to read every weight and every byte of the cache once, append + attention the cache alone, and
neither can be faster than copying a large tensor on the same device just before. Caches hold random keys and values.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel

from kvcompress.core.errors import InputError
from kvcompress.core.plan import RetentionPlan
from kvcompress.evaluation.benchmark_params import FULL, BenchmarkParams
from kvcompress.evaluation.decode_steps import DENSE, appended, measure, plan_of
from kvcompress.scores.selection_rule import kept_query_slots


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that a decode step reads: all, but of an input embedding that serves as nothing else one row."""
    rows = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is rows
    return sum(weight.nbytes for weight in model.parameters()) - (0 if tied else rows.nbytes)


def require_room(params: BenchmarkParams, max_context: int, model: str) -> None:
    """Raise `InputError` where a context does not fit the model, or the tokens that are appended do not fit a context."""
    for context in params.growth_contexts:
        if context > max_context:
            raise InputError(
                f"benchmark.growth_contexts has {context}, but the context of {model} ends at {max_context}"
            )
        if context <= appended(params.growth_rounds):
            raise InputError(
                f"benchmark.growth_contexts has {context}, expected more than the {appended(params.growth_rounds)} "
                f"tokens that {params.growth_rounds} growth_rounds append"
            )


def decode_growth(
    model: PreTrainedModel,
    plans: Mapping[str, RetentionPlan],
    params: BenchmarkParams,
    bandwidth: float,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """One row a context, batch and cache: full, uniform at `params.share` of that context, and the plans.

    Caches end at `context` tokens. `bandwidth`: bytes a second. The limits are milliseconds. Plans that choose keys by
    queries are left out: these caches are filled with random keys, which no queries ever asked for.
    """
    weights, rows = weight_bytes(model), []
    plans = {name: plan for name, plan in plans.items() if not kept_query_slots(plan)}
    cells = [(context, batch) for context in params.growth_contexts for batch in params.growth_batches]
    for context, batch in tqdm(cells, desc="decode growth", unit="cell", disable=not progress):
        uniform = plan_of(model.config, context, params.share, 0.0)
        contenders = {f"uniform {params.share:.0%}": uniform, **plans}
        start = context - appended(params.growth_rounds)
        for cost in measure(model, contenders, start, batch, params.growth_rounds):
            held = cost.megabytes * 1e6
            row = asdict(cost) | {"contender": FULL if cost.contender == DENSE else cost.contender, "context": context}
            row = {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}
            row |= {"step_limit_ms": round(1000 * (weights + held) / bandwidth, 4)}
            rows.append(row | {"attention_limit_ms": round(1000 * held / bandwidth, 4)})
    return rows
