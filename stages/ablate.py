"""Compare compression methods at equal bytes. Run: python -m stages.ablate --ablation all"""

from pathlib import Path
from typing import Annotated, Any

import typer

from kvcompress.artifacts import read_model, write_json, write_text
from kvcompress.corpora import documents, load_texts
from kvcompress.errors import InputError
from kvcompress.evaluation.ablation import metrics, run_ablation
from kvcompress.evaluation.ablation_report import report
from kvcompress.evaluation.beyond import beyond_contenders, stream
from kvcompress.evaluation.contenders import ABLATIONS, Contender, contenders_for, plan_contenders
from kvcompress.evaluation.environment import environment
from kvcompress.facts import make_cases
from kvcompress.models import ModelRecord, load_model, locate_model
from kvcompress.params.ablation import AblationParams, PlanAblationParams
from kvcompress.params.base import load_section
from stages.common import Bf16, DataDir, Device, ModelId, ParamsFile, model_params, run, stage_app

app = stage_app()


@app.command()
def main(
    ablation: Annotated[
        list[str] | None, typer.Option(help="sink_importance, window_size, head_aware or all; or plans.")
    ] = None,
    params: ParamsFile = Path("params.yaml"),
    data_dir: DataDir = Path("data"),
    output_dir: Annotated[Path, typer.Option(help="Folder for ablation.json and ablation.md.")] = Path("reports"),
    output: Annotated[Path | None, typer.Option(help="Write only the rows, to this JSON file.")] = None,
    metrics_file: Annotated[
        Path | None, typer.Option("--metrics", help="The few numbers that dvc metrics shows.")
    ] = None,
    classifications_path: Annotated[
        Path | None, typer.Option(help="Classes [default: data-dir/refined_classifications.json].")
    ] = None,
    plan: Annotated[list[Path] | None, typer.Option(help="Plan files that compete too.")] = None,
    plans_dir: Annotated[Path, typer.Option(help="Folder of plans that `--ablation plans` compares.")] = Path(
        "reports/plans"
    ),
    model_id: ModelId = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens of each document.")] = None,
    bf16: Bf16 = None,
    device: Device = None,
) -> None:
    """Perplexity, accuracy, KL and retrieval of every contender on evaluation text, with intervals and bytes."""
    chosen = list(ABLATIONS) if not ablation or "all" in ablation else ablation
    of_plans = chosen == ["plans"]
    for one in chosen:
        if one not in ABLATIONS and not of_plans:
            raise InputError(f"--ablation is {one!r}, expected all, one of {', '.join(ABLATIONS)}, or plans alone")
    settings: AblationParams | PlanAblationParams
    if of_plans:
        settings = load_section(PlanAblationParams, params, max_tokens=max_tokens)
    else:
        settings = load_section(AblationParams, params, max_tokens=max_tokens)
    loading = model_params(params, model_id, bf16, device)
    record = read_model(data_dir / "model.json", ModelRecord) if model_id is None else locate_model(loading)[0]
    if settings.max_tokens > record.max_context:
        raise InputError(
            f"{settings.section}.max_tokens is {settings.max_tokens}, "
            f"but the context of {record.id} ends at {record.max_context}"
        )
    texts = load_texts(data_dir / "corpus", "evaluation")
    model, tokenizer = load_model(record, loading)
    classes = classifications_path or data_dir / "refined_classifications.json"
    contenders: dict[str, Contender] = {}
    paths = list(plan or ())
    if isinstance(settings, AblationParams):
        contenders = contenders_for(chosen, model.config, settings, classes)
    else:
        paths += [plans_dir / record.id.replace("/", "--") / f"{name}.json" for name in settings.plans]
    contenders |= plan_contenders(model.config, settings.max_tokens, paths)
    batch = {
        text: list(documents(tokenizer, text, content, settings.max_tokens, settings.documents_per_text))
        for text, content in texts.items()
    }
    lengths, depths = settings.retrieval_lengths, settings.retrieval_depths
    cases = make_cases(tokenizer, texts, lengths, depths, settings.retrieval_per_depth)
    rows = run_ablation(model, batch, cases, contenders, settings)
    result: dict[str, Any] = {"model": record.id, "texts": list(texts), "environment": environment(model)}
    result |= {"settings": settings.model_dump(), "rows": rows}
    if isinstance(settings, AblationParams) and settings.beyond_tokens and "window_size" in chosen:
        name, longest = max(texts.items(), key=lambda item: len(item[1]))
        (tokens,) = documents(tokenizer, name, longest, settings.beyond_tokens, 1)
        found = beyond_contenders(model.config, str(classes) if classes.is_file() else None, settings.sizes[-2])
        result["beyond"] = {"text": name, "context": record.max_context}
        result["beyond"]["rows"] = stream(model, tokens, found, settings.chunk_size)
    text = report([result])
    if output:
        write_json(output, result)
    else:
        write_json(output_dir / "ablation.json", [result])
        write_text(output_dir / "ablation.md", text)
    if metrics_file:
        write_json(metrics_file, metrics(rows))
    print(text)


if __name__ == "__main__":
    run(app)
