"""Run the model over calibration text and keep the sums of its attention. Run: python -m stages.collect_attention"""

from pathlib import Path
from typing import Annotated

import typer

from kvcompress.collect.collect import collect_attention
from kvcompress.collect.params import CollectParams
from kvcompress.core.artifacts import read_text
from kvcompress.core.errors import InputError
from kvcompress.core.params import load_section
from kvcompress.models import distributed
from kvcompress.models.load import load_model
from kvcompress.texts.corpora import documents_of_all, load_texts
from stages.common import Bf16, DataDir, Device, MaxTokens, ModelId, ParamsFile, run, stage_app
from stages.model_run import chosen_model, model_params, require_apart_from_model, share_documents

app = stage_app()


@app.command()
def main(
    params: ParamsFile = Path("params.yaml"),
    data_dir: DataDir = Path("data"),
    output_dir: Annotated[
        Path | None, typer.Option(help="Where attention.safetensors goes (default: data-dir).")
    ] = None,
    model_id: ModelId = None,
    text: Annotated[Path | None, typer.Option(help="A UTF-8 file instead of the corpus's calibration texts.")] = None,
    max_tokens: MaxTokens = None,
    chunk_size: Annotated[
        int | None, typer.Option(help="Tokens fed at a time; changes memory, not the result.")
    ] = None,
    documents_per_text: Annotated[int | None, typer.Option(help="Documents taken from each text.")] = None,
    bf16: Bf16 = None,
    device: Device = None,
) -> None:
    """Sufficient statistics of every head's attention on the calibration texts, in OUTPUT_DIR/attention.safetensors."""
    output = (output_dir or data_dir) / "attention.safetensors"
    collect = load_section(
        CollectParams, params, max_tokens=max_tokens, chunk_size=chunk_size, documents_per_text=documents_per_text
    )
    settings = model_params(params, model_id, bf16, device)
    if model_id is not None and output_dir is None:
        raise InputError("--model-id needs --output-dir, or another model's results would stand in the pipeline's data")
    require_apart_from_model(params, data_dir, model_id, [output], text=text)
    share_documents(params)
    record = chosen_model(data_dir, model_id, settings, collect, collect.max_tokens)
    texts = load_texts(data_dir / "corpus", "calibration") if text is None else {text.name: read_text(text)}
    model, tokenizer = load_model(record, settings)
    batches = documents_of_all(tokenizer, texts, collect.max_tokens, collect.documents_per_text)
    turns = zip(*batches.values(), strict=True)  # texts take turns, lest stopping early leave some of them out
    sums = collect_attention(model, [one for turn in turns for one in turn], collect.chunk_size, stopping=collect)
    if not distributed.leave():  # every process has the whole result, one writes it
        return
    header = {"model_id": record.id, "revision": record.revision, "num_key_value_heads": record.num_key_value_heads}
    sums.save(output, {**header, "texts": sorted(texts), "dtype": settings.dtype})
    print(f"{sums.documents} documents of {collect.max_tokens} tokens from {', '.join(texts)}")


if __name__ == "__main__":
    run(app, shares=True)
