"""The whole benchmark as one result, for the stage and the command line: checks first, then everything that is measured.

The result is what `benchmark_report` prints and `stages.plot_benchmark` reads: `{"model", "environment", "settings",
"samples", "rows", "weight_bytes", "copy_bytes_per_s", "growth", "process_peak_bytes"}`.
"""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvcompress.core.errors import InputError
from kvcompress.evaluation.benchmark import run_benchmark, samples_of
from kvcompress.evaluation.benchmark_methods import Entrant
from kvcompress.evaluation.benchmark_params import BenchmarkParams
from kvcompress.evaluation.benchmark_rows import benchmark_rows
from kvcompress.evaluation.decode_growth import decode_growth, require_room, weight_bytes
from kvcompress.evaluation.environment import environment
from kvcompress.evaluation.timing import copy_bandwidth, process_peak_bytes
from kvcompress.models.load import input_device


def require_fit(params: BenchmarkParams, max_context: int, model: str, growing: bool) -> None:
    """Raise `InputError` where prompt and new tokens, or with `growing` a context, do not fit the model."""
    length = params.max_tokens + params.max_new_tokens
    if length > max_context:
        raise InputError(
            f"benchmark.max_tokens + max_new_tokens is {length}, but the context of {model} ends at {max_context}"
        )
    if growing:
        require_room(params, max_context, model)


def benchmark_result(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    texts: dict[str, str],
    entrants: Sequence[Entrant],
    params: BenchmarkParams,
    growing: bool,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure `entrants` (the full cache first) on `texts`, and with `growing` decode steps at growing context too.

    `name` is the model's. Raises `InputError` where a text is too short for the samples.
    """
    samples = samples_of(tokenizer, texts, params)
    records = run_benchmark(model, samples, entrants, params, progress)
    weights = sum(weight.nbytes for weight in model.parameters())
    bandwidth = copy_bandwidth(input_device(model))
    plans = {entrant.name: entrant.plan for entrant in entrants if entrant.plan}
    result: dict[str, Any] = {"model": name, "environment": environment(model), "settings": params.model_dump()}
    result |= {"samples": [text for text, _ in samples], "rows": benchmark_rows(entrants, records, weights)}
    result |= {"weight_bytes": weight_bytes(model), "copy_bytes_per_s": round(bandwidth)}
    result |= {"growth": decode_growth(model, plans, params, bandwidth, progress) if growing else []}
    return result | {"process_peak_bytes": process_peak_bytes()}
