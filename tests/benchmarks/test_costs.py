"""The cost programs: their plans keep the share they say, they run, and they say so when something is wrong."""

import json

import pytest
import torch
import typer
from transformers import LlamaConfig
from typer.testing import CliRunner

from benchmarks import decode_cost, kernel_cost, memory_cost, prefill_cost, step_cost, step_figure
from kvcompress.cache import fused_decode
from kvcompress.core.errors import InputError
from kvcompress.evaluation.decode_steps import plan_of
from kvcompress.ops.ragged_decode import Tuning
from tests.cache.cache_tools import model_of
from tests.project.project import ROOT

run = CliRunner().invoke


@pytest.fixture
def folder(tmp_path):
    model_of("llama").config.save_pretrained(tmp_path)
    return tmp_path


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


def test_decode_cost_compares_every_plan(folder, tmp_path):
    output = tmp_path / "cost.json"
    plan_of(model_of("llama").config, 40, 0.4, 0.0).save(tmp_path / "own.json")
    options = [
        "--plan",
        str(tmp_path / "own.json"),
        "--random-weights",
        "--context",
        "40",
        "--batch",
        "1",
        "--batch",
        "2",
        "--rounds",
        "1",
    ]
    done = run(decode_cost.app, [str(folder), *options, "--share", "1", "--share", "0.5", "--output", str(output)])
    assert done.exit_code == 0, done.output
    costs = json.loads(output.read_text())["costs"]
    names = ["DynamicCache", "100% uniform", "50% uniform", "50%, 13% of heads full", "own.json"]
    assert [(cost["contender"], cost["batch"]) for cost in costs] == [(name, b) for b in (1, 2) for name in names]
    assert all(cost["step_ms"] > 0 and cost["attention_ms"] > 0 for cost in costs)
    assert all(cost["step_ratio"] == cost["attention_ratio"] == 1 for cost in costs[::5])


def test_decode_cost_ends_with_one_sentence(tmp_path, folder):
    for arguments, message in (
        ([str(tmp_path / "nowhere")], "nowhere"),
        ([str(folder), "--random-weights", "--dtype", "int4"], "dtype is 'int4'"),
        ([str(folder), "--random-weights", "--share", "0.01", "--context", "64"], "slots a head"),
    ):
        done = run(decode_cost.app, arguments)
        assert done.exit_code == 1
        assert message in done.stderr


def test_resident_memory_falls_by_what_the_caches_say(tmp_path):
    """Fresh processes; little model and much cache, 262 MB of it in many layers, so that the difference stands out."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=32, head_dim=128, max_position_embeddings=4096,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    done = run(memory_cost.app, ["resident", str(tmp_path), "--context", "500", "--random-weights"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["predicted"] > 190e6
    assert abs(result["saved"] - result["predicted"]) < 0.1 * result["predicted"]


@pytest.mark.parametrize("positions", ["original", "cache"])
def test_a_short_soak_holds_memory_flat_and_logits_finite(positions):
    done = run(memory_cost.app, ["soak", "--tokens", "1500", "--positions", positions])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["finite"]
    assert result["cache_flat"]
    assert result["seen"] == 1500
    assert run(memory_cost.app, ["soak", "--positions", "elsewhere"]).exit_code == 1


def test_kernel_cost_ends_with_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, message in (
        ([], "found no CUDA device with triton"),
        (["--dtype", "float32"], "expected bfloat16 or float16"),
        (["--tuning", "64,2"], "expected four numbers"),
    ):
        done = run(kernel_cost.app, arguments)
        assert done.exit_code == 1
        assert message in done.output
        assert "Traceback" not in done.output


def test_the_best_settings_are_those_that_serve_every_shape():
    a, b, c = Tuning(32), Tuning(64), Tuning(128)
    assert kernel_cost.best_of_all([{a: 0.5, b: 0.6, c: 0.9}, {a: 0.9, b: 0.8}]) == b


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_kernel_cost_compares_three_ways_to_read(monkeypatch, tmp_path):
    shapes = (kernel_cost.Shape(8, 4, 64, 2, 300, 1), kernel_cost.Shape(4, 4, 80, 2, 300, 4))
    monkeypatch.setattr(kernel_cost, "SHAPES", shapes)
    output = tmp_path / "cost.json"
    done = run(kernel_cost.app, ["--rounds", "2", "--layers", "2", "--output", str(output)])
    assert done.exit_code == 0, done.output
    costs = json.loads(output.read_text())["costs"]
    assert [cost["shape"] for cost in costs] == [shape.name for shape in shapes]
    assert all(cost["kernel_error"] < 5e-3 for cost in costs)
    assert costs[0]["kept_megabytes"] == 2 * 2 * 2 * 64 * (300 + 3 * 132) / 1e6


def test_step_cost_measures_its_parts(tmp_path):
    """Tiny on a CPU, where steps are not captured."""
    output = tmp_path / "cost.json"
    options = ["--tiny", "--device", "cpu", "--rounds", "2", "--steps", "3", "--output", str(output)]
    done = run(step_cost.app, options)
    assert done.exit_code == 0, done.output
    result = json.loads(output.read_text())
    names = ["full, StaticCache", "plan", "full", "plan", "full, DynamicCache eager", "plan", "plan, eager"]
    assert [cost["contender"] for cost in result["step"]["costs"]] == names
    for cost in [*result["step"]["costs"], *result["growth"]["costs"]]:
        assert cost["limit_ms"] > 0
        assert cost["ms"] > 0
        assert not cost["captured"]
    rivals = [len(cost["faster_than"]) for cost in result["step"]["costs"]]
    assert rivals == [1, 1, 1, 1, 2, 2, 2]
    cells = [(cost["context"], cost["batch"], cost["contender"]) for cost in result["growth"]["costs"]]
    assert cells == [(c, b, name) for c in (64, 80) for b in (1, 2) for name in ("full", "plan")]
    assert 0 < result["batch"]["full"] < 0.5 * result["batch"]["plan"]
    assert 0.8 < result["memory"]["saved_of_predicted"] < 1.2


def test_step_cost_ends_with_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, message in (
        ([], "there is no CUDA device"),
        (["--part", "time"], "part is 'time', expected one of step, memory"),
        (["--tiny", "--device", "cpu", "--steps", "90"], "is shorter than the"),
        (["--tiny", "--device", "cpu", "--share", "0.01", "--part", "memory"], "slots a head"),
    ):
        done = run(step_cost.app, arguments)
        assert done.exit_code == 1
        assert message in done.output


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_step_cost_captures_its_steps(monkeypatch, tmp_path):
    monkeypatch.setattr(fused_decode, "FUSED", True)
    output = tmp_path / "cost.json"
    options = ["--tiny", "--rounds", "2", "--steps", "3", "--output", str(output), "--part", "step", "--part", "growth"]
    done = run(step_cost.app, options)
    assert done.exit_code == 0, done.output
    result = json.loads(output.read_text())
    assert [cost["captured"] for cost in result["step"]["costs"]] == [True, True, False, True, False]
    assert all(cost["captured"] for cost in result["growth"]["costs"])


def test_prefill_cost_compares_the_ways_to_read_a_prompt(tmp_path):
    output = tmp_path / "cost.json"
    options = ["--tiny", "--device", "cpu", "--tokens", "60", "--chunk", "25", "--rounds", "1", "--output", str(output)]
    done = run(prefill_cost.app, options)
    assert done.exit_code == 0, done.output
    costs = json.loads(output.read_text())["costs"]
    pieces = "dense, chunks of 25", "streaming, chunks of 25"
    assert [cost["contender"] for cost in costs] == ["dense", "exact", "streaming", *pieces]
    assert all(cost["ms"] > 0 for cost in costs)
    assert costs[3]["cache_mb"] == costs[0]["cache_mb"]
    assert all(cost["cache_mb"] < 0.4 * costs[0]["cache_mb"] for cost in (*costs[1:3], costs[4]))
    refused = run(prefill_cost.app, ["--tiny", "--device", "cpu", "--share", "0.01", "--tokens", "60"])
    assert refused.exit_code == 1
    assert "slots a head" in refused.stderr


def test_growth_is_drawn_from_a_report(tmp_path):
    report = ROOT / "reports/devices/nvidia-h100/batch_cost.json"
    costs = json.loads(report.read_text())["growth"]["costs"]
    figure = step_figure.step_figure(costs, "title")
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == [f"batch {batch}" for batch in sorted({cost["batch"] for cost in costs})]
    drawn = [y for axis in figure.axes for line in axis.lines for y in line.get_ydata()]
    assert max(drawn) == max(cost["ms"] for cost in costs)
    assert figure.axes[0].get_ylim()[0] == 0
    assert figure.axes[0].get_ylim()[1] > max(drawn)
    app = typer.Typer()
    app.command()(step_figure.main)
    assert run(app, [str(report), "--output", str(tmp_path / "growth.png")]).exit_code == 0
    assert (tmp_path / "growth.png").read_bytes()[:4] == b"\x89PNG"
    other = run(app, [str(ROOT / "reports/devices/nvidia-h100/kernel_cost.json"), "--output", str(tmp_path / "no.png")])
    assert "has no growth" in str(other.exception)
