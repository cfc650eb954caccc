"""The programs behind docs/scaling.md measure what they say; how long anything takes is not tested."""

import json
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks import long_document_cost, scaling_cost, scaling_run
from kvcompress.core.artifacts import read_json
from tests.tiny import save_tiny


def test_one_process_times_every_stage(tmp_path: Path) -> None:
    folder, output = save_tiny("llama", tmp_path / "tiny"), tmp_path / "seconds.json"
    scaling_run.main(folder, 4, 256, output)
    found = read_json(output)
    assert list(found["seconds"]) == ["loading", "collect_attention", "measure_sensitivity", "ablate"]
    assert all(value > 0 for value in found["seconds"].values())
    assert found["environment"]["threads"] >= 1


def test_ratios_are_of_runs_that_took_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measured(folder: Path, processes: int, documents: int, tokens: int) -> dict:
        asked.append((processes, documents, tokens))
        busy = len(asked)  # the machine gets slower and slower
        return {"seconds": {"ablate": busy * documents / processes}, "environment": {"device": "abacus"}}

    monkeypatch.setattr(scaling_cost, "measured", measured)
    flags = ["--documents", "16", "--tokens", "128", "--processes", "4", "--rounds", "3"]
    done = CliRunner().invoke(scaling_cost.app, [str(tmp_path), *flags, "--output", str(tmp_path / "report.json")])
    assert done.exit_code == 0, done.output
    assert asked == [(1, 16, 128), (4, 16, 128), (1, 4, 128)] * 3
    report = read_json(tmp_path / "report.json")
    (row,) = report["rows"]
    assert (row["one_s"], row["several_s"], row["share_s"]) == (64, 20, 24)  # the middle round's
    assert row["faster"] == pytest.approx(4 * 4 / 5, abs=0.01)
    assert row["weak_efficiency"] == pytest.approx(6 / 5, abs=0.01)
    assert (report["documents"], report["documents_of_a_share"], report["processes"]) == (16, 4, 4)


@pytest.mark.parametrize(("documents", "processes"), [(8, 3), (6, 2), (4, 2), (8, 4), (0, 2)])
def test_weak_scaling_wants_equal_work_for_every_process(
    monkeypatch: pytest.MonkeyPatch, documents: int, processes: int
) -> None:
    monkeypatch.setattr(scaling_cost, "measured", lambda *asked: pytest.fail("nothing is to be run"))
    flags = ["--documents", str(documents), "--processes", str(processes)]
    done = CliRunner().invoke(scaling_cost.app, ["nowhere", *flags])
    assert done.exit_code == 1
    wanted = f"error: --documents is {documents}, expected a multiple of {4 * processes}: "
    assert done.stderr.startswith(wanted)


def test_a_run_that_fails_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "W1125 a warning of torchrun\nerror: model folder nowhere cannot be loaded\nTraceback ...\nChildFailedError"

    def failing(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        assert command[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        return subprocess.CompletedProcess(command, 1, "", said)

    monkeypatch.setattr(scaling_cost.subprocess, "run", failing)
    done = CliRunner().invoke(scaling_cost.app, ["nowhere"])
    assert done.exit_code == 1
    assert done.stderr == "error: a run of 1 processes failed: error: model folder nowhere cannot be loaded\n"


def test_long_documents_are_measured_in_fresh_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peak, seconds = long_document_cost.observed(300, 64)  # here, where a process is not fresh
    assert peak >= 0
    assert seconds > 0

    class Fresh:
        def Pool(self, count: int) -> "Fresh":
            return self

        def __enter__(self) -> "Fresh":
            return self

        def __exit__(self, *error: object) -> None: ...

        def apply(self, function: object, arguments: tuple[int, int]) -> tuple[int, float]:
            assert function is long_document_cost.observed
            return 10**6 + 64 * arguments[0], 1.0  # K and V of a token: one head of 8 float32 each

    monkeypatch.setattr(long_document_cost.multiprocessing, "get_context", lambda kind: Fresh())
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1")  # put back afterwards
    long_document_cost.main("10000,20000", 64, tmp_path / "report.json")
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert rows == [
        {"tokens": 10000, "cache_mb": 0.6, "beside_cache_mb": 1.0, "seconds": 1.0},
        {"tokens": 20000, "cache_mb": 1.3, "beside_cache_mb": 1.0, "seconds": 1.0},
    ]
