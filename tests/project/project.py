"""A copy of the project in a temporary folder, with a tiny local model and short texts in its params.yaml."""

import io
import os
import runpy
import shutil
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import yaml

from tests.tiny import prose, save_tiny

ROOT = Path(__file__).resolve().parents[2]
PROJECT = (
    "pipeline",
    "stages",
    "dvc.yaml",
    "reports/dvc.yaml",
    "params.yaml",
    ".dvcignore",
    ".dvc/config",
    ".dvc/plots",
    ".dvc/.gitignore",
    ".gitignore",
)


def copy_project(folder: Path) -> Path:
    """Everything that the pipeline needs, without results; `params.yaml` keeps the committed thresholds."""
    for name in PROJECT:
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "inputs/*"))
        else:
            shutil.copy(source, target)
    (folder / "data").mkdir()
    save_tiny("llama", folder / "inputs/tiny")
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["model"] |= {"source": "local", "local": {"path": "inputs/tiny"}}
    texts = {"seen": 0.6, "unseen": 0.0}
    for i, name in enumerate(texts):
        (folder / f"inputs/{name}.txt").write_text(prose(400, i))
    params["corpus"]["texts"] = {
        name: {"source": "file", "file": f"inputs/{name}.txt", "calibration": share} for name, share in texts.items()
    }
    params["collect"] = {"max_tokens": 200, "chunk_size": 64, "documents_per_text": 2}
    params["ablation"] |= {"max_tokens": 128, "sizes": [32, 64], "sink_counts": [0, 4], "random_seeds": 1}
    params["ablation"] |= {"retrieval_lengths": [160], "retrieval_depths": 1}
    params["sensitivity"] |= {"max_tokens": 256, "windows": [16, 64], "joint_windows": [32], "fact_contexts": 1}
    params["sensitivity"] |= {"facts_per_context": 2, "far": 32, "nodes": 2}
    params["compare_plans"] |= {"max_tokens": 128, "retrieval_lengths": [160], "retrieval_depths": 1}
    params["compare_plans"] |= {"plans": ["priced-25", "random-25"], "streaming": ["priced-25"], "context": 96}
    params["compare_plans"] |= {"scores": ["snapkv"], "score_shares": [0.5]}
    params["benchmark"] |= {"num_samples": 2, "max_tokens": 48, "max_new_tokens": 9, "turn": 4}
    params["benchmark"] |= {"growth_contexts": [32, 48], "growth_rounds": 1, "plans": ["priced-25"]}
    params["plots"] = {"dpi": 60}
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    return folder


def run(folder: Path, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command in the copy; `python` and `dvc` are those of this interpreter's environment."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    quiet = {"DVC_NO_ANALYTICS": "1", "GIT_CONFIG_GLOBAL": os.devnull, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    names = {"GIT_AUTHOR_NAME": "t", "GIT_AUTHOR_EMAIL": "t@t", "GIT_COMMITTER_NAME": "t", "GIT_COMMITTER_EMAIL": "t@t"}
    environment = {**os.environ, **quiet, **names, "PATH": path, "COLUMNS": "200"}
    environment.pop("PYTHONPATH", None)
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if check and result.returncode:
        raise AssertionError(f"{' '.join(command)} ended with {result.returncode}:\n{result.stdout}\n{result.stderr}")
    return result


def stage(folder: Path, name: str, *flags: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return run(folder, sys.executable, "-m", f"stages.{name}", *flags, check=check)


def stage_here(folder: Path, name: str, *flags: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """As `stage`, by this checkout's code and within this process: the seconds that a process takes to import are saved."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    script = str(ROOT / "stages" / f"{name}.py")
    with (
        chdir(folder),
        patch.object(sys, "argv", [script, *flags]),
        patch.dict(os.environ, {"COLUMNS": "200", "NO_COLOR": "1"}),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            runpy.run_module(f"stages.{name}", run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            code = int(ended.code or 0)
    if check and code:
        raise AssertionError(f"{name} {' '.join(flags)} ended with {code}:\n{out.getvalue()}\n{err.getvalue()}")
    return subprocess.CompletedProcess([script, *flags], code, out.getvalue(), err.getvalue())
