"""Fetch and check the model and the texts. Run: python -m stages.prepare"""

from pathlib import Path

from kvcompress.core.artifacts import write_json
from kvcompress.core.outputs import Paths, require_outputs
from kvcompress.core.params import load_section
from kvcompress.models.sources import resolve_model
from kvcompress.texts.corpora import prepare_corpus
from kvcompress.texts.params import CorpusParams
from stages.common import Bf16, DataDir, Device, ModelId, ParamsFile, run, stage_app
from stages.model_run import model_params

app = stage_app()


@app.command()
def main(
    params: ParamsFile = Path("params.yaml"),
    data_dir: DataDir = Path("data"),
    model_id: ModelId = None,
    bf16: Bf16 = None,
    device: Device = None,
) -> None:
    """Resolve the model to exact files, convert it where it must be, and cut the texts into calibration and evaluation."""
    corpus = load_section(CorpusParams, params)
    model = model_params(params, model_id, bf16, device)
    folder, texts_folder, file = data_dir / "model", data_dir / "corpus", data_dir / "model.json"
    inputs: dict[str, Paths] = {"--params": params}
    if model.source == "local" and model.local:
        inputs["model.local.path" if model_id is None else "--model-id"] = model.local.path
    for name, source in corpus.texts.items():
        if source.source == "file":
            inputs[f"corpus.texts.{name}.file"] = source.file
        elif source.dataset and source.source == "dataset" and Path(source.dataset.path).exists():
            inputs[f"corpus.texts.{name}.dataset.path"] = source.dataset.path
    require_outputs(inputs, [file], [folder, texts_folder])
    record = resolve_model(model, folder)
    write_json(file, record.model_dump())
    print(f"model: {record.id} ({record.revision}), {record.architecture}, {record.num_layers} layers")
    texts = prepare_corpus(corpus, texts_folder).texts
    for name, text in texts.items():
        judged = text.characters - text.calibration_characters
        print(f"text: {name}, {text.calibration_characters} characters for calibration, {judged} for evaluation")


if __name__ == "__main__":
    run(app)
