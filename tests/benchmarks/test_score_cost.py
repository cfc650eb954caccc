"""The program that times scores runs on every score, and says so when something is wrong."""

import json

from typer.testing import CliRunner

from benchmarks import score_cost
from kvcompress.scores.registry import SCORES

run = CliRunner().invoke


def test_every_score_is_timed_at_both_moments(tmp_path):
    output = tmp_path / "cost.json"
    options = ["--keys", "20", "--keys", "40", "--chunk", "8", "--rounds", "1", "--head-dim", "8"]
    done = run(score_cost.app, [*options, "--output", str(output)])
    assert done.exit_code == 0, done.output
    costs = json.loads(output.read_text())["costs"]
    moments = [("prefill", 20), ("stream", 8), ("prefill", 40), ("stream", 8)]
    expected = [
        (name, moment, queries)
        for moment, queries in moments
        for name in [*SCORES, *([score_cost.ATTENTION] if moment == "prefill" else [])]
    ]
    assert [(cost["score"], cost["moment"], cost["queries"]) for cost in costs] == expected
    assert all(cost["ms"] > 0 for cost in costs)


def test_heads_that_do_not_fit_are_refused():
    done = run(score_cost.app, ["--query-heads", "4", "--kv-heads", "3"])
    assert done.exit_code == 1
    assert "4 query heads on 3 KV heads" in done.output
