"""benchmarks.prefill compares all ways to read a prompt, and selection at equal bytes; no time is judged."""

from pathlib import Path

import pytest

from benchmarks.prefill import WINDOW, app
from kvcompress.core.plan import RetentionPlan
from kvcompress.core.retention import Retention
from tests.benchmarks.programs import refused, result_of
from tools import update_docs

TINY = ["--tiny", "--device", "cpu", "--rounds", "1"]


def test_prompts(tmp_path: Path) -> None:
    costs = result_of(app, ["prompts", *TINY], tmp_path)["costs"]
    pieces = "dense, chunks of 25", "streaming, chunks of 25"
    assert [cost["contender"] for cost in costs] == ["dense", "exact", "streaming", *pieces]
    assert all(cost["ms"] > 0 for cost in costs)
    assert costs[3]["cache_mb"] == costs[0]["cache_mb"]
    assert all(cost["cache_mb"] < 0.4 * costs[0]["cache_mb"] for cost in (*costs[1:3], costs[4]))


def test_scores_are_timed_at_the_same_bytes(tmp_path: Path) -> None:
    result = result_of(app, ["select", *TINY, "--score", "key_diff", "--score", "snapkv"], tmp_path)
    costs = result["costs"]
    assert [cost["contender"] for cost in costs] == [WINDOW, "key_diff", "snapkv"]
    assert len({cost["cache_mb"] for cost in costs}) == 1
    assert costs[0]["step_ratio"] == 1
    assert costs[0]["scoring"] == costs[0]["evidence_mb"] == 0 < costs[1]["evidence_mb"] < costs[2]["evidence_mb"]
    assert all(cost["prefill_ms"] > 0 and cost["step_ms"] > 0 for cost in costs)
    assert "Every KV head has 24 slots" in update_docs.choosing(result)


def test_heads_like_those_of_a_plan(tmp_path: Path) -> None:
    kept = (Retention(4, 20, 20, "snapkv"), Retention(4, 30), Retention(2, 8, 4, "key_norm"))
    RetentionPlan((kept,), 3, "some-model").save(tmp_path / "mixed.json")
    report = result_of(app, ["select", *TINY, "--like", str(tmp_path / "mixed.json")], tmp_path)
    window, plan = report["costs"]
    slots = (3 * 44 + 3 * 34 + 2 * 14) / 8  # eight heads in turn
    assert (window["contender"], plan["contender"]) == (f"window of {round(slots)}", "mixed")
    assert window["rival"] == plan["rival"] == window["contender"]
    assert (window["slots"], plan["slots"]) == (round(slots), slots)
    assert plan["cache_mb"] / window["cache_mb"] == pytest.approx(slots / round(slots))
    assert window["evidence_mb"] == 0 < plan["evidence_mb"]
    made = update_docs.choosing(report)
    assert "retentions of plans for some-model" in made
    assert f"| mixed | {plan['prefill_ms']:.0f} |" in made


def test_an_unknown_score() -> None:
    refused(app, ["select", *TINY, "--score", "magic"], "--score is 'magic', expected one of key_norm")
