"""`kvcompress analyze MODEL`: statistics and classes of all heads."""

from pathlib import Path
from typing import Annotated

import typer

from kvcompress.cli.options import AsJson, Documents, ModelOptions, Texts, print_json, read_texts


def analyze(
    options: ModelOptions,
    text: Texts = None,
    output_dir: Annotated[Path, typer.Option(help="Where the results go.")] = Path("analysis"),
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each document.")] = 2048,
    documents_per_text: Documents = 2,
    as_json: AsJson = False,
) -> None:
    """Measure and classify every attention head.

    Writes head_statistics.json, refined_classifications.json and validation_report.txt.

    Example: `kvcompress analyze HuggingFaceTB/SmolLM2-135M --text book.txt --output-dir smollm2`
    """
    names = ("head_statistics.json", "refined_classifications.json", "validation_report.txt")
    statistics_file, classes_file, report_file = outputs = [output_dir / name for name in names]
    options.check(outputs, text=text)
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

    loaded, tokenizer, record = options.open()
    batches = documents_of_all(tokenizer, texts, max_tokens, documents_per_text)
    batch = [tokens for found in batches.values() for tokens in found]
    sums, measure = collect_attention(loaded, batch, progress=not as_json), StatisticsParams()
    statistics = compute_statistics(sums, measure)
    origin = {"model_id": record.id, "revision": record.revision, "num_key_value_heads": record.num_key_value_heads}
    info = describe_measure(sums, measure, origin)
    classes = classify_heads(statistics, sink_size=measure.sink_size)
    if not distributed.leave():  # every process has the whole result, one writes it
        return
    save_statistics(statistics_file, statistics, info)
    save_classifications(classes_file, classes, info, "refined")
    write_text(report_file, validation_report(info, statistics, classes))
    file = ClassificationFile(model_info=info, taxonomy="refined", classifications=classes)
    if as_json:
        print_json(file.model_dump(mode="json", exclude_none=True))
    else:
        class_map(file)
        print(f"written to {output_dir}")
