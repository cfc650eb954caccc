"""Decode steps at growing context, the benchmark's page and figure, and its stages as a person runs them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from kvcompress.core.errors import InputError
from kvcompress.core.head_classes import HeadClassification, HeadType, save_classifications
from kvcompress.core.plan import RetentionPlan
from kvcompress.core.retention import Retention
from kvcompress.evaluation.decode_steps import decode_growth, require_room, weight_bytes
from kvcompress.evaluation.params import BASELINES, METHODS, BenchmarkParams
from kvcompress.reporting.benchmark import GROWTH, QUALITY, SPEED, growth_data, method_data, report, terminal
from stages import benchmark, plot
from tests.project.project import copy_project, stage_here
from tests.tiny import tiny_model

SLOT = 2 * 8 * 4  # bytes of one head's K and V of one token: head_dim 8, float32
GROWTH_PARAMS = BenchmarkParams(growth_contexts=[64, 128], growth_batches=[1, 2], growth_rounds=2)


def test_decode_growth_beside_the_limit() -> None:
    model = tiny_model("llama")
    plans = {"mine": RetentionPlan.uniform(Retention(4, 28), 2, 2, 4)}
    plans["asks"] = RetentionPlan.uniform(Retention(4, 14, 14, "snapkv"), 2, 2, 4)  # has no queries here: left out
    rows = decode_growth(model, plans, GROWTH_PARAMS, bandwidth=1e6, progress=False)
    cells = [(row["context"], row["batch"], row["contender"]) for row in rows]
    assert cells == [(c, b, name) for c in (64, 128) for b in (1, 2) for name in ("full", "uniform 25%", "mine")]
    for row in rows:
        held = {"full": row["context"], "uniform 25%": row["context"] // 4, "mine": 32}[row["contender"]]
        nbytes = 4 * held * row["batch"] * SLOT
        assert row["megabytes"] * 1e6 == pytest.approx(nbytes, abs=51)  # rounded to 0.0001 MB
        assert row["attention_limit_ms"] == pytest.approx(nbytes / 1e3, abs=0.01)
        assert row["step_limit_ms"] == pytest.approx((weight_bytes(model) + nbytes) / 1e3, abs=0.01)
        assert row["step_p10"] <= row["step_ms"] <= row["step_p90"]
        assert row["contender"] != "full" or row["step_ratio"] == row["attention_ratio"] == 1
    columns = growth_data([{"growth": rows}])
    assert [row["context"] for row in columns] == [64, 128]
    assert columns[0]["mine"] == rows[2]["step_ms"]


def test_an_input_embedding_is_read_only_where_it_is_the_output_too() -> None:
    model = tiny_model("llama")
    everything = sum(weight.nbytes for weight in model.parameters())
    assert weight_bytes(model) == everything - 256 * 32 * 4
    tied = tiny_model("gpt2")
    assert weight_bytes(tied) == sum(weight.nbytes for weight in tied.parameters())


def test_a_context_must_fit_model_and_rounds() -> None:
    with pytest.raises(InputError, match=r"growth_contexts has 128, but the context of tiny ends at 100"):
        require_room(GROWTH_PARAMS, 100, "tiny")
    with pytest.raises(InputError, match=r"growth_contexts has 64, expected more than the 64 tokens that 30"):
        require_room(GROWTH_PARAMS.model_copy(update={"growth_rounds": 30}), 512, "tiny")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy_project(tmp_path_factory.mktemp("project"))
    stage_here(folder, "prepare")
    plan = RetentionPlan.uniform(Retention(2, 10), 2, 2, 4)
    plan.save(folder / "mine.json")
    plan.save(folder / "reports/plans/tiny/priced-25.json")
    heads = [HeadClassification(i, j, HeadType.MIXED, 0.5) for i in range(2) for j in range(4)]
    save_classifications(folder / "classes.json", heads)
    return folder


def invoke(folder: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> Any:
    monkeypatch.chdir(folder)
    return CliRunner().invoke(benchmark.app, flags)


def result_of(folder: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> dict[str, Any]:
    done = invoke(folder, monkeypatch, *flags, "--output", "out.json", "--metrics", "few.json")
    assert done.exit_code == 0, done.output
    result = json.loads((folder / "out.json").read_text())
    assert list(json.loads((folder / "few.json").read_text())) == [row["name"] for row in result["rows"]]
    return result


def names(result: dict[str, Any]) -> list[str]:
    return [row["name"] for row in result["rows"]]


def test_methods_by_flag(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--max_tokens", "40", "--max_new_tokens", "5", "--num_samples", "1")
    result = result_of(project, monkeypatch, "--method", "recent_only", "--method", "l2_compress", *flags)
    assert names(result) == ["full", "l2_compress", "recent_only"]
    assert (result["growth"], result["samples"]) == ([], ["seen"])
    assert all(row["tokens"] == 5 for row in result["rows"])
    result = result_of(project, monkeypatch, "--method", "head_aware", "--plan", "mine.json", "--no-growth", *flags)
    assert names(result) == ["full", "head_aware mine"]
    result = result_of(project, monkeypatch, "--method", "head_aware", "--no-growth", *flags)
    assert names(result) == ["full", "head_aware priced-25"]  # no classes, which a new threshold changes
    result = result_of(project, monkeypatch, "--method", "head_aware", "--classifications_path", "classes.json", *flags)
    assert names(result) == ["full", "head_aware"]
    assert {row["contender"] for row in result["growth"]} == {"full", "uniform 25%", "head_aware"}


def test_all_methods_and_their_page(project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (project / "data/refined_classifications.json").write_bytes((project / "classes.json").read_bytes())
    result = result_of(project, monkeypatch, "--compare_all")
    assert names(result) == [*METHODS, "head_aware priced-25"]
    assert result["settings"]["plans"] == ["priced-25"]
    assert result["copy_bytes_per_s"] > 0
    assert result["process_peak_bytes"] > result["weight_bytes"]
    for columns, rows in ((SPEED, result["rows"]), (QUALITY, result["rows"]), (GROWTH, result["growth"])):
        console = Console(width=80, record=True, file=(tmp_path / "table").open("w"))
        console.print(terminal(columns, rows))
        assert "…" not in console.export_text()
    done = CliRunner().invoke(plot.app, ["benchmark", "out.json", "--reports-dir", str(tmp_path)])
    assert done.exit_code == 0, done.output
    text = (tmp_path / "benchmark/benchmark.md").read_text()
    assert text == report([result])
    assert sum(line.startswith("| streaming_llm |") for line in text.splitlines()) == 2
    assert "48 tokens from seen, unseen" in text
    assert json.loads((tmp_path / "benchmark/plots/methods.json").read_text()) == method_data([result])
    assert [row["context"] for row in json.loads((tmp_path / "benchmark/plots/growth.json").read_text())] == [32, 48]
    assert (tmp_path / "benchmark/figures/growth.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "h2o"], r"--method is 'h2o', expected one of full, l2_compress"),
        (["--method", "head_aware", "--classifications-path", "none.json"], r"cannot read none.json"),
        (["--method", "head_aware", "--plan", "none.json"], r"cannot read none.json"),
        (["--max-tokens", "600"], r"benchmark.max_tokens is 600, but the context of tiny ends at 512"),
        (["--max-tokens", "510"], r"max_tokens \+ max_new_tokens is 519, but the context of tiny ends at 512"),
        (["--max-new-tokens", "2"], r"command line: max_new_tokens"),
        (["--num-samples", "99", "--method", "full"], r"text 'seen' has .* tokens, but 50 documents"),
    ],
)
def test_errors_are_one_sentence_and_nothing_is_written(
    project: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str
) -> None:
    done = invoke(project, monkeypatch, *flags, "--output", "never.json")
    assert isinstance(done.exception, InputError)
    assert re.search(message, str(done.exception)), done.exception
    assert not (project / "never.json").exists()


def test_head_aware_without_plans_is_refused_before_a_model_is_loaded(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["benchmark"]["plans"] = []
    (project / "no_plans.yaml").write_text(yaml.safe_dump(params))
    monkeypatch.setattr(benchmark, "load_model", lambda *_: pytest.fail("the model was loaded"))
    done = invoke(project, monkeypatch, "--method", "head_aware", "--params", "no_plans.yaml")
    assert isinstance(done.exception, InputError)
    assert "benchmark.plans is empty" in str(done.exception)


def test_a_page_needs_results(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    done = CliRunner().invoke(plot.app, ["benchmark", "classes.json"])
    assert re.search("classes.json is not a result for the report 'benchmark'", str(done.exception))


def test_the_pipeline_runs_every_method_once() -> None:
    text = (Path(__file__).parents[2] / "dvc.yaml").read_text()
    commands = re.findall(r"flags: ((?:--method \w+\s*)+)", text)
    assert [command.split()[1::2] for command in commands] == [list(BASELINES), ["head_aware"]]
