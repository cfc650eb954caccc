"""Compare compression methods at equal bytes. Run: python -m stages.ablate --ablation all"""

from pathlib import Path
from typing import Annotated

import typer

from kvcompress.core.artifacts import write_json, write_text
from kvcompress.core.errors import InputError
from kvcompress.core.params import load_section
from kvcompress.evaluation.compare import compare, stream_beyond
from kvcompress.evaluation.contenders import ABLATIONS, ablation_contenders, plan_contenders
from kvcompress.evaluation.environment import environment
from kvcompress.evaluation.params import AblationParams
from kvcompress.evaluation.results import ResultStore
from kvcompress.models import distributed
from kvcompress.models.load import load_model
from kvcompress.texts.corpora import load_texts
from stages.common import Bf16, DataDir, Device, MaxTokens, MetricsFile, ModelId, ParamsFile, ResultFile, run, stage_app
from stages.model_run import chosen_model, model_params, require_apart_from_model, share_documents

app = stage_app()


@app.command()
def main(
    ablation: Annotated[list[str] | None, typer.Option(help="sink_importance, window_size, head_aware or all.")] = None,
    params: ParamsFile = Path("params.yaml"),
    data_dir: DataDir = Path("data"),
    output_dir: Annotated[Path, typer.Option(help="Folder for ablation.json and ablation.md.")] = Path("reports"),
    output: ResultFile = None,
    metrics_file: MetricsFile = None,
    classifications_path: Annotated[
        Path | None, typer.Option(help="Classes [default: data-dir/refined_classifications.json].")
    ] = None,
    plan: Annotated[list[Path] | None, typer.Option(help="Plan files that compete too.")] = None,
    model_id: ModelId = None,
    max_tokens: MaxTokens = None,
    bf16: Bf16 = None,
    device: Device = None,
) -> None:
    """Perplexity, accuracy, KL and retrieval of every contender on evaluation text, with intervals and bytes."""
    chosen = list(ABLATIONS) if not ablation or "all" in ablation else ablation
    for one in chosen:
        if one not in ABLATIONS:
            raise InputError(f"--ablation is {one!r}, expected all or one of {', '.join(ABLATIONS)}")
    classes = classifications_path or data_dir / "refined_classifications.json"
    outputs = [output] if output else [output_dir / "ablation.json", output_dir / "ablation.md"]
    require_apart_from_model(
        params, data_dir, model_id, [*outputs, metrics_file], classifications_path=classes, plan=plan
    )
    share_documents(params)
    settings = load_section(AblationParams, params, max_tokens=max_tokens)
    loading = model_params(params, model_id, bf16, device)
    record = chosen_model(data_dir, model_id, loading, settings, settings.max_tokens)
    texts = load_texts(data_dir / "corpus", "evaluation")
    model, tokenizer = load_model(record, loading)
    contenders = ablation_contenders(chosen, model.config, settings, classes)
    contenders |= plan_contenders(model.config, settings.max_tokens, plan or (), taken=contenders)
    store = ResultStore(data_dir / ".results", model=record.model_dump(), environment=environment(model))
    result = compare(model, tokenizer, record.id, texts, contenders, settings, store=store)
    if settings.beyond_tokens and "head_aware" in chosen:  # the stage that depends on classes
        table = str(classes) if classes.is_file() else None
        result["beyond"] = stream_beyond(model, tokenizer, texts, settings, table, record.max_context)
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
