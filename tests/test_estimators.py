"""The comparison of prices: the expensive one is its definition, and a plan's cost is what the oracle says."""

from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from kvcompress.artifacts import read_json
from kvcompress.cache.oracle import judged
from kvcompress.evaluation import estimators
from kvcompress.evaluation.estimators import direct, divergence, log_probabilities, plan_cost, plan_for
from kvcompress.retention import FULL, Retention
from tests.project import copy_project, stage_here
from tests.tiny import tiny_model


def tokens(count: int = 60) -> torch.Tensor:
    return torch.randint(1, 256, (count,), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", ["gpt_neox", "llama"])
def test_the_expensive_price_is_one_masked_head(name: str) -> None:
    model, ids = tiny_model(name), tokens()
    kv_heads = 4 if name == "gpt_neox" else 2
    found, full = direct(model, ids, [5, 20], 2, (2, kv_heads)), log_probabilities(model, ids)
    for window, layer, head in [(0, 0, 1), (1, 1, 0), (0, 1, 1)]:
        kept = [[FULL] * kv_heads for _ in range(2)]
        kept[layer][head] = Retention(2, [5, 20][window])
        with judged(model, kept):
            expected = divergence(full, log_probabilities(model, ids))
        assert found[window, layer, head] == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_plans_spend_the_share_and_cost_nothing_when_full() -> None:
    prices = np.random.default_rng(0).random((2, 2, 2))
    held = plan_for(prices, [5, 20], 2, 60, 0.25, 4)
    assert held.sum() == plan_for(None, [5, 20], 2, 60, 0.25, 4).sum() == 60
    model = tiny_model("llama")
    assert abs(plan_cost(model, [tokens()], np.full(4, 60), 2, (2, 2))) < 1e-6
    assert plan_cost(model, [tokens()], held, 2, (2, 2)) > 1e-4


def test_every_estimator_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = copy_project(tmp_path)
    monkeypatch.chdir(project)
    stage_here(project, "prepare")
    app = typer.Typer()
    app.command()(estimators.main)
    flags = ["--tokens", "100", "--window", "10", "--window", "40", "--others", "2", "--output", "found.json"]
    result = CliRunner().invoke(app, ["data", *flags])
    assert result.exit_code == 0, result.output
    rows = {row["estimator"]: row for row in read_json("found.json")["rows"]}
    assert set(rows) == {"uniform", *estimators.MEASURED, "output error x layer's rate", "fisher x layer's rate"}
    assert set(rows["direct"]["rank_correlation"].values()) == {1.0}
    assert all(len(row["plan_divergence"]) == 3 for row in rows.values())
