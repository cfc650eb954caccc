"""Reports, figures and data of `dvc plots` from finished results. Run: python -m stages.plot [analysis|ablation|…]

`analysis` draws head statistics and classes. `ablation`, `plan_comparison` and `benchmark` take result files that
`stages.ablate`, `stages.compare_plans` and `stages.benchmark` wrote with `--output`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kvcompress.core.artifacts import read_json, write_json, write_text
from kvcompress.core.errors import InputError
from kvcompress.core.outputs import Paths, require_outputs
from kvcompress.core.params import load_section
from kvcompress.evaluation.params import ScoringParams
from kvcompress.reporting.params import PlotParams
from stages.common import DataDir, ParamsFile, ReportsDir, run, stage_app

RESULTS = {
    "ablation": ("ablation_uniform.json", "ablation_head_aware.json"),
    "plan_comparison": ("plan_comparison.json",),
    "benchmark": ("benchmark_baselines.json", "benchmark_head_aware.json"),
}
REPORTS = ("analysis", *RESULTS)
HEADINGS = {"ablation": "Windows, sinks and the class table", "plan_comparison": "Plans"}
FIELDS = {"benchmark": {"rows", "growth", "copy_bytes_per_s"}}
SAME_CACHE = 0.01  # relative difference of the perplexity of one cache between two machines
app = stage_app()


def load(name: str, paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Read results. Raises `InputError` if a file is not of this kind, or if results cannot be in one report."""
    found, fields = [read_json(path) for path in paths], FIELDS.get(name, {"rows"})
    for path, result in zip(paths, found, strict=True):
        if not isinstance(result, dict) or not fields <= set(result):
            raise InputError(f"{path} is not a result for the report {name!r}: expected {', '.join(sorted(fields))}")
        if name == "benchmark":
            continue
        mine, first = result["settings"], found[0]["settings"]
        shared = set(ScoringParams.model_fields) & set(mine) & set(first)
        if result["model"] != found[0]["model"] or any(mine[key] != first[key] for key in shared):
            raise InputError(f"{path} was made with another model or other settings than {paths[0]}")
    if name != "benchmark":
        require_unique_names(paths, found)
    return found


def require_unique_names(paths: Sequence[Path], results: Sequence[dict[str, Any]]) -> None:
    """Raise `InputError` if two results have different caches of one name, of which a report would show only one."""
    from kvcompress.reporting.comparison import PROTOCOLS

    known: dict[tuple[str, str], tuple[Path, dict[str, Any]]] = {}
    for path, result in zip(paths, results, strict=True):
        for protocol, field in PROTOCOLS.items():
            for row in result.get(field, ()):
                place, other = known.setdefault((protocol, row["name"]), (path, row))
                if row["share"] != other["share"] or abs(row["perplexity"] / other["perplexity"] - 1) > SAME_CACHE:
                    raise InputError(f"{path} and {place} have different caches {row['name']!r}: expected unique names")


def plot_analysis(folder: Path, params: Path, data: Path, classes_path: Path, dpi: int) -> None:
    """Write the summary, the figures and the plot data of head statistics and classes."""
    from kvcompress.analysis.params import ThresholdParams
    from kvcompress.analysis.validation_report import analysis_summary
    from kvcompress.analysis.visualize import save_figures, save_plot_data
    from kvcompress.core.head_classes import load_classifications
    from kvcompress.core.head_statistics import load_statistics, require_same_model

    file, found = load_statistics(data / "head_statistics.json"), load_classifications(classes_path)
    require_same_model(file, found, classes_path)
    info, statistics, classes = file.model_info, file.head_statistics, found.ordered
    save_figures(folder / "figures", info, statistics, classes, load_section(ThresholdParams, params), dpi)
    write_text(folder / "analysis_summary.txt", analysis_summary(info, statistics, classes))
    save_plot_data(folder / "plots", statistics, classes)


def plot_comparison(folder: Path, name: str, results: Sequence[dict[str, Any]], dpi: int) -> None:
    """Write report, metrics, plot data and figures of an ablation or of a comparison of plans."""
    from kvcompress.core.matplotlib_setup import save_png
    from kvcompress.reporting.comparison import all_rows, metrics, pareto_data, report, retrieval_data
    from kvcompress.reporting.figures import comparison_figures

    write_text(folder / f"{name}.md", report(results, name.replace("_", " ").capitalize()))
    write_json(folder / "metrics.json", metrics(results))
    for protocol, rows in all_rows(results).items():
        write_json(folder / f"plots/{protocol}.json", pareto_data(rows))
    write_json(folder / "plots/retrieval.json", retrieval_data(results))
    for key, figure in comparison_figures(results, HEADINGS[name]).items():
        save_png(figure, folder / f"figures/{key}.png", dpi)


def plot_benchmark(folder: Path, results: Sequence[dict[str, Any]], dpi: int) -> None:
    """Write report, metrics, plot data and figures of a benchmark."""
    from kvcompress.core.matplotlib_setup import save_png
    from kvcompress.reporting.benchmark import growth_data, method_data, metrics, report
    from kvcompress.reporting.figures import growth_figure

    write_text(folder / "benchmark.md", report(results))
    write_json(folder / "metrics.json", metrics(results))
    write_json(folder / "plots/methods.json", method_data(results))
    write_json(folder / "plots/growth.json", growth_data(results))
    growth = [result for result in results if result["growth"]]
    for i, result in enumerate(growth, start=1):
        save_png(growth_figure(result), folder / f"figures/growth{'' if len(growth) == 1 else i}.png", dpi)


@app.command()
def main(
    name: Annotated[str, typer.Argument(help=f"{', '.join(REPORTS)}.")] = "analysis",
    results: Annotated[
        list[Path] | None, typer.Argument(help="Result files [default: those of the pipeline in data-dir].")
    ] = None,
    params: ParamsFile = Path("params.yaml"),
    data_dir: DataDir = Path("data"),
    reports_dir: ReportsDir = Path("reports"),
    classifications_path: Annotated[
        Path | None, typer.Option(help="Classes to draw [default: data-dir/refined_classifications.json].")
    ] = None,
) -> None:
    """Write REPORTS_DIR/NAME: the report, the results in one file, metrics.json, plots/ and figures/."""
    if name not in REPORTS:
        raise InputError(f"the report is {name!r}, expected one of {', '.join(REPORTS)}")
    dpi, folder = load_section(PlotParams, params).dpi, reports_dir / name
    paths = list(results or [data_dir / file for file in RESULTS.get(name, ["head_statistics.json"])])
    classes = classifications_path or data_dir / "refined_classifications.json"
    inputs: dict[str, Paths] = {"--params": params, "the result": paths, "--classifications-path": classes}
    require_outputs(inputs, [], [folder])
    if name == "analysis":
        plot_analysis(folder, params, data_dir, classes, dpi)
    else:
        found = load(name, paths)
        write_json(folder / f"{name}.json", found)
        if name == "benchmark":
            plot_benchmark(folder, found, dpi)
        else:
            plot_comparison(folder, name, found, dpi)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        print(file)


if __name__ == "__main__":
    run(app)
