"""Several processes give what one gives, however the documents divide among them; one that dies ends the run.

The processes are started for real, once: importing takes most of the time.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml

from kvcompress.core.artifacts import read_json, read_tensors
from kvcompress.core.errors import InputError
from kvcompress.models import distributed
from tests.models.distributed_program import LENGTHS, of_different_length
from tests.project.project import ROOT, copy_project, run, stage_here

PROCESSES = 3  # more than the documents of two stages, and no divisor of the third's passes
RUNS = (
    ("collect_attention", "--output-dir"),
    ("measure_sensitivity", "--output-dir"),
    ("ablate", "--ablation", "window_size", "--output-dir"),
)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy_project(tmp_path_factory.mktemp("ranks"))
    assert stage_here(folder, "prepare").returncode == 0
    return folder


@pytest.fixture(scope="module")
def alone(project: Path) -> Path:
    """Results of one process."""
    for name, *flags in RUNS:
        result = stage_here(project, name, *flags, "alone")
        assert result.returncode == 0, result.stderr
    return project / "alone"


@pytest.fixture(scope="module")
def together(project: Path) -> Path:
    """Results and output of several processes."""
    for name in ("__init__.py", "tiny.py", "models/__init__.py", "models/distributed_program.py"):
        (project / "tests/models").mkdir(parents=True, exist_ok=True)
        (project / "tests" / name).write_bytes((ROOT / "tests" / name).read_bytes())
    runs = json.dumps([[name, [*flags, "together"]] for name, *flags in RUNS])
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
    result = run(project, sys.executable, *start, "-m", "tests.models.distributed_program", runs)
    (project / "together/said").write_text(result.stdout)
    (project / "together/shown").write_text(result.stderr)
    return project / "together"


def assert_same_tensors(found: Path, expected: Path) -> None:
    (tensors, header), (others, same) = read_tensors(found), read_tensors(expected)
    assert header == same
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, others[name], rtol=1e-6, atol=1e-9, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("name", ["attention", "head_sensitivity"])
def test_tensors_are_those_of_one_process(alone: Path, together: Path, name: str) -> None:
    assert_same_tensors(together / f"{name}.safetensors", alone / f"{name}.safetensors")


def test_an_ablation_is_that_of_one_process(alone: Path, together: Path) -> None:
    (found,), (expected,) = (read_json(folder / "ablation.json") for folder in (together, alone))
    compared = 0

    def compare(one: object, other: object, place: str) -> None:
        nonlocal compared
        if place.endswith((".seconds", ".threads")):
            return
        assert type(one) is type(other), place
        if isinstance(one, dict):
            assert one.keys() == other.keys(), place
            for key in one:
                compare(one[key], other[key], f"{place}.{key}")
        elif isinstance(one, list):
            assert len(one) == len(other), place
            for i, pair in enumerate(zip(one, other, strict=True)):
                compare(*pair, f"{place}.{i}")
        else:
            compared += 1
            assert one == (pytest.approx(other, abs=2e-5) if isinstance(one, float) else other), place  # as rounded

    compare(found, expected, "")
    assert compared > 200


def test_documents_of_different_length(project: Path, together: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    of_different_length("one.safetensors")
    assert_same_tensors(project / "different.safetensors", project / "one.safetensors")
    assert read_tensors(project / "one.safetensors")[1] == {"documents": len(LENGTHS), "longest": max(LENGTHS)}


def test_one_process_speaks_and_shows_its_progress(together: Path) -> None:
    assert (together / "said").read_text().count("documents of 200 tokens") == 1
    bars = [line for line in (together / "shown").read_text().splitlines() if "100%|" in line and "attention" in line]
    assert all("attention, 1 of 3 processes" in line for line in bars)
    assert bars


def children(parent: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def test_a_killed_process_ends_the_run_and_the_next_one_succeeds(project: Path, alone: Path) -> None:
    """`machine.processes` starts them; one is killed while all are at work."""
    params = yaml.safe_load((project / "params.yaml").read_text())
    (project / "two.yaml").write_text(yaml.safe_dump(params | {"machine": {"processes": 2}}))
    command = [sys.executable, "-m", "stages.collect_attention", "--params", "two.yaml", "--output-dir", "killed"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "--chunk-size", "1"], cwd=project, stderr=subprocess.PIPE, env=environment)
    assert process.stderr
    seen = b""
    while b"tok" not in seen or b"  0%" in seen[-60:]:  # the bar moves: the model is at work
        more = os.read(process.stderr.fileno(), 200)
        assert more, seen  # it ended
        seen += more
    workers = children(process.pid)
    assert len(workers) == 2
    start = time.monotonic()
    os.kill(workers[-1], signal.SIGKILL)
    message = process.communicate(timeout=30)[1].decode()
    assert time.monotonic() - start < 30
    assert process.returncode == 1
    assert "error: process 1 of 2 ended with code -9, so stages.collect_attention left no result" in message
    assert not (project / "killed").exists()
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    run(project, *command)
    assert_same_tensors(project / "killed/attention.safetensors", alone / "attention.safetensors")


def test_every_item_belongs_to_one_process_and_the_dear_ones_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = [5.0, 1, 1, 9, 1, 1, 1, 5, 0]
    shares = []
    for own in range(4):
        monkeypatch.setattr(distributed, "_joined", distributed.Joined(own, 4, None, torch.device("cpu")))
        shares.append(distributed.mine(costs))
        assert distributed.mine([1.0] * 2) == ([own] if own < 2 else [])
    assert sorted(item for share in shares for item in share) == list(range(len(costs)))
    assert sorted(sum(costs[item] for item in share) for share in shares) == [5, 5, 5, 9]


def test_alone_nothing_is_exchanged() -> None:
    assert (distributed.rank(), distributed.size(), distributed.leave()) == (0, 1, True)
    assert distributed.mine([1.0, 2.0]) == [0, 1]
    found = distributed.in_order({1: torch.tensor([2.0]), 0: torch.tensor([[True]])}, 2)
    assert [one.tolist() for one in found] == [[[1.0]], [2.0]]
    assert np.array_equal(distributed.summed({"a": torch.ones(2)})["a"], torch.ones(2))


def test_processes_take_the_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_joined", distributed.Joined(3, 4, None, torch.device("cpu")))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in (("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert distributed.own_device("auto") == distributed.own_device("cuda") == "cuda:1"
    assert distributed.own_device("cpu") == "cpu"
    with pytest.raises(InputError, match="'cuda:0', but 2 processes need a GPU each"):
        distributed.own_device("cuda:0")
    others = [torch.tensor(1)]  # what the other processes say of themselves
    monkeypatch.setattr(dist, "all_reduce", lambda mine, op, group: mine.copy_(torch.minimum(mine, *others)))
    moved: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", moved.append)
    distributed.exchange_on(torch.device("cuda:1"))
    assert distributed._joined is not None
    assert distributed._joined.device == torch.device("cuda:1")
    # One other process of the run, perhaps on another machine, has no GPU for itself.
    monkeypatch.setattr(distributed, "_joined", distributed.Joined(3, 4, None, torch.device("cpu")))
    others[0] = torch.tensor(0)
    distributed.exchange_on(torch.device("cuda:1"))
    assert distributed._joined.device == torch.device("cpu")
    others[0] = torch.tensor(1)
    # Two processes on each GPU: NCCL cannot, so they exchange through gloo.
    monkeypatch.setattr(distributed, "_joined", distributed.Joined(3, 4, None, torch.device("cpu")))
    for name, value in (("LOCAL_RANK", "3"), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    assert distributed.own_device("auto") == "cuda:1"
    distributed.exchange_on(torch.device("cuda:1"))
    assert distributed._joined.device == torch.device("cpu")
    assert moved == [torch.device("cuda:1")] * 3


def test_a_stage_that_works_alone_says_so(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = stage_here(project, "compute_stats", check=False)
    assert result.returncode == 1
    assert "error: this stage works alone, but 2 processes were started for it" in result.stderr
