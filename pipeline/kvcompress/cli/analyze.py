"""`kvcompress analyze MODEL`: statistics and classes of all heads."""

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
    TpPlan,
    Trust,
    model_params,
    open_model,
    print_json,
    read_texts,
)


def analyze(
    model: Model,
    text: Texts = None,
    output_dir: Annotated[Path, typer.Option(help="Where the results go.")] = Path("analysis"),
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each document.")] = 2048,
    documents_per_text: Annotated[int, typer.Option(min=1, help="Documents taken from each text.")] = 2,
    device: Device = "auto",
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    tp_plan: TpPlan = None,
    revision: Revision = "main",
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Measure and classify every attention head.

    Writes head_statistics.json, refined_classifications.json and validation_report.txt.

    Example: `kvcompress analyze HuggingFaceTB/SmolLM2-135M --text book.txt --output-dir smollm2`
    """
    params = model_params(model, device, dtype, device_map, revision, trust_remote_code, tp_plan)
    texts = read_texts(text)

    from kvcompress.analysis.classification import classify_heads
    from kvcompress.analysis.validation_report import validation_report
    from kvcompress.cli.head_map import class_map
    from kvcompress.collect.collect import collect_attention
    from kvcompress.collect.params import StatisticsParams
    from kvcompress.collect.statistics import compute_statistics, describe_measure
    from kvcompress.core.artifacts import write_text
    from kvcompress.core.head_classes import ClassificationFile, save_classifications
    from kvcompress.core.head_statistics import save_statistics
    from kvcompress.models import distributed
    from kvcompress.texts.corpora import documents_of_all

    loaded, tokenizer, record = open_model(params)
    batches = documents_of_all(tokenizer, texts, max_tokens, documents_per_text)
    batch = [tokens for found in batches.values() for tokens in found]
    sums, measure = collect_attention(loaded, batch, progress=not as_json), StatisticsParams()
    statistics = compute_statistics(sums, measure)
    origin = {"model_id": record.id, "revision": record.revision, "num_key_value_heads": record.num_key_value_heads}
    info = describe_measure(sums, measure, origin)
    classes = classify_heads(statistics, sink_size=measure.sink_size)
    if not distributed.leave():  # every process has the whole result, one writes it
        return
    save_statistics(output_dir / "head_statistics.json", statistics, info)
    save_classifications(output_dir / "refined_classifications.json", classes, info, "refined")
    write_text(output_dir / "validation_report.txt", validation_report(info, statistics, classes))
    file = ClassificationFile(model_info=info, taxonomy="refined", classifications=classes)
    if as_json:
        print_json(file.model_dump(mode="json", exclude_none=True))
    else:
        class_map(file)
        print(f"written to {output_dir}")
