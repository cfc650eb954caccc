"""The report page: everything found about a model in one HTML file. Run: python -m stages.report"""

from pathlib import Path
from typing import Annotated

import typer

from kvcompress.core.artifacts import write_text
from kvcompress.core.head_classes import load_classifications
from kvcompress.core.head_statistics import load_statistics, require_same_model
from kvcompress.core.params import load_section
from kvcompress.core.plan import plans_of
from kvcompress.planning.params import BudgetParams
from kvcompress.reporting.page.document import document
from kvcompress.reporting.page.heads import require_same_heads
from kvcompress.reporting.page.inputs import load_plans, load_prices, load_results
from kvcompress.reporting.page.sections import Inputs
from stages.common import DataDir, ParamsFile, ReportsDir, run, stage_app

app = stage_app()


@app.command()
def main(
    params: ParamsFile = Path("params.yaml"),
    data_dir: DataDir = Path("data"),
    reports_dir: ReportsDir = Path("reports"),
    output: Annotated[Path | None, typer.Option(help="The page [default: reports-dir/index.html].")] = None,
) -> None:
    """Write index.html from statistics, classes, prices, plans and results; a benchmark is shown where there is one."""
    context = load_section(BudgetParams, params).context_length
    statistics = load_statistics(data_dir / "head_statistics.json")
    path = data_dir / "refined_classifications.json"
    classes = load_classifications(path)
    require_same_model(statistics, classes, path)
    info = statistics.model_info
    prices = load_prices(reports_dir / "plots/prices.json")
    plans = load_plans(plans_of(reports_dir / "plans", info.model_id or "unknown"), context)
    require_same_heads(prices, plans, info.num_layers, info.num_heads)
    benchmark = reports_dir / "benchmark.json"
    page = document(
        Inputs(
            statistics,
            classes.ordered,
            prices,
            plans,
            load_results(reports_dir / "ablation.json"),
            load_results(reports_dir / "plan_comparison.json"),
            context,
            load_results(benchmark) if benchmark.is_file() else None,
        )
    )
    target = output or reports_dir / "index.html"
    write_text(target, page)
    print(f"{target}: {len(page.encode()) / 1000:.0f} KB")


if __name__ == "__main__":
    run(app)
