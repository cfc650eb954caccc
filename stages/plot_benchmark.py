"""Report and figure of the benchmark. Run: python -m stages.plot_benchmark data/benchmark_*.json"""

from pathlib import Path
from typing import Annotated

import typer

from kvcompress.core.artifacts import read_json, write_json, write_text
from kvcompress.core.errors import InputError
from kvcompress.core.params import load_section
from kvcompress.reporting.benchmark_plots import save_benchmark_plots
from kvcompress.reporting.benchmark_report import report
from kvcompress.reporting.params import PlotParams
from stages.common import ParamsFile, ReportsDir, run, stage_app

app = stage_app()


@app.command()
def main(
    results: Annotated[list[Path], typer.Argument(help="Results of `stages.benchmark --output`.")],
    params: ParamsFile = Path("params.yaml"),
    reports_dir: ReportsDir = Path("reports"),
) -> None:
    """Write benchmark.md, benchmark.json, plots/benchmark and figures/benchmark to REPORTS_DIR."""
    plots = load_section(PlotParams, params)
    found = [read_json(path) for path in results]
    for path, result in zip(results, found, strict=True):
        if not isinstance(result, dict) or not {"rows", "growth", "copy_bytes_per_s"} <= set(result):
            raise InputError(f"{path} is not the result of a benchmark: it has no rows, growth or copy_bytes_per_s")
    write_json(reports_dir / "benchmark.json", found)
    write_text(reports_dir / "benchmark.md", report(found))
    save_benchmark_plots(reports_dir / "plots/benchmark", reports_dir / "figures/benchmark", found, plots.dpi)


if __name__ == "__main__":
    run(app)
