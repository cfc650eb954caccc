"""Spend budgets on heads by policy: one plan file each. Run: python -m stages.allocate"""

import re
import shutil
from pathlib import Path
from typing import Annotated

import typer

from kvcompress.core.artifacts import read_model, replaced_folder, write_json, write_text
from kvcompress.core.head_classes import load_classifications
from kvcompress.core.head_statistics import load_statistics
from kvcompress.core.outputs import Paths, require_outputs
from kvcompress.core.params import load_section
from kvcompress.core.plan import plans_of
from kvcompress.models.sources import ModelRecord
from kvcompress.planning.budget import Budget
from kvcompress.planning.params import BudgetParams
from kvcompress.planning.policies import POLICIES, WITHOUT_BUDGET, Planner
from kvcompress.sensitivity.prices import Sensitivity
from kvcompress.sensitivity.report import price_report, price_rows
from stages.common import DataDir, ParamsFile, run, stage_app

PLAN_FILE = re.compile(rf"({'|'.join(POLICIES)})(-[0-9.e+-]+(tokens|MB)?)?\.json")  # as this stage names plans
app = stage_app()


def copy_others(old: Path, new: Path) -> None:
    """Copy from `old` to `new` everything but plan files that this stage names."""
    for path in old.iterdir() if old.is_dir() else ():
        if PLAN_FILE.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new / path.name, symlinks=True)
        else:
            shutil.copy2(path, new / path.name, follow_symlinks=False)


@app.command()
def main(
    params: ParamsFile = Path("params.yaml"),
    data_dir: DataDir = Path("data"),
    output_dir: Annotated[Path, typer.Option(help="Folder of plans, one folder a model.")] = Path("reports/plans"),
    report: Annotated[Path | None, typer.Option(help="Prices beside classes, as text [default: none].")] = None,
    metrics: Annotated[Path | None, typer.Option(help="What is expected of every plan, as JSON.")] = None,
    prices: Annotated[Path | None, typer.Option(help="The price of every KV head, as JSON for plots.")] = None,
    budget: Annotated[list[str] | None, typer.Option(help="25%, '512 tokens' or '40 MB', instead of params'.")] = None,
    policy: Annotated[list[str] | None, typer.Option(help="Policies instead of params'.")] = None,
    balance: Annotated[float | None, typer.Option(help="Nats a token that finding every far fact is worth.")] = None,
) -> None:
    """Write OUTPUT_DIR/MODEL/POLICY-BUDGET.json for every policy and budget. Plans of an earlier run are removed."""
    settings = load_section(BudgetParams, params, sizes=budget, policies=policy, balance=balance)
    record = read_model(data_dir / "model.json", ModelRecord)
    path = data_dir / "head_sensitivity.safetensors"
    classes_file, statistics_file = (
        data_dir / f"{name}.json" for name in ("refined_classifications", "head_statistics")
    )
    place = plans_of(output_dir, record.id)
    inputs: dict[str, Paths] = {"--params": params, "the model": record.path}
    inputs["the input"] = [data_dir / "model.json", path, classes_file, statistics_file]
    require_outputs(inputs, [report, metrics, prices], [place])
    sensitivity = Sensitivity.load(path)
    sensitivity.require_model(record.id, record.revision, path)
    itemsize = {"float32": 4}.get(sensitivity.origin.get("dtype", ""), 2)
    classes = load_classifications(classes_file)
    context = settings.context_length
    planner = Planner(
        sensitivity,
        record.id,
        record.head_dim,
        itemsize,
        context,
        settings.balance,
        classes,
        settings.random_seed,
        early=settings.early,
    )
    budgets = [Budget.parse(size) for size in settings.sizes]
    with replaced_folder(place) as folder:
        copy_others(place, folder)
        for name in settings.policies:
            for size in budgets[:1] if name in WITHOUT_BUDGET else budgets:
                plan = planner.plan(name, size)
                plan.save(folder / (f"{name}.json" if name in WITHOUT_BUDGET else f"{name}-{size.label}.json"))
    expected = {size.label: planner.best(size) for size in budgets}
    if metrics:
        rows = {
            label: {
                "retrieval_heads": best.retrieval_heads,
                "expected_divergence": round(best.text, 5),
                "expected_success": round(best.success, 4),
            }
            for label, best in expected.items()
        }
        write_json(metrics, rows)
    if prices:
        write_json(prices, price_rows(sensitivity))
    if report:
        statistics = load_statistics(statistics_file)
        held = {label: best.held for label, best in expected.items()}
        text = price_report(statistics, classes.ordered, sensitivity, held)
        write_text(report, text)
        print(text)


if __name__ == "__main__":
    run(app)
