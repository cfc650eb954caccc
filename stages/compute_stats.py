"""Turn attention sums into head statistics; needs no model. Run: python -m stages.compute_stats"""

from pathlib import Path
from typing import Annotated

import typer

from kvcompress.collect.params import StatisticsParams
from kvcompress.collect.statistics import compute_statistics, describe_measure
from kvcompress.collect.sums import AttentionSums
from kvcompress.core.head_statistics import save_statistics
from kvcompress.core.outputs import require_outputs
from kvcompress.core.params import load_section
from stages.common import DataDir, ParamsFile, run, stage_app

app = stage_app()


@app.command()
def main(
    params: ParamsFile = Path("params.yaml"),
    data_dir: DataDir = Path("data"),
    output_dir: Annotated[
        Path | None, typer.Option(help="Where head_statistics.json goes (default: data-dir).")
    ] = None,
    sink_size: Annotated[int | None, typer.Option(help="First keys that count as sinks (1 ... 64).")] = None,
    local_window: Annotated[int | None, typer.Option(help="Last keys that count as local (1 ... 64).")] = None,
    recent_ratio: Annotated[float | None, typer.Option(help="Share of the visible keys that counts as recent.")] = None,
) -> None:
    """Entropy, sink, local and recent ratios and the distance profile of every head, in head_statistics.json."""
    measure = load_section(
        StatisticsParams, params, sink_size=sink_size, local_window=local_window, recent_ratio=recent_ratio
    )
    source, output = data_dir / "attention.safetensors", (output_dir or data_dir) / "head_statistics.json"
    require_outputs({"--params": params, "the input": source}, [output])
    sums, header = AttentionSums.load(source)
    origin = {key: header[key] for key in ("model_id", "revision", "num_key_value_heads")}
    info = describe_measure(sums, measure, origin)
    save_statistics(output, compute_statistics(sums, measure), info)


if __name__ == "__main__":
    run(app)
