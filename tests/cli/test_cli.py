"""The `kvcompress` command on a tiny local model: every subcommand, its JSON, and its mistakes in one sentence."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvcompress.cli.main import app
from kvcompress.cli.plan import unpriced
from kvcompress.core.errors import KVCompressError
from kvcompress.core.plan import RetentionPlan
from kvcompress.core.retention import FULL, Retention
from kvcompress.evaluation.params import BASELINES
from kvcompress.planning.budget import Budget
from kvcompress.planning.policies import POLICIES, WITHOUT_PRICES, Planner
from tests.project.project import ROOT
from tests.tiny import prose, save_tiny, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    save_tiny("llama", folder / "tiny")
    (folder / "seen.txt").write_text(prose(300, 1))
    (folder / "unseen.txt").write_text(prose(300, 2))
    layers = ((FULL, Retention(2, 30)), (Retention(2, 60), Retention(2, 62)))
    RetentionPlan(layers, 4, "tiny", "mine").save(folder / "plan.json")
    return folder


def kvcompress(folder: Path, *flags: str, fails: int = 0) -> str:
    """Output of the command, run in this process inside `folder`; on a failure, its one sentence."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        result = CliRunner(env={"COLUMNS": "160", "NO_COLOR": "1"}).invoke(app, list(flags))
    finally:
        os.chdir(before)
    if isinstance(result.exception, KVCompressError):
        assert fails == 1
        return str(result.exception)
    assert result.exit_code == fails, (result.output, result.exception)
    return result.stdout


def test_the_program_ends_with_a_sentence_and_a_code(folder: Path) -> None:
    program = [sys.executable, "-c", "from kvcompress.cli.main import run; run()"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "pipeline")}
    for flags, code in ((["show", "missing.json"], 1), (["show", "--nonsense"], 2), (["--version"], 0)):
        result = subprocess.run([*program, *flags], cwd=folder, env=environment, capture_output=True, text=True)
        assert result.returncode == code
        assert "Traceback" not in result.stderr
        assert ("error: cannot read missing.json" in result.stderr) == (code == 1)


def test_help_names_every_command_with_an_example(folder: Path) -> None:
    commands = ("analyze", "plan", "generate", "evaluate", "benchmark", "show")
    overview = kvcompress(folder, "--help")
    assert all(f" {name} " in overview for name in commands)
    for name in commands:
        assert f"kvcompress {name} " in kvcompress(folder, name, "--help").replace("\n", " ")
    assert kvcompress(folder, "--version").strip() == "0.1.0"


def test_analyze_writes_what_the_pipeline_writes(folder: Path) -> None:
    flags = ["analyze", "tiny", "--text", "seen.txt", "--max-tokens", "200", "--output-dir", "found"]
    shown = kvcompress(folder, *flags)
    names = {path.name for path in (folder / "found").iterdir()}
    assert names == {"head_statistics.json", "refined_classifications.json", "validation_report.txt"}
    assert shown.splitlines()[0] == "layer  query heads"
    assert len(shown.splitlines()[1].split()) == 1 + 4
    as_json = json.loads(kvcompress(folder, *flags, "--json"))
    assert as_json == json.loads((folder / "found/refined_classifications.json").read_text())
    assert "layer  query heads" in kvcompress(folder, "show", "found/refined_classifications.json")
    assert "sink_ratio: 0." in kvcompress(folder, "show", "found/head_statistics.json", "--field", "sink_ratio")


def test_plan_prices_once_and_meets_every_budget(folder: Path) -> None:
    flags = [
        "plan",
        "tiny",
        "-t",
        "seen.txt",
        "--max-tokens",
        "512",
        "--context",
        "512",
        "--sensitivity",
        "prices.safetensors",
        "--facts-per-context",
        "2",
    ]
    made = json.loads(kvcompress(folder, *flags, "--budget", "25%", "--budget", "60 tokens", "-o", "plans", "--json"))
    assert [row["file"] for row in made] == ["plans/priced-25.json", "plans/priced-60tokens.json"]
    assert [RetentionPlan.load(folder / row["file"]).held(512) for row in made] == [512, 240]
    assert made[0]["bytes"] == 2 * 8 * 4 * 512
    before = (folder / "prices.safetensors").read_bytes()
    shown = kvcompress(folder, *flags, "--policy", "uniform", "--budget", "50%", "-o", "half.json")
    assert "half.json: 50.00% of the full cache" in shown
    assert (folder / "prices.safetensors").read_bytes() == before
    assert "far facts carried" in kvcompress(folder, "show", "prices.safetensors")
    assert len(json.loads(kvcompress(folder, "show", "prices.safetensors", "--json"))["price"]) == 2


def test_plan_keeps_the_prices_that_it_measured(folder: Path) -> None:
    flags = ["plan", "tiny", "-t", "seen.txt", "--max-tokens", "512", "--context", "512", "--documents-per-text", "1"]
    flags += ["--facts-per-context", "1", "--budget", "25%"]
    said = kvcompress(folder, *flags, "-o", "kept/mine.json")
    beside = "kept/mine-prices.safetensors"
    assert f"--sensitivity {beside}" in " ".join(said.split())
    again = json.loads(kvcompress(folder, *flags, "--sensitivity", beside, "-o", "kept/again.json", "--json"))
    assert again[0]["sensitivity"] == beside
    assert (folder / "kept/again.json").read_text() == (folder / "kept/mine.json").read_text()
    assert {path.name for path in (folder / "kept").iterdir()} == {"mine.json", "mine-prices.safetensors", "again.json"}


def test_prices_are_written_before_a_plan_is_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RetentionPlan, "save", interrupted)
    flags = ["plan", "tiny", "-t", "seen.txt", "--max-tokens", "512", "--documents-per-text", "1"]
    flags += ["--facts-per-context", "1", "--budget", "25%", "--budget", "50%", "-o", "cut"]
    kvcompress(folder, *flags, fails=130)
    assert [path.name for path in (folder / "cut").iterdir()] == ["prices.safetensors"]


def test_a_policy_without_prices_measures_nothing(folder: Path) -> None:
    flags = ["plan", "tiny", "--context", "512", "--budget", "25%", "--json"]
    made = json.loads(kvcompress(folder, *flags, "--policy", "uniform", "-t", "nowhere.txt", "-o", "free/uniform.json"))
    assert made[0]["sensitivity"] is None
    assert {path.name for path in (folder / "free").iterdir()} == {"uniform.json"}
    assert RetentionPlan.load(folder / "free/uniform.json").layers == ((Retention(4, 124),) * 2,) * 2
    kvcompress(folder, "analyze", "tiny", "-t", "seen.txt", "--max-tokens", "200", "--output-dir", "sorted")
    classes = ("--classifications", "sorted/refined_classifications.json")
    kvcompress(folder, *flags, "--policy", "class_table_scaled", *classes, "-o", "free/scaled.json")
    assert RetentionPlan.load(folder / "free/scaled.json").held(512) == 512


def test_the_policies_without_prices_are_all_that_never_look_at_them(folder: Path) -> None:
    """Every other policy fails where nothing was measured."""
    planner = Planner(unpriced(tiny_model("llama")), "tiny", 8, 4, 512, 1.0)
    for policy in set(POLICIES) - set(WITHOUT_PRICES):
        with pytest.raises((ValueError, IndexError)):
            planner.plan(policy, Budget.parse("25%"))


def test_generate_with_and_without_a_plan(folder: Path) -> None:
    flags = ["generate", "tiny", "--prompt-file", "seen.txt", "--max-new-tokens", "5", "--json"]
    (folder / "short.txt").write_text(prose(30, 1)[:300])
    flags[3] = "short.txt"
    found = json.loads(kvcompress(folder, *flags, "again", "--plan", "plan.json"))
    full = json.loads(kvcompress(folder, *flags, "again"))
    assert found["prompt_tokens"] == full["prompt_tokens"] == 300 + 1 + 5
    assert found["cache"]["seen"] == full["cache"]["seen"] == 306 + found["new_tokens"] - 1
    seen = found["cache"]["seen"]
    assert found["cache"]["bytes"] < full["cache"]["bytes"]
    assert found["cache"]["bytes"] >= RetentionPlan.load(folder / "plan.json").nbytes(seen, 8, 4)
    sampled = [kvcompress(folder, *flags[:-1], "x", "--temperature", "1.5", "--seed", seed) for seed in ("1", "1", "2")]
    assert sampled[0] == sampled[1] != sampled[2]


def test_generate_warns_of_a_prompt_past_the_context(folder: Path) -> None:
    """On standard error, with both numbers; what it prints stays JSON."""
    flags = ["--max-new-tokens", "5", "--plan", str(folder / "plan.json"), "--json"]
    said = {}
    for length in (507, 508, 600):
        result = CliRunner().invoke(app, ["generate", str(folder / "tiny"), "x" * length, *flags])
        assert result.exit_code == 0
        assert json.loads(result.stdout)["prompt_tokens"] == length
        said[length] = result.stderr
    assert "warning" not in said[507]
    for length in (508, 600):
        told = f"warning: the prompt has {length} tokens and up to 5 follow, but the context of tiny ends at 512"
        assert told in said[length]


def test_generate_warns_of_what_a_plan_was_not_made_for(folder: Path) -> None:
    plan = RetentionPlan.load(folder / "plan.json")
    for name, other in {"short": {"context_length": 64}, "long": {"context_length": 1000}}.items():
        replace(plan, budget=other).save(folder / f"{name}.json")
    said = {}
    for name in ("short", "long", "plan"):
        flags = ["--max-new-tokens", "2", "--plan", str(folder / f"{name}.json"), "--json"]
        said[name] = CliRunner().invoke(app, ["generate", str(folder / "tiny"), "x" * 200, *flags]).stderr
    share, before = plan.share(200), plan.share(64)
    told = f"short.json was made for 64 tokens, here are 200: it keeps {share:.1%} of them, against {before:.1%}"
    assert told in said["short"]
    assert "make one with --context 200 and a budget in percent" in said["short"]
    assert not said["long"]
    assert not said["plan"]


def test_generate_refuses_more_positions_than_a_table_has(folder: Path) -> None:
    save_tiny("gpt2", folder / "tabled")
    end = tiny_model("gpt2").config.max_position_embeddings
    prompt = ["generate", str(folder / "tabled"), "x" * end, "--max-new-tokens"]
    result = CliRunner().invoke(app, [*prompt, "2"])
    assert f"tabled knows {end} positions and no further ones" in str(result.exception)
    assert CliRunner().invoke(app, [*prompt, "1"]).exit_code == 0  # its answer is not read again


def test_a_plan_that_chooses_says_so_and_counts_what_it_chooses_by(folder: Path) -> None:
    plan = RetentionPlan.load(folder / "plan.json")
    kept = Retention(2, 16, 14, "key_diff")
    replace(plan, layers=((kept, Retention(4, 28)), plan.layers[1])).save(folder / "chooses.json")
    shown = kvcompress(folder, "show", "chooses.json", "--context", "64")
    assert "(c: also by content)" in shown
    assert shown.splitlines()[1].split() == ["0", "+", "32c+", "32"]
    assert "content" not in kvcompress(folder, "show", "plan.json", "--context", "64")


def test_evaluate_compares_at_equal_bytes(folder: Path) -> None:
    flags = ["evaluate", "tiny", "--plan", "plan.json", "-t", "unseen.txt", "--max-tokens", "128"]
    flags += ["--retrieval-length", "200", "--retrieval-depths", "1"]
    result = json.loads(kvcompress(folder, *flags, "--json", "-o", "result.json"))
    assert result == json.loads((folder / "result.json").read_text())
    assert [row["name"] for row in result["rows"]] == ["full cache", "plan", "uniform = plan"]
    assert result["rows"][1]["rival"]["bytes"] == pytest.approx(1, abs=0.01)
    shown = kvcompress(folder, *flags)
    assert "uniform = plan" in shown
    assert "the uniform cache of its bytes: perplexity" in " ".join(shown.split())


def test_benchmark_takes_turns_and_says_what_it_measured(folder: Path) -> None:
    flags = ["benchmark", "tiny", "-t", "unseen.txt", "--max-tokens", "160"]
    flags += ["--max-new-tokens", "5", "--num-samples", "1"]
    result = json.loads(kvcompress(folder, *flags, "--plan", "plan.json", "--json", "-o", "speed.json"))
    assert result == json.loads((folder / "speed.json").read_text())
    assert [row["name"] for row in result["rows"]] == ["full", *BASELINES, "head_aware plan"]
    assert (result["model"], result["samples"], result["growth"]) == ("tiny", ["unseen"], [])
    assert result["rows"][-1]["bytes_mean"] < result["rows"][0]["bytes_mean"]
    assert result["settings"]["share"] == pytest.approx(RetentionPlan.load(folder / "plan.json").share(160))
    one = [*flags, "--method", "recent_only", "--share", "0.5", "--json"]
    assert [row["settings"] for row in json.loads(kvcompress(folder, *one))["rows"]][1:] == ["window of 80"]
    both = json.loads(kvcompress(folder, *one, "--plan", "plan.json"))
    assert [row["name"] for row in both["rows"]] == ["full", "recent_only", "head_aware plan"]
    kvcompress(folder, "analyze", "tiny", "-t", "seen.txt", "--max-tokens", "200", "--output-dir", "classes")
    classes = ("--classifications-path", "classes/refined_classifications.json")
    shown = kvcompress(folder, *flags, "--compare-all", *classes)
    assert all(f" {name} " in shown for name in ("full", *BASELINES, "head_aware"))
    assert "1 prompt of 160 tokens from unseen" in " ".join(shown.split())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["analyze", "./nowhere"], "MODEL is './nowhere', which is neither an existing folder"),
        (["analyze", "tiny", "--dtype", "float8"], "--dtype is 'float8'"),
        (["analyze", "tiny", "--text", "missing.txt"], "missing.txt"),
        (["plan", "tiny", "--budget", "lots"], "the budget is 'lots'"),
        (["generate", "tiny"], "there is no prompt"),
        (["generate", "tiny", "x", "--plan", "missing.json"], "missing.json"),
        (["generate", "tiny", "x", "--prefill", "magic"], "--prefill is 'magic'"),
        (["benchmark", "tiny", "--compare-all"], "head_aware needs --plan or --classifications-path"),
        (["benchmark", "tiny", "--method", "h2o"], "--method is 'h2o', expected one of full, l2_compress"),
        (["benchmark", "tiny", "--max-new-tokens", "2"], "command line: max_new_tokens"),
        (["benchmark", "tiny", "--max-tokens", "500"], "is 564, but the context of tiny ends at 512"),
        (["benchmark", "tiny", "--max-tokens", "40", "--plan", "missing.json"], "missing.json"),
        (["benchmark", "tiny", "--max-tokens", "40", "--growth"], "growth_contexts has 2048"),
        (["show", "tiny/config.json"], "holds no classes, statistics or plan"),
        (["show", "plan.json", "--context", "64", "--field", "nonsense"], None),
    ],
)
def test_mistakes_end_with_a_sentence(folder: Path, flags: list[str], message: str | None) -> None:
    if message is None:
        assert "slots held of 64, a row a layer, policy mine" in kvcompress(folder, *flags)
    else:
        assert message in kvcompress(folder, *flags, fails=1)
    kvcompress(folder, "analyze", "tiny", "--no-such-flag", fails=2)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--policy", "best"], "--policy is 'best', expected one of uniform, class_table"),
        (["--policy", "class_table"], "needs --classifications, a file of classes, found None"),
        (["--policy", "class_table_scaled", "--classifications", "nowhere.json"], "found nowhere.json"),
        (["--early", "3"], "--early is for --policy select alone, found --policy priced"),
        (["--policy", "uniform", "--balance", "1"], "--balance weighs prices, which --policy uniform does not look at"),
        (
            ["--policy", "class_table", "--classifications", __file__, "--budget", "9%"],
            "whatever --budget: leave it out",
        ),
    ],
)
def test_a_plan_that_cannot_be_made_is_refused_before_the_model_is_read(flags: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["plan", "no/such/model/folder", *flags])
    assert isinstance(result.exception, KVCompressError)
    assert said in str(result.exception)
