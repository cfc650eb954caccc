"""Price every KV head's cache on calibration text. Run: python -m stages.measure_sensitivity"""

from pathlib import Path
from typing import Annotated

import typer

from kvcompress.core.errors import InputError
from kvcompress.core.params import load_section
from kvcompress.models import distributed
from kvcompress.models.load import load_model
from kvcompress.sensitivity.measure import measure_sensitivity
from kvcompress.sensitivity.params import SensitivityParams
from kvcompress.texts.corpora import load_texts
from stages.common import Bf16, DataDir, Device, MaxTokens, ModelId, ParamsFile, run, stage_app
from stages.model_run import chosen_model, model_params, require_apart_from_model, share_documents

app = stage_app()


@app.command()
def main(
    params: ParamsFile = Path("params.yaml"),
    data_dir: DataDir = Path("data"),
    output_dir: Annotated[
        Path | None, typer.Option(help="Where head_sensitivity.safetensors goes (default: data-dir).")
    ] = None,
    model_id: ModelId = None,
    max_tokens: MaxTokens = None,
    documents_per_text: Annotated[int | None, typer.Option(help="Documents taken from each text.")] = None,
    bf16: Bf16 = None,
    device: Device = None,
) -> None:
    """What every window costs in every KV head, on text and for far facts, in head_sensitivity.safetensors."""
    output = (output_dir or data_dir) / "head_sensitivity.safetensors"
    settings = load_section(SensitivityParams, params, max_tokens=max_tokens, documents_per_text=documents_per_text)
    loading = model_params(params, model_id, bf16, device)
    if model_id is not None and output_dir is None:
        raise InputError("--model-id needs --output-dir, or another model's results would stand in the pipeline's data")
    require_apart_from_model(params, data_dir, model_id, [output])
    share_documents(params)
    record = chosen_model(data_dir, model_id, loading, settings, settings.max_tokens)
    texts = load_texts(data_dir / "corpus", "calibration")
    model, tokenizer = load_model(record, loading)
    found = measure_sensitivity(model, tokenizer, texts, settings)
    if not distributed.leave():  # every process has the whole result, one writes it
        return
    found.origin |= {"model_id": record.id, "revision": record.revision, "dtype": loading.dtype}
    found.save(output)
    print(
        f"{found.layers} x {found.kv_heads} KV heads priced on {found.tokens} tokens and {len(found.retrieval)} facts"
    )


if __name__ == "__main__":
    run(app, shares=True)
