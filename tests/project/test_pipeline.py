"""The pipeline as DVC sees it: what a stage declares is what it uses, and a threshold reruns only what depends on it."""

import ast
import json
import re
import subprocess
from functools import reduce
from hashlib import md5
from operator import getitem
from pathlib import Path

import pytest
import torch
import yaml

from tests.core.param_sections import CLASSES
from tests.project.project import ROOT, copy_project, run, stage_here
from tests.project.stage_files import STAGES, import_closure, script

BY_CLASS = {one.__name__: name for name, one in CLASSES.items()}
TIMED = re.compile("ablat|benchmark|plan|report")  # stages whose results hold seconds, or read those
PRINTING = {"ablate", "compare_plans", "benchmark"}  # print a report when started by hand, not under DVC
REPORTING = ROOT / "pipeline/kvcompress/reporting"
OF_ALL = {"stages/__init__.py", "pipeline/kvcompress/__init__.py"}  # nothing but a docstring and where the library lies


@pytest.mark.parametrize("stage", STAGES)
def test_no_import_escapes_the_stage_s_list(stage: str) -> None:
    """Every file that the script imports lies in a package or file of `deps`, and every listed package is imported."""
    declared = [dep for dep in STAGES[stage]["deps"] if dep.startswith(("stages/", "pipeline/"))]
    without = REPORTING if stage.split("@")[0] in PRINTING else None
    needed = {str(file.relative_to(ROOT)) for file in import_closure(script(stage), without)} - OF_ALL
    inside = {file for file in needed for dep in declared if file == dep or file.startswith(f"{dep}/")}
    assert needed <= inside
    packages = {dep for dep in declared if dep.startswith("pipeline/")}
    assert {dep for dep in packages if any(file.startswith(f"{dep}/") for file in needed)} == packages


@pytest.mark.parametrize("name", sorted(PRINTING))
def test_a_figure_reruns_no_comparison(name: str) -> None:
    """Stages that compare or time import the reporting package in a branch that `--output`, as in dvc.yaml, leaves out."""
    tree = ast.parse((ROOT / f"stages/{name}.py").read_text())
    top = [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert not any(module.startswith("kvcompress.reporting") for module in top)
    commands = [stage["cmd"] for key, stage in STAGES.items() if key.split("@")[0] == name]
    assert commands
    assert all(" --output " in command for command in commands)


def sections_read(file: Path) -> set[str]:
    """Sections of params.yaml that a file passes to `load_section`."""
    calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    names = [node.args[0] for node in calls if getattr(node.func, "id", None) == "load_section" and node.args]
    return {BY_CLASS[name.id] for name in names if isinstance(name, ast.Name) and name.id in BY_CLASS}


@pytest.mark.parametrize("stage", STAGES)
def test_params_are_the_sections_that_are_read(stage: str) -> None:
    source = script(stage)
    read = sections_read(source)
    if "model_params(" in source.read_text():
        read |= sections_read(ROOT / "stages/model_run.py") - {"machine"}
    assert read
    alike = [
        one for one in STAGES if one.split("@")[0] == stage.split("@")[0]
    ]  # stages of one script, with other flags
    assert {param.split(".")[0] for one in alike for param in STAGES[one]["params"]} == read


def test_every_stage_is_described_and_every_section_used() -> None:
    assert all(len(stage["desc"]) > 40 and stage["desc"].endswith(".") for stage in STAGES.values())
    used = {name.split(".")[0] for stage in STAGES.values() for name in stage["params"]}
    assert used == set(BY_CLASS.values()) - {"machine"}  # how many processes run a stage is no part of its result


def skipped(output: str) -> set[str]:
    return set(re.findall(r"Stage '([\w@]+)' didn't change, skipping", output))


def ran(output: str) -> set[str]:
    return set(re.findall(r"Running stage '([\w@]+)'", output))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy_project(tmp_path_factory.mktemp("project"))
    run(folder, "git", "init", "-q")
    run(folder, "git", "add", "-A")
    run(folder, "git", "commit", "-qm", "start")
    result = run(folder, "dvc", "repro")
    assert ran(result.stdout) == set(STAGES)
    run(folder, "git", "add", "-A")
    run(folder, "git", "commit", "-qm", "results")
    return folder


def test_a_second_run_does_nothing(project: Path) -> None:
    output = run(project, "dvc", "repro").stdout
    assert ran(output) == set()
    assert skipped(output) == set(STAGES)


def test_git_holds_reports_and_no_data(project: Path) -> None:
    tracked = run(project, "git", "ls-files", "data", "reports").stdout.split()
    assert [name for name in tracked if name.startswith("data")] == ["data/.gitignore"]
    figures = {name for name in tracked if name.endswith(".png")}
    assert len(figures) == 12
    for name in ("index.html", "benchmark/benchmark.md", "classes/metrics.json", "analysis/plots/heads.json"):
        assert f"reports/{name}" in tracked
    assert sum(name.startswith("reports/plans/") for name in tracked) == 29


def files_in(place: Path) -> dict[str, bytes]:
    """What an output, file or folder, holds."""
    files = [file for file in place.rglob("*") if file.is_file()] if place.is_dir() else [place]
    return {str(file.relative_to(place)): file.read_bytes() for file in files}


def test_results_do_not_depend_on_when_they_were_made(project: Path, tmp_path: Path) -> None:
    """Every stage once more from nothing, in another process: the same bytes, but of results that note seconds."""
    again = copy_project(tmp_path / "again")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes of the first run
    for name, of_stage in STAGES.items():
        if not TIMED.search(name):
            _, _, module, *flags = of_stage["cmd"].split()
            stage_here(again, module.removeprefix("stages."), *flags)
            outs = [of_stage.get(kind, []) for kind in ("outs", "metrics", "plots")]
            for out in [
                path for kind in outs for entry in kind for path in ([entry] if isinstance(entry, str) else entry)
            ]:
                assert files_in(again / out) == files_in(project / out), out
    torch.set_num_threads(threads)


def test_a_threshold_reruns_only_what_depends_on_it(project: Path) -> None:
    before = json.loads((project / "reports/classes/metrics.json").read_text())
    sinks = sorted(row["sink"] for row in json.loads((project / "reports/analysis/plots/heads.json").read_text()))
    # halfway between two heads, on the other side of the threshold that is set
    value = round(next((a + b) / 2 for a, b in zip(sinks[1:], sinks, strict=False) if abs(a - b) > 1e-3), 4)
    output = run(
        project, "dvc", "exp", "run", "-S", f"thresholds.sink={value}", "-S", "thresholds.high_entropy=9.0"
    ).stdout
    kept = {"prepare", "collect_attention", "compute_stats", "measure_sensitivity"}
    kept |= {"ablate@uniform", "benchmark@baselines"}
    # the plans that are compared here do not look at classes: if even the seconds are the same, there is nothing to plot
    assert kept <= skipped(output) <= kept | {"plot@plan_comparison"}
    assert ran(output) == set(STAGES) - skipped(output)
    after = json.loads((project / "reports/classes/metrics.json").read_text())
    assert after != before
    metrics = json.loads(run(project, "dvc", "metrics", "diff", "--json").stdout)
    assert any(change["diff"] for change in metrics["reports/classes/metrics.json"].values())
    params = json.loads(run(project, "dvc", "params", "diff", "--json").stdout)
    assert params["params.yaml"]["thresholds.sink"]["new"] == value
    page = run(project, "dvc", "plots", "diff").stdout.strip()
    assert "workspace" in Path(page.removeprefix("file://")).read_text()
    run(project, "git", "checkout", "-q", ".")
    run(project, "dvc", "checkout", "-q")


def test_the_measure_acts_without_the_model(project: Path) -> None:
    output = run(project, "dvc", "repro", "--dry").stdout
    assert ran(output) == set()
    params = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(params.replace("sink_size: 4", "sink_size: 5"))
    output = run(project, "dvc", "repro", "plot@analysis", "ablate@uniform", "benchmark@baselines").stdout
    assert skipped(output) == {"prepare", "collect_attention", "ablate@uniform", "benchmark@baselines"}
    assert ran(output) == {"compute_stats", "classify", "reclassify", "plot@analysis"}


def test_a_changed_input_is_seen(project: Path) -> None:
    run(project, "git", "checkout", "-q", ".")
    run(project, "dvc", "checkout", "-q")
    text = project / "inputs/unseen.txt"
    text.write_text(text.read_text() + "one more line that was not there before\n")
    output = run(project, "dvc", "repro", "collect_attention").stdout
    assert ran(output) == {"prepare"}  # the evaluation text changed, the calibration text did not
    assert skipped(output) == {"collect_attention"}


def digest(path: Path) -> str:
    """The hash that DVC gives a file or a folder: of a folder, that of the list of its files and their hashes."""
    if path.is_file():
        return md5(path.read_bytes()).hexdigest()
    files = [file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    rows = [{"md5": digest(file), "relpath": file.relative_to(path).as_posix()} for file in files]
    listed = json.dumps(sorted(rows, key=lambda row: row["relpath"]), sort_keys=True)
    return f"{md5(listed.encode()).hexdigest()}.dir"


def test_the_committed_lock_is_of_the_committed_pipeline() -> None:
    lock = yaml.safe_load((ROOT / "dvc.lock").read_text())["stages"]
    assert set(lock) == set(STAGES)
    committed = yaml.safe_load((ROOT / "params.yaml").read_text())
    for name in STAGES:
        for param, value in lock[name]["params"]["params.yaml"].items():
            assert value == reduce(getitem, param.split("."), committed), (name, param)
        for dep in lock[name]["deps"]:
            if dep["path"].startswith(("stages/", "pipeline/")):
                assert dep["md5"] == digest(ROOT / dep["path"]), (name, dep["path"])


def test_the_table_of_contents_is_short() -> None:
    assert len((ROOT / "dvc.yaml").read_text().splitlines()) <= 170


def test_the_graph_can_be_drawn() -> None:
    graph = subprocess.run(["dvc", "dag", "--dot"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert '"classify" -> "reclassify"' in graph
