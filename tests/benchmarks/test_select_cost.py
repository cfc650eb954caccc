"""The program that times choosing: its columns are measured, its mistakes told in a sentence."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.select_cost import WINDOW, app
from kvcompress.core.plan import RetentionPlan
from kvcompress.core.retention import Retention
from tools.cost_tables import choosing


def test_every_contender_is_timed_at_the_same_bytes(tmp_path: Path) -> None:
    output = tmp_path / "cost.json"
    flags = ["--tiny", "--device", "cpu", "--rounds", "1", "--score", "key_diff", "--score", "snapkv"]
    assert CliRunner().invoke(app, [*flags, "--output", str(output)]).exit_code == 0
    costs = json.loads(output.read_text())["costs"]
    assert [cost["contender"] for cost in costs] == [WINDOW, "key_diff", "snapkv"]
    assert len({cost["cache_mb"] for cost in costs}) == 1
    assert costs[0]["step_ratio"] == 1
    assert costs[0]["scoring"] == costs[0]["evidence_mb"] == 0 < costs[1]["evidence_mb"] < costs[2]["evidence_mb"]
    assert all(cost["prefill_ms"] > 0 and cost["step_ms"] > 0 for cost in costs)


def test_heads_like_those_of_a_plan(tmp_path: Path) -> None:
    kept = (Retention(4, 20, 20, "snapkv"), Retention(4, 30), Retention(2, 8, 4, "key_norm"))
    RetentionPlan((kept,), 3, "some-model").save(tmp_path / "mixed.json")
    output = tmp_path / "cost.json"
    flags = ["--tiny", "--device", "cpu", "--rounds", "1", "--like", str(tmp_path / "mixed.json")]
    assert CliRunner().invoke(app, [*flags, "--output", str(output)]).exit_code == 0
    report = json.loads(output.read_text())
    window, plan = report["costs"]
    slots = (3 * 44 + 3 * 34 + 2 * 14) / 8  # eight heads in turn
    assert (window["contender"], plan["contender"]) == (f"window of {round(slots)}", "mixed")
    assert window["rival"] == plan["rival"] == window["contender"]
    assert plan["slots"] == slots
    assert window["slots"] == round(slots)
    assert plan["cache_mb"] / window["cache_mb"] == pytest.approx(slots / round(slots))
    assert window["evidence_mb"] == 0 < plan["evidence_mb"]
    made = choosing(report)
    assert "heads that keep in turn what those of some-model do" in made
    assert f"| mixed | {plan['prefill_ms']:.0f} |" in made


def test_too_few_slots() -> None:
    result = CliRunner().invoke(app, ["--tiny", "--device", "cpu", "--share", "0.05"])
    assert result.exit_code == 1
    assert "5% of 96 tokens are 5 slots, expected at least 6" in result.output
