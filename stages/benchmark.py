"""Speed, memory and quality of methods on one run. Run: python -m stages.benchmark --compare-all"""

from pathlib import Path
from typing import Annotated

import typer

from kvcompress.core.artifacts import write_json
from kvcompress.core.errors import InputError
from kvcompress.core.params import load_section
from kvcompress.core.plan import plans_of
from kvcompress.evaluation.benchmark import benchmark_result, require_fit
from kvcompress.evaluation.contenders import benchmark_contenders, require_known
from kvcompress.evaluation.params import HEAD_AWARE, METHODS, BenchmarkParams
from kvcompress.models.load import load_model
from kvcompress.texts.corpora import load_texts
from stages.common import Bf16, DataDir, Device, MetricsFile, ModelId, ParamsFile, run, stage_app
from stages.model_run import chosen_model, model_params, require_apart_from_model

app = stage_app()


@app.command()
def main(
    method: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(METHODS)}; repeatable [default: all]. full always runs.")
    ] = None,
    compare_all: Annotated[bool, typer.Option("--compare-all", help="Every method.")] = False,
    params: ParamsFile = Path("params.yaml"),
    data_dir: DataDir = Path("data"),
    output: Annotated[Path | None, typer.Option(help="Write everything that was measured to this JSON file.")] = None,
    metrics_file: MetricsFile = None,
    classifications_path: Annotated[
        Path | None,
        typer.Option(
            help="Classes for head_aware [default: the plans of benchmark.plans; with all methods also the "
            "pipeline's classes]."
        ),
    ] = None,
    plan: Annotated[list[Path] | None, typer.Option(help="Retention plan for head_aware; repeatable.")] = None,
    plans_dir: Annotated[Path, typer.Option(help="Folder of the plans that benchmark.plans names.")] = Path(
        "reports/plans"
    ),
    num_samples: Annotated[int | None, typer.Option(help="Prompts.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens of a prompt.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens decoded after each prompt.")] = None,
    growth: Annotated[bool, typer.Option(help="With head_aware: time decode steps at growing context too.")] = True,
    model_id: ModelId = None,
    bf16: Bf16 = None,
    device: Device = None,
) -> None:
    """Time to first token, decoding, compression, bytes, perplexity and accuracy of methods that take turns."""
    everything = compare_all or not method
    methods = list(METHODS) if everything else list(method or ())
    require_known(methods)
    table = data_dir / "refined_classifications.json"
    classes, read = classifications_path or table, plan or list(plans_dir.glob("*/*.json"))
    require_apart_from_model(
        params, data_dir, model_id, [output, metrics_file], classifications_path=classes, plan=read
    )
    settings = load_section(
        BenchmarkParams, params, num_samples=num_samples, max_tokens=max_tokens, max_new_tokens=max_new_tokens
    )
    loading = model_params(params, model_id, bf16, device)
    record = chosen_model(data_dir, model_id, loading, settings, settings.max_tokens)
    growing = growth and HEAD_AWARE in methods and bool(settings.growth_contexts)
    require_fit(settings, record.max_context, record.id, growing)
    paths, chosen = list(plan or ()), classifications_path
    if not paths and chosen is None:
        paths = [plans_of(plans_dir, record.id) / f"{name}.json" for name in settings.plans]
        chosen = table if everything else None  # by itself, head_aware is the plans alone
        if not paths and chosen is None and HEAD_AWARE in methods:
            raise InputError(
                "benchmark.plans is empty: expected a plan for head_aware, --plan or --classifications-path"
            )
    texts = load_texts(data_dir / "corpus", "evaluation")
    model, tokenizer = load_model(record, loading)
    contenders = benchmark_contenders(methods, model.config, settings, chosen, paths)
    result = benchmark_result(model, tokenizer, record.id, texts, contenders, settings, growing)
    if output:
        write_json(output, result)
    else:
        from rich.console import Console

        from kvcompress.reporting.benchmark import show

        show(result, Console())
    if metrics_file:
        from kvcompress.reporting.benchmark import metrics

        write_json(metrics_file, metrics([result]))


if __name__ == "__main__":
    run(app)
