"""Figures, the text summary and the data of `dvc plots`. Run: python -m stages.plot"""

from pathlib import Path
from typing import Annotated

import typer

from kvcompress.analysis.params import ThresholdParams
from kvcompress.analysis.validation_report import analysis_summary
from kvcompress.analysis.visualize import save_figures, save_plot_data
from kvcompress.core.artifacts import write_text
from kvcompress.core.head_classes import load_classifications
from kvcompress.core.head_statistics import load_statistics, require_same_model
from kvcompress.core.params import load_section
from kvcompress.reporting.params import PlotParams
from stages.common import DataDir, ParamsFile, ReportsDir, run, stage_app

app = stage_app()


@app.command()
def main(
    params: ParamsFile = Path("params.yaml"),
    data_dir: DataDir = Path("data"),
    reports_dir: ReportsDir = Path("reports"),
    classifications_path: Annotated[
        Path | None, typer.Option(help="[default: data-dir/refined_classifications.json]")
    ] = None,
) -> None:
    """Draw every figure to REPORTS_DIR/figures/analysis and write the summary and the plot data beside them."""
    plots, thresholds = load_section(PlotParams, params), load_section(ThresholdParams, params)
    file = load_statistics(data_dir / "head_statistics.json")
    path = classifications_path or data_dir / "refined_classifications.json"
    found = load_classifications(path)
    require_same_model(file, found, path)
    info, statistics, classes = file.model_info, file.head_statistics, found.ordered
    for figure in save_figures(reports_dir / "figures/analysis", info, statistics, classes, thresholds, plots.dpi):
        print(figure)
    write_text(reports_dir / "analysis_summary.txt", analysis_summary(info, statistics, classes))
    save_plot_data(reports_dir / "plots", statistics, classes)


if __name__ == "__main__":
    run(app)
