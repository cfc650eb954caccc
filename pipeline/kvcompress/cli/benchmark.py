"""`kvcompress benchmark MODEL --plan plan.json`: speed, memory and quality of methods that take turns on one machine."""

from pathlib import Path
from typing import Annotated

import typer

from kvcompress.cli.common import (
    AsJson,
    Device,
    DeviceMap,
    Dtype,
    Model,
    Revision,
    Texts,
    Trust,
    model_params,
    open_model,
    print_json,
    read_texts,
)
from kvcompress.core.errors import InputError
from kvcompress.evaluation.benchmark_params import BASELINES, HEAD_AWARE, METHODS


def methods_of(named: list[str] | None, everything: bool, has_files: bool) -> list[str]:
    """What takes part: the named methods, or with `everything` all; without either all that can be had.

    `has_files`: a plan or classes are given, which brings head_aware in. Raises `InputError` where head_aware is asked
    for without them.
    """
    if (everything or HEAD_AWARE in (named or ())) and not has_files:
        raise InputError(f"{HEAD_AWARE} needs --plan or --classifications-path, but neither is given")
    if everything:
        return list(METHODS)
    return [*(named or BASELINES), *([HEAD_AWARE] if has_files else [])]


def benchmark(
    model: Model,
    plan: Annotated[list[Path] | None, typer.Option(help="Retention plan for head_aware (repeatable).")] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{', '.join(METHODS)} (repeatable) [default: the baselines, and head_aware with a plan]. full always runs."
        ),
    ] = None,
    compare_all: Annotated[bool, typer.Option("--compare-all", help="Every method.")] = False,
    classifications_path: Annotated[
        Path | None, typer.Option(help="Classes for head_aware, as `analyze` writes.")
    ] = None,
    text: Texts = None,
    num_samples: Annotated[int | None, typer.Option(help="Prompts [default: 2].")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens of a prompt [default: 1024].")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens decoded after each prompt [default: 64].")] = None,
    share: Annotated[
        float | None, typer.Option(help="What baselines keep of a prompt [default: as the first plan, else 0.25].")
    ] = None,
    growth: Annotated[bool, typer.Option("--growth", help="Time decode steps at growing context too.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the whole result as JSON.")] = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    revision: Revision = "main",
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Time to first token, decoding, compression, bytes, perplexity and accuracy of methods that take turns.

    Baselines keep as many slots as the first plan does after the prompt, so that methods meet at equal bytes.

    Example: `kvcompress benchmark HuggingFaceTB/SmolLM2-135M --plan plan.json --max-tokens 2048`

    Example: `kvcompress benchmark HuggingFaceTB/SmolLM2-135M --method streaming_llm --share 0.1 --json`
    """
    methods = methods_of(method, compare_all, bool(plan or classifications_path))
    params = model_params(model, device, dtype, device_map, revision, trust_remote_code)
    texts = read_texts(text)

    from rich.console import Console

    from kvcompress.core.artifacts import write_json
    from kvcompress.core.params import override
    from kvcompress.core.plan import RetentionPlan
    from kvcompress.evaluation.benchmark_methods import entrants_for, require_known
    from kvcompress.evaluation.benchmark_params import BenchmarkParams
    from kvcompress.evaluation.benchmark_result import benchmark_result, require_fit
    from kvcompress.reporting.benchmark import show

    require_known(methods)
    amounts = {"num_samples": num_samples, "max_tokens": max_tokens, "max_new_tokens": max_new_tokens, "share": share}
    settings = override(BenchmarkParams(), **amounts)
    if plan and share is None:  # compare at equal bytes: a plan's share depends on the prompt's length
        settings = override(settings, share=RetentionPlan.load(plan[0]).share(settings.max_tokens))
    loaded, tokenizer, record = open_model(params)
    require_fit(settings, record.max_context, record.id, growth)
    entrants = entrants_for(methods, loaded.config, settings, classifications_path, plan or ())
    result = benchmark_result(loaded, tokenizer, record.id, texts, entrants, settings, growth, progress=not as_json)
    if output:
        write_json(output, result)
    if as_json:
        print_json(result)
    else:
        show(result, Console())
