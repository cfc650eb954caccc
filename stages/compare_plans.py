"""Compare retention plans and published scores at equal bytes. Run: python -m stages.compare_plans"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from kvcompress.core.artifacts import write_json, write_text
from kvcompress.core.params import load_section
from kvcompress.core.plan import plans_of
from kvcompress.evaluation.compare import compare
from kvcompress.evaluation.contenders import plan_contenders, plan_files
from kvcompress.evaluation.environment import environment
from kvcompress.evaluation.params import ComparePlansParams
from kvcompress.evaluation.results import ResultStore
from kvcompress.models import distributed
from kvcompress.models.load import load_model
from kvcompress.texts.corpora import load_texts
from stages.common import Bf16, DataDir, Device, MaxTokens, MetricsFile, ModelId, ParamsFile, ResultFile, run, stage_app
from stages.model_run import chosen_model, model_params, require_apart_from_model, share_documents

app = stage_app()


@app.command()
def main(
    plan: Annotated[
        list[Path] | None, typer.Argument(help="Plan files, instead of those that params.yaml names.")
    ] = None,
    params: ParamsFile = Path("params.yaml"),
    data_dir: DataDir = Path("data"),
    plans_dir: Annotated[Path, typer.Option(help="Folder of plans, one folder a model.")] = Path("reports/plans"),
    output_dir: Annotated[Path, typer.Option(help="Folder for plan_comparison.json and plan_comparison.md.")] = Path(
        "reports"
    ),
    output: ResultFile = None,
    metrics_file: MetricsFile = None,
    model_id: ModelId = None,
    max_tokens: MaxTokens = None,
    bf16: Bf16 = None,
    device: Device = None,
) -> None:
    """Quality and facts found of every plan and score, and of the uniform cache of the same bytes, in two protocols."""
    outputs = [output] if output else [output_dir / f"plan_comparison.{suffix}" for suffix in ("json", "md")]
    read = plan or list(plans_dir.glob("*/*.json"))
    require_apart_from_model(params, data_dir, model_id, [*outputs, metrics_file], plan=read)
    share_documents(params)
    settings = load_section(ComparePlansParams, params, max_tokens=max_tokens)
    loading = model_params(params, model_id, bf16, device)
    record = chosen_model(data_dir, model_id, loading, settings, settings.max_tokens)
    texts = load_texts(data_dir / "corpus", "evaluation")
    model, tokenizer = load_model(record, loading)
    folder = plans_of(plans_dir, record.id)
    paths = plan or [folder / f"{name}.json" for name in settings.plans]
    scores = settings.scores if settings.context else ()
    contenders = plan_contenders(model.config, settings.max_tokens, paths, scores, settings.score_shares)
    streaming: Sequence[str] | None = None if plan else settings.streaming
    if streaming is None:
        streaming = list(plan_files(paths, scores, settings.score_shares))
    store = ResultStore(data_dir / ".results", model=record.model_dump(), environment=environment(model))
    result = compare(model, tokenizer, record.id, texts, contenders, settings, streaming, settings.context, store)
    if not distributed.leave():  # every process has the whole result, one writes it
        return
    write_json(outputs[0], result if output else [result])
    if not output:
        from kvcompress.reporting.comparison import report

        text = report([result])
        write_text(outputs[1], text)
        print(text)
    if metrics_file:
        from kvcompress.reporting.comparison import metrics

        write_json(metrics_file, metrics([result]))


if __name__ == "__main__":
    run(app, shares=True)
