"""Results that a second machine need not make again, recipes that a scheduler would take, and the programs that measure."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.project.project import ROOT, copy_project, run
from tests.project.readme_blocks import parsed_by_dvc

RECIPES = ROOT / "recipes"
SKYPILOT = {"name", "workdir", "num_nodes", "resources", "envs", "file_mounts", "setup", "run"}  # of its task files
TARGET = "collect_attention"


def clone(first: Path, name: str) -> Path:
    """A clone with the first one's own inputs, which git does not hold."""
    run(first.parent, "git", "clone", "-q", first.name, name)
    shutil.copytree(first / "inputs", first.parent / name / "inputs", dirs_exist_ok=True)
    return first.parent / name


def said_of(output: str, what: str) -> list[str]:
    return re.findall(rf"Stage '(\w+)' {what}", output)


def test_a_second_clone_runs_no_stage_again(tmp_path: Path) -> None:
    """With the first one's lock file nothing has changed; without it the run-cache at the remote knows the runs."""
    (tmp_path / "first").mkdir()
    first = copy_project(tmp_path / "first")
    run(first, "git", "init", "-q")
    run(first, "dvc", "remote", "add", "--default", "shared", str(tmp_path / "store"))
    run(first, "git", "add", "-A")
    run(first, "git", "commit", "-qm", "start")
    early = clone(first, "early")
    assert "Running stage 'collect_attention'" in run(first, "dvc", "repro", TARGET).stdout
    run(first, "dvc", "push", "--run-cache")
    run(first, "git", "add", "-A")
    run(first, "git", "commit", "-qm", "results")

    late = clone(first, "late")
    run(late, "dvc", "pull", "--run-cache", "--with-deps", TARGET)
    params = (late / "params.yaml").read_text()
    assert "  processes: 1\n" in params
    (late / "params.yaml").write_text(params.replace("  processes: 1\n", "  processes: 2\n"))
    output = run(late, "dvc", "repro", TARGET).stdout
    assert said_of(output, "didn't change, skipping") == ["prepare", TARGET]
    assert "Running stage" not in output

    run(early, "dvc", "pull", "--run-cache", "--allow-missing")
    output = run(early, "dvc", "repro", "--pull", TARGET).stdout
    # DVC keeps no runs of a stage whose outputs persist: it never deletes the folder of the model before a run.
    assert said_of(output, "is cached - skipping run") == [TARGET]
    assert output.count("Running stage") == output.count("Running stage 'prepare'") == 1
    made = {folder: (folder / "data/attention.safetensors").read_bytes() for folder in (first, late, early)}
    assert made[first] == made[late] == made[early]


@pytest.mark.parametrize("name", sorted(path.name for path in RECIPES.glob("*.sh")))
def test_a_shell_recipe_is_bash(name: str) -> None:
    subprocess.run(["bash", "-n", RECIPES / name], check=True, capture_output=True)


def checked(line: str) -> None:
    """A command that a recipe would run: its program takes it."""
    from torch.distributed.run import get_args_parser

    words = shlex.split(line)
    if words[0] == "srun":
        words = [word for word in words[1:] if not word.startswith("--kill")]
    if words[0] == "torchrun":
        given = get_args_parser().parse_args(words[1:])
        assert (ROOT / (given.training_script.replace(".", "/") + ".py")).is_file()
        assert given.module
    else:
        assert words[0] == "dvc", line
        parsed_by_dvc(words)


def test_the_slurm_recipe_says_what_it_would_run() -> None:
    environment = {"PATH": "/usr/bin:/bin", "DRY_RUN": "1", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8"}
    done = subprocess.run(
        ["bash", RECIPES / "slurm.sh"], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert [line for line in lines if "--nnodes 2 --nproc-per-node 8" in line and "srun" in line]
    for line in lines:
        checked(line)
    stages = re.findall(r"-m stages\.(\w+)", done.stdout)
    commands = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert [commands[stage]["cmd"] for stage in stages] == [f"python -m stages.{stage}" for stage in stages]
    options = re.findall(r"^#SBATCH (--[a-z-]+)=\S+$", (RECIPES / "slurm.sh").read_text(), re.M)
    assert {"--nodes", "--ntasks-per-node", "--gpus-per-node", "--time"} <= set(options)


def test_the_skypilot_recipe_is_a_task() -> None:
    task = yaml.safe_load((RECIPES / "skypilot.yaml").read_text())
    assert set(task) <= SKYPILOT
    assert re.fullmatch(r"\w+:\d+", task["resources"]["accelerators"])
    assert subprocess.run(["make", "-n", *task["setup"].split()[1:]], cwd=ROOT, capture_output=True).returncode == 0
    subprocess.run(["bash", "-n"], input=task["run"], text=True, check=True)
    for line in task["run"].splitlines()[2:]:
        checked(line)
