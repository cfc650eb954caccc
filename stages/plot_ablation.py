"""Report and figures of the ablation. Run: python -m stages.plot_ablation data/ablation_*.json"""

from pathlib import Path
from typing import Annotated

import typer

from kvcompress.core.artifacts import read_json, write_json, write_text
from kvcompress.core.errors import InputError
from kvcompress.core.params import load_section
from kvcompress.evaluation.params import ScoringParams
from kvcompress.reporting.comparison_data import rows_of
from kvcompress.reporting.comparison_plots import save_ablation_plots
from kvcompress.reporting.comparison_report import report
from kvcompress.reporting.params import PlotParams
from stages.common import ParamsFile, ReportsDir, run, stage_app

app = stage_app()


@app.command()
def main(
    results: Annotated[list[Path], typer.Argument(help="Results of `stages.ablate --output`.")],
    params: ParamsFile = Path("params.yaml"),
    reports_dir: ReportsDir = Path("reports"),
    name: Annotated[str, typer.Option(help="Name of the report and of its folders of plots and figures.")] = "ablation",
) -> None:
    """Write NAME.md, NAME.json, plots/NAME and figures/NAME to REPORTS_DIR."""
    plots = load_section(PlotParams, params)
    found = [read_json(path) for path in results]
    for path, result in zip(results, found, strict=True):
        if not isinstance(result, dict) or "rows" not in result:
            raise InputError(f"{path} is not the result of an ablation: it has no rows")
        same = tuple(ScoringParams.model_fields)
        mine, first = result["settings"], found[0]["settings"]
        if result["model"] != found[0]["model"] or any(mine[name] != first[name] for name in same):
            raise InputError(f"{path} was made with another model or other settings than {results[0]}")
    rows = rows_of(found)
    settings = found[0]["settings"]
    subtitle = f"{found[0]['model']}, {rows[0]['tokens']} tokens in documents of {settings['max_tokens']}"
    write_json(reports_dir / f"{name}.json", found)
    write_text(reports_dir / f"{name}.md", report(found))
    beyond = next((result["beyond"] for result in found if "beyond" in result), None)
    figures, model = reports_dir / "figures" / name, found[0]["model"]
    save_ablation_plots(reports_dir / "plots" / name, figures, rows, subtitle, plots.dpi, beyond, model)


if __name__ == "__main__":
    run(app)
