"""The report page: everything found about a model in one HTML file. Run: python -m stages.report"""

from pathlib import Path
from typing import Annotated

import typer

from kvcompress.core.artifacts import write_text
from kvcompress.core.head_classes import load_classifications
from kvcompress.core.head_statistics import load_statistics, require_same_model
from kvcompress.core.outputs import require_outputs
from kvcompress.core.params import load_section
from kvcompress.core.plan import plans_of
from kvcompress.planning.params import BudgetParams
from kvcompress.reporting.page import Inputs, document, load_plans, load_prices, load_results, require_same_heads
from stages.common import DataDir, ParamsFile, ReportsDir, run, stage_app

app = stage_app()


@app.command()
def main(
    params: ParamsFile = Path("params.yaml"),
    data_dir: DataDir = Path("data"),
    reports_dir: ReportsDir = Path("reports"),
    output: Annotated[Path | None, typer.Option(help="The page [default: reports-dir/index.html].")] = None,
) -> None:
    """Write index.html from statistics, classes, prices, plans and results; a missing benchmark is left out."""
    target = output or reports_dir / "index.html"
    inputs = [data_dir / f"{name}.json" for name in ("head_statistics", "refined_classifications")]
    names = ("prices/prices", "ablation/ablation", "plan_comparison/plan_comparison", "benchmark/benchmark")
    inputs += [*(reports_dir / f"{name}.json" for name in names), *reports_dir.glob("plans/*/*.json")]
    require_outputs({"--params": params, "the input": inputs}, [target])
    context = load_section(BudgetParams, params).context_length
    statistics = load_statistics(data_dir / "head_statistics.json")
    path = data_dir / "refined_classifications.json"
    classes = load_classifications(path)
    require_same_model(statistics, classes, path)
    info = statistics.model_info
    prices = load_prices(reports_dir / "prices/prices.json")
    plans = load_plans(plans_of(reports_dir / "plans", info.model_id or "unknown"), context)
    require_same_heads(prices, plans, info.num_layers, info.num_heads)
    ablation, comparison = (
        load_results(reports_dir / f"{name}/{name}.json") for name in ("ablation", "plan_comparison")
    )
    benchmark = reports_dir / "benchmark/benchmark.json"
    timed = load_results(benchmark) if benchmark.is_file() else []
    page = document(Inputs(statistics, classes.ordered, prices, plans, ablation, comparison, context, timed))
    write_text(target, page)
    print(f"{target}: {len(page.encode()) / 1000:.0f} KB")


if __name__ == "__main__":
    run(app)
