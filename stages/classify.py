"""First-pass classes: positional, gathering, dead, mixed. Run: python -m stages.classify"""

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from kvcompress.analysis.classification import classify_heads
from kvcompress.analysis.params import ThresholdParams
from kvcompress.core.head_classes import save_classifications
from kvcompress.core.head_statistics import load_statistics
from kvcompress.core.outputs import require_outputs
from kvcompress.core.params import load_section
from stages.common import DataDir, ParamsFile, run, stage_app

app = stage_app()


@app.command()
def main(
    params: ParamsFile = Path("params.yaml"),
    data_dir: DataDir = Path("data"),
    output_dir: Annotated[Path | None, typer.Option(help="Where the classes go (default: data-dir).")] = None,
) -> None:
    """Read head_statistics.json and write head_classifications.json, the coarse taxonomy."""
    thresholds = load_section(ThresholdParams, params)
    source, output = data_dir / "head_statistics.json", (output_dir or data_dir) / "head_classifications.json"
    require_outputs({"--params": params, "the input": source}, [output])
    file = load_statistics(source)
    classes = classify_heads(file.head_statistics, thresholds, sink_size=file.model_info.sink_size, refined=False)
    save_classifications(output, classes, file.model_info, "first_pass")
    for kind, count in Counter(head.head_type.value for head in classes).most_common():
        print(f"{kind}: {count}")


if __name__ == "__main__":
    run(app)
