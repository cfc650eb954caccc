"""Stage scripts as a person runs them: flags, one-sentence errors, and nothing half-written when they are killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.project.project import ROOT, copy_project, run, stage, stage_here
from tests.tiny import prose

NAMES = sorted(
    path.stem for path in (ROOT / "stages").glob("*.py") if path.stem not in ("__init__", "common", "model_run")
)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy_project(tmp_path_factory.mktemp("stages"))
    stage_here(folder, "prepare")
    stage_here(folder, "collect_attention")
    stage_here(folder, "compute_stats")
    stage_here(folder, "classify")
    stage_here(folder, "reclassify", "--reclassify", "--output-dir", "data")
    return folder


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and "__pycache__" not in str(path)
    }


@pytest.mark.parametrize("name", NAMES)
def test_help(name: str) -> None:
    output = stage_here(ROOT, name, "--help").stdout
    assert "Usage: python -m stages." in output
    assert "--params" in output


def test_flags_override_params_and_may_have_underscores(project: Path) -> None:
    stage_here(
        project, "collect_attention", "--max_tokens", "150", "--chunk_size", "50", "--output_dir", "short", "--bf16"
    )
    stage_here(project, "compute_stats", "--data_dir", "short", "--sink_size", "2", "--local_window", "5")
    info = json.loads((project / "short/head_statistics.json").read_text())["model_info"]
    assert (info["max_tokens"], info["sink_size"], info["local_window"]) == (150, 2, 5)
    assert (info["model_id"], info["documents"]) == ("tiny", 2)


def test_another_model_and_text_by_flag(project: Path) -> None:
    (project / "mine.txt").write_text(prose(200, 5))
    refused = stage_here(project, "collect_attention", "--model-id", "inputs/tiny", check=False)
    assert "--model-id needs --output-dir" in refused.stderr
    flags = [
        "--model-id",
        "inputs/tiny",
        "--text",
        "mine.txt",
        "--max-tokens",
        "300",
        "--no-bf16",
        "--output-dir",
        "other",
    ]
    stage_here(project, "collect_attention", *flags, "--documents-per-text", "1")
    stage_here(project, "compute_stats", "--data-dir", "other")
    info = json.loads((project / "other/head_statistics.json").read_text())["model_info"]
    assert (info["max_tokens"], info["documents"]) == (300, 1)


def test_reclassify_needs_only_statistics(project: Path) -> None:
    (project / "alone").mkdir()
    (project / "alone/head_statistics.json").write_bytes((project / "data/head_statistics.json").read_bytes())
    output = stage_here(project, "reclassify", "--results-dir", "alone", "--reclassify").stdout
    assert "CLASSIFICATION SUMMARY" in output
    made = json.loads((project / "alone/validation/refined_classifications.json").read_text())
    assert made == json.loads((project / "data/refined_classifications.json").read_text())
    failed = stage(project, "reclassify", "--results-dir", "alone", check=False)  # a process, as a person has it
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: cannot read alone/head_classifications.json")


def test_without_the_flag_the_found_classes_are_validated(project: Path) -> None:
    output = stage_here(project, "reclassify", "--results-dir", "data", "--output-dir", "validated").stdout
    assert "positional " in output
    assert [path.name for path in (project / "validated").iterdir()] == ["validation_report.txt"]


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("prepare", ["--model-id", "inputs"], "model folder inputs has no config.json"),
        ("prepare", ["--params", "nowhere.yaml"], "cannot read nowhere.yaml"),
        ("prepare", ["--model-id", "./typo"], "--model-id is './typo', which is neither"),
        (
            "collect_attention",
            ["--max-tokens", "600"],
            "collect.max_tokens is 600, but the context of tiny ends at 512",
        ),
        ("collect_attention", ["--max-tokens", "5"], "command line: max_tokens"),
        ("collect_attention", ["--documents-per-text", "50"], "text 'seen' has .* tokens, but 50 documents"),
        ("collect_attention", ["--text", "nowhere.txt"], "cannot read nowhere.txt"),
        ("collect_attention", ["--data-dir", "nowhere"], "cannot read nowhere/model.json"),
        ("collect_attention", ["--device", "abacus"], "model.device is 'abacus'"),
        ("compute_stats", ["--sink-size", "0"], "command line: sink_size"),
        ("compute_stats", ["--sink-size", "65"], "command line: sink_size"),
        ("compute_stats", ["--recent-ratio", "nan"], "command line: recent_ratio"),
        ("classify", ["--data-dir", "nowhere"], "cannot read nowhere/head_statistics.json"),
        ("plot", ["--classifications-path", "params.yaml"], "params.yaml is not complete JSON"),
    ],
)
def test_errors_are_one_sentence_and_leave_nothing(project: Path, name: str, flags: list[str], message: str) -> None:
    before = snapshot(project)
    result = stage_here(project, name, *flags, check=False)
    assert result.returncode == 1
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert re.search(message, lines[0]), lines[0]
    assert "Traceback" not in result.stderr
    assert snapshot(project) == before


def test_a_killed_stage_leaves_no_result_and_the_next_run_succeeds(tmp_path: Path) -> None:
    folder = copy_project(tmp_path)
    run(folder, "git", "init", "-q")
    stage_here(folder, "prepare")
    command = [sys.executable, "-m", "stages.collect_attention", "--chunk-size", "1"]  # slow enough to be caught
    for kill in (signal.SIGINT, signal.SIGKILL):
        process = subprocess.Popen(
            command,
            cwd=folder,
            stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs start with it ignored
        )
        assert process.stderr
        seen = b""
        while b"%" not in seen or b"  0%" in seen[-40:]:  # the progress bar moves: the model is at work
            more = os.read(process.stderr.fileno(), 200)
            assert more, seen  # it ended
            seen += more
        time.sleep(0.1)
        process.send_signal(kill)
        assert process.wait(timeout=30) != 0
        assert not (folder / "data/attention.safetensors").exists()
        assert [path.name for path in (folder / "data").glob(".*")] == []
    run(folder, "dvc", "repro", "--single-item", "collect_attention")
    assert (folder / "data/attention.safetensors").is_file()
