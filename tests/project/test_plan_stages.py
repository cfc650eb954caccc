"""The stages around plans: what they write, what they refuse, and equal bytes for every rival."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvcompress.core.errors import InputError
from kvcompress.core.head_classes import load_classifications
from kvcompress.core.head_statistics import load_statistics
from kvcompress.core.plan import RetentionPlan
from kvcompress.core.retention import FULL, Retention
from kvcompress.evaluation.contenders import FULL_CACHE, plan_contenders
from kvcompress.reporting.comparison_report import report
from kvcompress.scores.selection_rule import evidence_slots
from kvcompress.sensitivity.prices import Sensitivity
from kvcompress.sensitivity.report import price_report
from tests.project.project import copy_project, stage_here
from tests.tiny import CONFIGS

ANALYSIS = ("prepare", "collect_attention", "compute_stats", "classify", "reclassify --reclassify --output-dir data")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy_project(tmp_path_factory.mktemp("project"))
    for name in ANALYSIS:
        stage_here(folder, *name.split())
    stage_here(folder, "measure_sensitivity")
    flags = {"report": "price_report.txt", "metrics": "metrics/plans.json", "prices": "plots/prices.json"}
    stage_here(folder, "allocate", *(part for name, file in flags.items() for part in (f"--{name}", f"reports/{file}")))
    return folder


def test_there_is_a_plan_for_every_policy_and_budget(project: Path) -> None:
    (folder,) = (project / "reports/plans").iterdir()
    names = {path.stem for path in folder.glob("*.json")}
    policies = ("uniform", "class_table_scaled", "retrieval_heads", "priced", "select", "random", "inverse")
    assert names == {
        "class_table",
        *(f"{policy}-{size}" for policy in policies for size in ("6.25", "12.5", "25", "50")),
    }
    for path in folder.glob("*-*.json"):
        plan = RetentionPlan.load(path)
        held = plan.held(2048) + evidence_slots(plan)
        whole = plan.num_layers * plan.num_key_value_heads * 2048
        assert 100 * held / whole == pytest.approx(float(path.stem.split("-")[1]), rel=0.005)
        assert plan.policy == path.stem.split("-")[0]
        assert plan.made_from["texts"] == ["seen"]


def test_metrics_say_what_is_expected(project: Path) -> None:
    expected = json.loads((project / "reports/metrics/plans.json").read_text())
    assert list(expected) == ["6.25", "12.5", "25", "50"]
    divergence = [row["expected_divergence"] for row in expected.values()]
    assert divergence == sorted(set(divergence), reverse=True)


def test_prices_of_all_heads_are_plot_data(project: Path) -> None:
    rows = json.loads((project / "reports/plots/prices.json").read_text())
    sensitivity = Sensitivity.load(project / "data/head_sensitivity.safetensors")
    assert [(row["layer"], row["kv_head"]) for row in rows] == [(i, j) for i in range(2) for j in range(2)]
    assert {(row["sinks"], row["window"]) for row in rows} == {(4, 64)}
    price, facts = 1000 * sensitivity.prices()[1], sensitivity.retrieval.mean(0)
    assert [row["price"] for row in rows] == pytest.approx(price.reshape(-1), abs=6e-5)
    assert [row["facts"] for row in rows] == pytest.approx(facts.reshape(-1), abs=6e-5)


def test_prices_are_reported_by_class(project: Path) -> None:
    data = project / "data"
    text = (project / "reports/price_report.txt").read_text()
    for title in (
        "BY CLASS",
        "HIGHEST PRICES ON TEXT",
        "RETRIEVAL HEADS",
        "DO STATISTICS PREDICT",
        "WHAT A BUDGET GIVES",
    ):
        assert title in text
    sensitivity = Sensitivity.load(data / "head_sensitivity.safetensors")
    near = int(np.searchsorted(sensitivity.windows, min(128, sensitivity.windows[-1])))
    price = sensitivity.prices()[near]
    highest = np.unravel_index(int(price.argmax()), price.shape)
    line = text.split("HIGHEST PRICES ON TEXT")[1].splitlines()[3].split()
    assert line[0] == f"{highest[0]}.{highest[1]}"
    assert float(line[1]) == pytest.approx(price.max() * 1000, abs=6e-4)
    held = {"25": np.arange(4)}
    classes = load_classifications(data / "refined_classifications.json").ordered
    again = price_report(load_statistics(data / "head_statistics.json"), classes, sensitivity, held)
    assert again.split("WHAT A BUDGET GIVES")[0] == text.split("WHAT A BUDGET GIVES")[0]


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("allocate", ["--policy", "best"], "unknown policy 'best'"),
        ("allocate", ["--budget", "a lot"], "the budget is 'a lot'"),
        ("measure_sensitivity", ["--max-tokens", "4096"], "sensitivity.max_tokens is 4096"),
        ("measure_sensitivity", ["--model-id", "inputs/tiny"], "--model-id needs --output-dir"),
        ("compare_plans", ["missing.json"], "missing.json"),
        ("compare_plans", ["--max-tokens", "4096"], "compare_plans.max_tokens is 4096"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(project: Path, name: str, flags: list[str], message: str) -> None:
    plans = sorted((project / "reports/plans").rglob("*.json"))
    result = stage_here(project, name, *flags, check=False)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted((project / "reports/plans").rglob("*.json")) == plans


def test_sensitivity_of_another_model_is_refused(project: Path, tmp_path: Path) -> None:
    for file in (project / "data").glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    sensitivity = Sensitivity.load(project / "data/head_sensitivity.safetensors")
    sensitivity.origin = {**sensitivity.origin, "model_id": "other"}
    sensitivity.save(tmp_path / "head_sensitivity.safetensors")
    result = stage_here(
        project, "allocate", "--data-dir", str(tmp_path), "--output-dir", str(tmp_path / "p"), check=False
    )
    assert result.returncode == 1
    assert "was measured on other" in result.stderr
    assert not (tmp_path / "p").exists()


def test_plans_are_compared_without_dvc(project: Path, tmp_path: Path) -> None:
    (folder,) = (project / "reports/plans").iterdir()
    stage_here(project, "compare_plans", str(folder / "inverse-50.json"), "--output-dir", str(tmp_path))
    (result,) = json.loads((tmp_path / "plan_comparison.json").read_text())
    assert [row["name"] for row in result["rows"]] == [FULL_CACHE, "inverse-50", "uniform = inverse-50"]
    assert "inverse-50" in (tmp_path / "plan_comparison.md").read_text()
    assert report([result]) == (tmp_path / "plan_comparison.md").read_text()


def saved(folder: Path, name: str, **heads: Any) -> Path:
    kept = heads.get("kept", [[FULL, Retention(2, 10)], [Retention(2, 30), Retention(2, 50)]])
    RetentionPlan(tuple(map(tuple, kept)), 4, "m", "mine").save(folder / f"{name}.json")
    return folder / f"{name}.json"


def test_every_plan_meets_a_uniform_cache_of_its_bytes(tmp_path: Path) -> None:
    paths = [
        saved(tmp_path, "one"),
        saved(tmp_path, "two", kept=[[Retention(2, 10), FULL], [Retention(2, 50), Retention(2, 30)]]),
    ]
    found = plan_contenders(CONFIGS["llama"](), 128, paths)
    assert list(found) == [FULL_CACHE, "one", "uniform = one", "two"]  # equal bytes share a rival
    for name in ("one", "two"):
        mine, rival = found[name], found[str(found[name].rival)]
        assert mine.plan is not None
        assert rival.plan is not None
        assert mine.plan.held(128) == rival.plan.held(128)
    with pytest.raises(InputError, match=r"two.json is for \(2, 2, 4\)"):
        plan_contenders(CONFIGS["gpt_neox"](), 128, paths[1:])
