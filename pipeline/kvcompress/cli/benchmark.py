"""`kvcompress benchmark MODEL --plan plan.json`: speed, memory and quality of methods that decode in turns."""

from pathlib import Path
from typing import Annotated

import typer

from kvcompress.cli.options import AsJson, ModelOptions, Output, Texts, print_json, read_texts, share_of
from kvcompress.core.errors import InputError
from kvcompress.evaluation.params import BASELINES, HEAD_AWARE, METHODS, BenchmarkParams


def methods_of(named: list[str] | None, everything: bool, has_files: bool) -> list[str]:
    """Return the methods to run: the named ones, all with `everything`, else the baselines; head_aware with its files.

    has_files: a plan or classes are given. Raises `InputError` if head_aware is asked for without them.
    """
    if (everything or HEAD_AWARE in (named or ())) and not has_files:
        raise InputError(f"{HEAD_AWARE} needs --plan or --classifications-path, but neither is given")
    if everything:
        return list(METHODS)
    return [*(named or BASELINES), *([HEAD_AWARE] if has_files else [])]


def benchmark(
    options: ModelOptions,
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
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Time to first token, decoding, compression, bytes, perplexity and accuracy of methods that take turns.

    Baselines keep as many slots as the first plan does after the prompt, so that methods are compared at equal bytes.

    Example: `kvcompress benchmark HuggingFaceTB/SmolLM2-135M --plan plan.json --max-tokens 2048`

    Example: `kvcompress benchmark HuggingFaceTB/SmolLM2-135M --method streaming_llm --share 0.1 --json`
    """
    methods = methods_of(method, compare_all, bool(plan or classifications_path))
    options.check([output], plan=plan, classifications_path=classifications_path, text=text)
    texts = read_texts(text)

    from rich.console import Console

    from kvcompress.core.artifacts import write_json
    from kvcompress.core.params import override
    from kvcompress.core.plan import RetentionPlan
    from kvcompress.evaluation.benchmark import benchmark_result, require_fit
    from kvcompress.evaluation.contenders import benchmark_contenders, require_known
    from kvcompress.reporting.benchmark import show

    require_known(methods)
    amounts = {"num_samples": num_samples, "max_tokens": max_tokens, "max_new_tokens": max_new_tokens, "share": share}
    settings = override(BenchmarkParams(), **amounts)
    if plan and share is None:  # compare at equal bytes: a plan's share depends on the prompt's length
        settings = override(settings, share=share_of(RetentionPlan.load(plan[0]), settings.max_tokens))
    loaded, tokenizer, record = options.open()
    require_fit(settings, record.max_context, record.id, growth)
    contenders = benchmark_contenders(methods, loaded.config, settings, classifications_path, plan or ())
    result = benchmark_result(loaded, tokenizer, record.id, texts, contenders, settings, growth, progress=not as_json)
    if output:
        write_json(output, result)
    if as_json:
        print_json(result)
    else:
        show(result, Console())
