"""Refined classes and the validation report. Run: python -m stages.reclassify --reclassify

With `--reclassify` the refined classes are made from the statistics; without it, the classes found beside them are only
validated. `--results-dir DIR` needs no more than DIR/head_statistics.json.
"""

from pathlib import Path
from typing import Annotated

import typer

from kvcompress.analysis.classification import classify_heads
from kvcompress.analysis.params import ThresholdParams, WindowParams
from kvcompress.analysis.validation_report import class_metrics, validation_report
from kvcompress.core.artifacts import write_json, write_text
from kvcompress.core.head_classes import load_classifications, save_classifications
from kvcompress.core.head_statistics import load_statistics, require_same_model
from kvcompress.core.outputs import require_outputs
from kvcompress.core.params import load_section
from stages.common import ParamsFile, run, stage_app

app = stage_app()


@app.command()
def main(
    params: ParamsFile = Path("params.yaml"),
    results_dir: Annotated[Path, typer.Option(help="Folder with head_statistics.json.")] = Path("data"),
    output_dir: Annotated[
        Path | None, typer.Option(help="Folder for the results [default: results-dir/validation].")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Where the report goes [default: in output-dir].")] = None,
    metrics: Annotated[Path | None, typer.Option(help="Also write the counts as JSON to this file.")] = None,
    reclassify: Annotated[bool, typer.Option("--reclassify", help="Classify anew by the refined rules.")] = False,
) -> None:
    """Write validation_report.txt and, with --reclassify, refined_classifications.json."""
    output = output_dir or results_dir / "validation"
    source, existing = results_dir / "head_statistics.json", results_dir / "head_classifications.json"
    refined = output / "refined_classifications.json" if reclassify else None
    report = report or output / "validation_report.txt"
    require_outputs({"--params": params, "the input": [source, existing]}, [refined, report, metrics])
    file = load_statistics(source)
    info = file.model_info
    found = load_classifications(existing) if existing.is_file() or not reclassify else None
    if found:
        require_same_model(file, found, existing)
    if refined:
        thresholds, windows = load_section(ThresholdParams, params), load_section(WindowParams, params)
        classes = classify_heads(file.head_statistics, thresholds, windows, info.sink_size)
        save_classifications(refined, classes, info, "refined")
    else:
        assert found
        classes = found.ordered
    first_pass = found.ordered if found and found.taxonomy == "first_pass" and reclassify else None
    text = validation_report(info, file.head_statistics, classes, first_pass)
    write_text(report, text)
    if metrics:
        write_json(metrics, class_metrics(info, classes))
    print(text)


if __name__ == "__main__":
    run(app)
