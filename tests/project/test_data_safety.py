"""Stages and commands lose no data: models, texts and plans stay, and impossible outputs are refused at once."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from kvcompress.cli.main import app
from kvcompress.cli.plan import prices_beside
from kvcompress.core.artifacts import read_json
from kvcompress.core.errors import InputError
from kvcompress.core.plan import RetentionPlan
from kvcompress.core.retention import FULL, Retention
from kvcompress.evaluation import compare
from tests.project.project import copy_project, run, stage_here
from tests.tiny import prose, save_tiny


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy_project(tmp_path_factory.mktemp("project"))
    for name in ("prepare", "collect_attention", "compute_stats", "classify"):
        stage_here(folder, name)
    stage_here(folder, "reclassify", "--reclassify", "--output-dir", "data")
    for name in ("a", "b"):
        kept = ((FULL, Retention(2, 30)), (Retention(2, 60), Retention(2, 20 if name == "a" else 40)))
        RetentionPlan(kept, 4, "tiny", "mine").save(folder / name / "plan.json")
    (folder / "taken").write_text("a file in the way")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def with_params(project: Path, name: str, **sections: Any) -> str:
    params = yaml.safe_load((project / "params.yaml").read_text())
    (project / name).write_text(yaml.safe_dump(params | sections))
    return name


def file_text(path: str, calibration: float = 0.6) -> dict[str, Any]:
    return {"source": "file", "file": path, "calibration": calibration}


@pytest.mark.parametrize("place", ["own/model", "own/model/inner", "own", "linked", "own/corpus/model"])
def test_prepare_refuses_a_model_or_text_in_what_it_replaces(project: Path, place: str) -> None:
    folder = project / place.removesuffix("linked") if place != "linked" else project / "own/model"
    if not (folder / "config.json").exists():
        save_tiny("llama", folder)
    if place == "linked" and not (project / place).exists():
        (project / place).symlink_to("own/model")
    params = with_params(project, "own.yaml", model={"source": "local", "local": {"path": place}})
    before = contents(project)
    result = stage_here(project, "prepare", "--params", params, "--data-dir", "own", check=False)
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: model.local.path {place} ")
    named = stage_here(project, "prepare", "--model-id", place, "--data-dir", "own", check=False)
    assert named.stderr.startswith(f"error: --model-id {place} ")
    assert contents(project) == before


def test_prepare_refuses_texts_in_what_it_replaces(project: Path) -> None:
    (project / "data/corpus/mine.txt").write_text(prose(300, 5))
    texts = {"mine": file_text("data/corpus/mine.txt"), "unseen": file_text("inputs/unseen.txt", 0)}
    params = with_params(project, "texts.yaml", corpus={"texts": texts})
    before = contents(project)
    result = stage_here(project, "prepare", "--params", params, check=False)
    assert result.stderr.startswith("error: corpus.texts.mine.file data/corpus/mine.txt lies in data/corpus")
    assert contents(project) == before
    (project / "data/corpus/mine.txt").unlink()


REFUSED = [
    ("collect_attention", ["--text", "data/corpus/calibration/seen.txt", "--output-dir", "inputs/tiny"], "the model"),
    ("collect_attention", ["--output-dir", "taken"], "cannot write"),
    ("compute_stats", ["--output-dir", "taken"], "cannot write"),
    ("classify", ["--output-dir", "linked-data", "--data-dir", "data"], "cannot write"),
    ("reclassify", ["--report", "data/head_statistics.json"], "the input data/head_statistics.json"),
    ("reclassify", ["--reclassify", "--report", "x.json", "--metrics", "x.json"], "two outputs"),
    ("measure_sensitivity", ["--output-dir", "taken"], "cannot write"),
    ("ablate", ["--output", "a/plan.json", "--plan", "a/plan.json"], "--plan a/plan.json would be overwritten"),
    ("ablate", ["--metrics", "params.yaml"], "--params params.yaml would be overwritten"),
    ("ablate", ["--output-dir", "taken"], "cannot write"),
    ("compare_plans", ["a/plan.json", "--output", "a/plan.json"], "--plan a/plan.json would be overwritten"),
    ("compare_plans", ["a/plan.json", "--output", "data"], "cannot write data: it is a folder, expected a file"),
    ("benchmark", ["--output", "data/model.json"], "the model's record data/model.json would be overwritten"),
    ("benchmark", ["--plan", "a/plan.json", "--output", "a/plan.json"], "--plan a/plan.json would be overwritten"),
    ("benchmark", ["--metrics", "taken/x.json"], "cannot write"),
    ("plot", ["--reports-dir", "taken"], "cannot write"),
    ("plot", ["--classifications-path", "reports/analysis/plots/heads.json"], "--classifications-path"),
    ("plot", ["ablation", "reports/ablation/ablation.json"], "the result reports/ablation/ablation.json lies in"),
    ("plot", ["benchmark", "reports/benchmark/x.json"], "the result reports/benchmark/x.json lies in"),
    ("report", ["--output", "data/head_statistics.json"], "the input data/head_statistics.json"),
]


@pytest.mark.parametrize(("name", "flags", "message"), REFUSED)
def test_a_stage_refuses_its_outputs_at_the_door(
    project: Path, monkeypatch: pytest.MonkeyPatch, name: str, flags: list[str], message: str
) -> None:
    monkeypatch.setattr("kvcompress.models.load.load_folder", None)  # the model is not loaded in vain
    if not (project / "linked-data").is_symlink():
        (project / "linked-data").symlink_to("taken")
    before = contents(project)
    result = stage_here(project, name, *flags, check=False)
    assert result.returncode == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert contents(project) == before


COMMANDS = [
    (["analyze", "inputs/tiny", "--output-dir", "inputs/tiny"], "MODEL inputs/tiny is only read"),
    (["analyze", "inputs/tiny", "-t", "found/head_statistics.json", "--output-dir", "found"], "--text found/head_stat"),
    (["analyze", "inputs/tiny", "--output-dir", "taken"], "cannot write"),
    (["plan", "inputs/tiny", "-o", "inputs/tiny/config.json"], "MODEL inputs/tiny is only read"),
    (["plan", "inputs/tiny", "-t", "inputs/seen.txt", "-o", "inputs/seen.txt"], "--text inputs/seen.txt would be"),
    (["plan", "inputs/tiny", "-o", "x.json", "--sensitivity", "x.json"], "two outputs are to be written to x.json"),
    (["plan", "inputs/tiny", "-o", "a/plan.json", "--sensitivity", "a/plan.json"], "--sensitivity a/plan.json would"),
    (["plan", "inputs/tiny", "-o", "a"], "cannot write a: it is a folder, expected a file"),
    (["plan", "inputs/tiny", "-o", "taken", "--budget", "25%", "--budget", "50%"], "cannot write"),
    (["plan", "inputs/tiny", "-o", "x.json", "--sensitivity", "taken/prices.safetensors"], "cannot write"),
    (["evaluate", "inputs/tiny", "--plan", "a/plan.json", "-t", "inputs/seen.txt", "-o", "a/plan.json"], "--plan a/"),
    (["evaluate", "inputs/tiny", "--plan", "a/plan.json", "-t", "inputs/seen.txt", "-o", "taken/x"], "cannot write"),
    (["benchmark", "inputs/tiny", "--plan", "a/plan.json", "-o", "a/plan.json"], "--plan a/plan.json would be"),
    (["benchmark", "inputs/tiny", "-o", "/proc/x.json"], "cannot write"),
]


def command(project: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> str:
    """Return the output of the command, or its error."""
    monkeypatch.chdir(project)
    result = CliRunner(env={"COLUMNS": "160", "NO_COLOR": "1"}).invoke(app, list(flags))
    if result.exception and not isinstance(result.exception, InputError):
        raise result.exception
    return str(result.exception or result.stdout)


@pytest.mark.parametrize(("flags", "message"), COMMANDS)
def test_a_command_refuses_its_outputs_at_the_door(
    project: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str
) -> None:
    monkeypatch.setattr("kvcompress.models.load.load_folder", None)
    (project / "found").mkdir(exist_ok=True)
    (project / "found/head_statistics.json").write_text("text")
    before = contents(project)
    assert message in command(project, monkeypatch, *flags)
    assert contents(project) == before


def test_allocate_writes_one_model_s_plans_and_leaves_the_rest(project: Path) -> None:
    stage_here(project, "measure_sensitivity")
    others = {"reports/plans/other/priced-25.json": "another model's", "reports/plans/README.md": "mine"}
    others |= {"reports/plans/tiny/priced-mine.json": "my own plan", "reports/plans/tiny/notes/a.txt": "mine too"}
    for name, text in others.items():
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(text)
    flags = ("--policy", "uniform", "--policy", "class_table")
    stage_here(project, "allocate", *flags, "--budget", "50%")
    stage_here(project, "allocate", *flags, "--budget", "25%")
    plans = {path.name for path in (project / "reports/plans/tiny").iterdir()}
    assert plans == {"uniform-25.json", "class_table.json", "priced-mine.json", "notes"}  # no budget of an earlier run
    assert {name: (project / name).read_text() for name in others} == others


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output-dir", "inputs"], "the model inputs/tiny would be overwritten"),
        (["--metrics", "data/model.json"], "the input data/model.json would be overwritten"),
        (["--report", "taken/x.txt"], "cannot write taken/x.txt: Not a directory"),
        (["--prices", "data/head_sensitivity.safetensors"], "the input data/head_sensitivity.safetensors would be"),
        (["--output-dir", "taken"], "cannot write taken/tiny: Not a directory"),
    ],
)
def test_allocate_refuses_its_outputs_at_the_door(project: Path, flags: list[str], message: str) -> None:
    before = contents(project)
    result = stage_here(project, "allocate", *flags, check=False)
    assert message in result.stderr
    assert contents(project) == before


def test_plans_of_one_file_name_are_compared_by_command_and_stage(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = ["--plan", "a/plan.json", "--plan", "b/plan.json"]
    small = ["--max-tokens", "128", "--documents-per-text", "1", "--retrieval-depths", "1"]
    command(
        project, monkeypatch, "evaluate", "inputs/tiny", *plans, "-t", "inputs/unseen.txt", *small, "-o", "two.json"
    )
    stage_here(project, "ablate", "--ablation", "sink_importance", *plans, "--output", "ablation.json")
    for file in ("two.json", "ablation.json"):
        result = read_json(project / file)
        rivals = {row["name"]: row["rival"] for row in result["rows"] if row["ablation"] == "plans" and "rival" in row}
        assert {name: rival["name"] for name, rival in rivals.items()} == {
            name: f"uniform = {name}" for name in ("a/plan", "b/plan")
        }
        assert all(abs(rival["bytes"] - 1) < 0.01 for rival in rivals.values())
    assert read_json(project / "two.json")["settings"]["plans"] == ["a/plan", "b/plan"]


def test_results_that_call_different_caches_by_one_name_are_not_drawn_as_one(project: Path) -> None:
    for name in ("a", "b"):
        stage_here(project, "compare_plans", f"{name}/plan.json", "--output", f"{name}.json")
    result = stage_here(project, "plot", "plan_comparison", "a.json", "b.json", check=False)
    assert "b.json and a.json have different caches 'plan'" in result.stderr
    assert not (project / "reports/plan_comparison").exists()


def test_a_device_takes_a_plan_and_prices_do_not_follow_it(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "null").symlink_to("/dev/null")
    prices = "data/head_sensitivity.safetensors"
    command(project, monkeypatch, "plan", "inputs/tiny", "-o", "null", "--sensitivity", prices)
    assert (project / "null").is_symlink()
    assert not Path("/dev/null").is_file()
    assert prices_beside(Path("/dev/null"), 1) == Path("plan-prices.safetensors")


def test_what_was_measured_is_kept_where_its_place_is_lost_meanwhile(
    project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def lose_the_place(*_: Any) -> dict[str, Any]:
        (project / "gone").write_text("a file where a folder was to be")
        return {"rows": [{"perplexity": 7.0}]}

    monkeypatch.setattr(compare, "compare_documents", lose_the_place)
    flags = ["--plan", "a/plan.json", "-t", "inputs/unseen.txt", "--max-tokens", "128", "-o", "gone/result.json"]
    said = command(project, monkeypatch, "evaluate", "inputs/tiny", *flags)
    assert said.startswith("cannot write gone/result.json: ")
    (kept,) = tmp_path.rglob("result.json")
    assert str(kept) in said
    assert read_json(kept)["rows"] == [{"perplexity": 7.0}]


def test_dvc_removes_no_weights_or_plans_before_a_stage(tmp_path: Path) -> None:
    folder = copy_project(tmp_path)
    save_tiny("llama", folder / "data/model")
    model = yaml.safe_load((folder / "params.yaml").read_text())["model"]
    with_params(folder, "params.yaml", model={**model, "local": {"path": "data/model"}})
    run(folder, "git", "init", "-q")
    weights = contents(folder / "data/model")
    result = run(folder, "dvc", "repro", "--single-item", "prepare", check=False)
    assert "model.local.path data/model would be overwritten" in result.stderr
    assert contents(folder / "data/model") == weights
    outs = yaml.safe_load((folder / "dvc.yaml").read_text())["stages"]["allocate"]["outs"]
    assert outs[0] == {"reports/plans": {"cache": False, "persist": True}}
