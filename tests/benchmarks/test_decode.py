"""benchmarks.decode runs tiny, holds what the tables of docs/speed.md need, and says what is wrong; no time is judged."""

import pytest
import torch
from transformers import LlamaConfig

from benchmarks import decode
from benchmarks.decode import DYNAMIC, EAGER, FULL, PLAN, STATIC
from kvcompress.core.errors import InputError
from kvcompress.evaluation.decode_steps import plan_of
from tests.benchmarks.programs import refused, result_of
from tests.cache.cache_tools import model_of
from tools import update_docs

CUDA = torch.cuda.is_available()
DEVICE = ["--device", "cuda" if CUDA else "cpu"]


def test_plans_keep_their_share():
    config = LlamaConfig(num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, hidden_size=576)
    for share, full_heads in ((0.25, 0.0), (0.25, 0.13), (0.5, 0.4), (0.125, 0.0)):
        plan = plan_of(config, 8000, share, full_heads)
        assert abs(plan.share(8000) - share) < 0.001
        full = sum(kept.unbounded for layer in plan.layers for kept in layer)
        assert full == int(90 * full_heads)
    assert plan_of(config, 8000, 1.0, 0.0).share(8000) == 1
    with pytest.raises(InputError, match=r"leave .* slots a head"):
        plan_of(config, 8000, 0.25, 0.3)


def test_one_layer(tmp_path):
    result = result_of(decode.app, ["kernel", "--tiny", "--rounds", "2", *DEVICE], tmp_path)
    assert [cost["shape"] for cost in result["costs"]] == [shape.name for shape in decode.TINY_SHAPES]
    assert all(cost["dense_us"] > 0 and cost["by_group_us"] > 0 for cost in result["costs"])
    size = 4 if result["dtype"] == "float32" else 2
    assert result["costs"][0]["kept_megabytes"] == 2 * 2 * size * 64 * (300 + 3 * 132) / 1e6
    if CUDA:
        assert "| 4/4 x 80, batch 2, 300 tokens, 4 of 4 full |" in update_docs.kernel(result)
    else:
        assert all(cost["kernel_us"] is cost["kernel_ratio"] is None for cost in result["costs"])


def test_whole_steps(monkeypatch, tmp_path):
    monkeypatch.setitem(update_docs.MODELS, "tiny", "Tiny")
    result = result_of(decode.app, ["steps", "--tiny", "--rounds", "2", "--steps", "3", *DEVICE], tmp_path)
    costs = result["step"]["costs"]
    assert [cost["contender"] for cost in costs] == [STATIC, PLAN, FULL, PLAN, DYNAMIC, PLAN, EAGER]
    assert [len(cost["faster_than"]) for cost in costs] == [1, 1, 1, 1, 2, 2, 2]
    assert [cost["captured"] for cost in costs] == [CUDA, CUDA, CUDA, CUDA, False, CUDA, False]
    assert all(cost["limit_ms"] > 0 and cost["ms"] > 0 for cost in [*costs, *result["growth"]["costs"]])
    assert costs[0]["times_full"] == costs[2]["times_full"] == 1
    cells = [(cost["context"], cost["batch"], cost["contender"]) for cost in result["growth"]["costs"]]
    assert cells == [(c, b, name) for c in (64, 80) for b in (1, 2) for name in (FULL, PLAN)]
    assert 0 < result["batch"]["full"] < 0.5 * result["batch"]["plan"]
    assert f"| full, StaticCache | {'yes' if CUDA else 'no'} |" in update_docs.steps(result)
    assert f"**{result['batch']['plan']} rows of 64 tokens with the plan" in update_docs.batch(result)


def test_a_model_folder(tmp_path):
    folder = tmp_path / "model"
    model_of("llama").save_pretrained(folder)
    plan_of(model_of("llama").config, 40, 0.4, 0.0).save(tmp_path / "own.json")
    flags = ["--plan", str(tmp_path / "own.json"), "--context", "40", "--batch", "1", "--batch", "2", "--rounds", "1"]
    result = result_of(decode.app, ["model", str(folder), *flags, "--share", "1", "--share", "0.5"], tmp_path)
    names = ["DynamicCache", "100% uniform", "50% uniform", "own.json"]
    assert [(cost["contender"], cost["batch"]) for cost in result["costs"]] == [(n, b) for b in (1, 2) for n in names]
    assert all(cost["step_ms"] > 0 and cost["attention_ms"] > 0 for cost in result["costs"])
    assert all(cost["step_ratio"] == cost["attention_ratio"] == 1 for cost in result["costs"][::4])
    assert result_of(decode.app, ["model", "--tiny", "--rounds", "1"], tmp_path)["model"] == "tiny"


def test_errors_are_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, message in (
        (["kernel"], "has no CUDA device"),
        (["kernel", "--device", "cpu"], "pass --tiny"),
        (["steps"], "has no CUDA device"),
        (["steps", "--part", "time"], "--part is 'time', expected one of step, batch, growth"),
        (["steps", "--tiny", "--device", "cpu", "--steps", "90"], "is shorter than the"),
        (["model"], "expected a model folder"),
        (["model", str(tmp_path / "nowhere")], "nowhere"),
        (["model", "--tiny", "--share", "0.01"], "slots a head"),
    ):
        refused(decode.app, arguments, message)
