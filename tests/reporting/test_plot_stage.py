"""`stages.plot`: one folder a report, and clear errors."""

from pathlib import Path
from typing import Any

import pytest

from kvcompress.core.artifacts import read_json, write_json
from kvcompress.core.errors import InputError
from stages.plot import REPORTS, main
from tests.project.project import ROOT
from tests.reporting.page_files import ablation, benchmark, comparison, write_files

FIGURES = ("entropy_heatmap", "position_preference", "sink_ratio_analysis")
FIGURES += ("relative_position_by_type", "sink_vs_local_scatter", "entropy_by_type")
HOLDS = {
    "analysis": {"analysis_summary.txt", *(f"figures/{name}.png" for name in FIGURES)}
    | {f"plots/{name}.json" for name in ("classes", "layers", "heads")},
    "ablation": {"ablation.md", "ablation.json", "metrics.json", "figures/pareto.png", "figures/retrieval.png"}
    | {"plots/streaming.json", "plots/retrieval.json"},
    "plan_comparison": {"plan_comparison.md", "plan_comparison.json", "metrics.json"}
    | {f"figures/{name}.png" for name in ("pareto", "pareto_continuation", "retrieval")}
    | {f"plots/{name}.json" for name in ("streaming", "continuation", "retrieval")},
    "benchmark": {"benchmark.md", "benchmark.json", "metrics.json", "figures/growth.png"}
    | {"plots/methods.json", "plots/growth.json"},
}


def plot(folder: Path, name: str = "analysis", *results: Path) -> None:
    main(name, list(results), ROOT / "params.yaml", folder / "data", folder / "out")


def made(folder: Path, name: str, results: list[dict[str, Any]]) -> list[Path]:
    paths = [folder / f"data/{name}{i}.json" for i in range(len(results))]
    for path, result in zip(paths, results, strict=True):
        write_json(path, result)
    return paths


def test_every_report_has_a_folder_of_its_own(tmp_path: Path) -> None:
    folder = write_files(tmp_path)
    plot(folder)
    for name, results in (
        ("ablation", ablation("m")),
        ("plan_comparison", comparison("m")),
        ("benchmark", benchmark("m")),
    ):
        plot(folder, name, *made(folder, name, results))
    assert set(HOLDS) == set(REPORTS)
    for name, expected in HOLDS.items():
        place = folder / "out" / name
        assert {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()} == expected
    found = read_json(folder / "out/plan_comparison/metrics.json")
    assert found["priced-25"]["perplexity"] == 19
    assert found["continuation"]["snapkv 25%"] == {
        "share": 0.25,
        "perplexity": 17.8,
        "accuracy": 0.4,
        "kl": 0.01,
        "passkey": 0.5,
    }


def test_figures_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    paths = made(tmp_path, "plan_comparison", comparison("a $name$ with signs"))
    drawn = []
    for _ in range(2):
        plot(tmp_path, "plan_comparison", *paths)
        drawn.append({path.name: path.read_bytes() for path in (tmp_path / "out").rglob("*.png")})
    assert drawn[0] == drawn[1]


def test_errors_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the report is 'prices', expected one of analysis, ablation"):
        plot(tmp_path, "prices")
    with pytest.raises(
        InputError, match=r"ablation1.json was made with another model or other settings than .*ablation0"
    ):
        plot(tmp_path, "ablation", *made(tmp_path, "ablation", ablation("a") + ablation("b")))
    with pytest.raises(InputError, match="other.json is not a result for the report 'benchmark'"):
        write_json(tmp_path / "other.json", {"rows": []})
        plot(tmp_path, "benchmark", tmp_path / "other.json")
    assert not (tmp_path / "out").exists()
