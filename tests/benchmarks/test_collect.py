"""benchmarks.collect measures all three ways to read a text, and runs of one process and of several."""

import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks import _timing, collect
from kvcompress.core.artifacts import read_json
from tests.benchmarks.programs import refused, result_of
from tests.tiny import save_tiny
from tools import update_docs


def test_every_way_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1")  # put back afterwards
    folder = save_tiny("llama", tmp_path / "tiny")
    flags = ["--rounds", "1", "--chunk-size", "50", "--device", "cpu"]
    tiny = result_of(collect.app, ["cost", "--tiny", *flags], tmp_path)
    monkeypatch.setattr(_timing, "in_fresh_process", lambda function, *arguments: function(*arguments))  # takes seconds
    real = result_of(collect.app, ["cost", str(folder), "--lengths", "100,200", *flags], tmp_path)
    for result, lengths, slot in ((tiny, [100], 2 * 8 * 4), (real, [100, 200], 2 * 2 * 2 * 8 * 4)):
        assert [row["tokens"] for row in result["rows"]] == lengths
        for row in result["rows"]:
            assert all(row[f"{way}_s"] >= 0 for way in collect.WAYS)
            assert row["to_plain"] > 0
            assert row["cache_mb"] == round(slot * row["tokens"] / 1e6, 1)
    assert "A random model of 1 layer and 1 head of 8, float32, chunks of 50" in update_docs.long(tiny)


def test_one_process_times_every_stage(tmp_path: Path) -> None:
    folder, output = save_tiny("llama", tmp_path / "tiny"), tmp_path / "seconds.json"
    collect.process(folder, 4, 256, output)
    found = read_json(output)
    assert list(found["seconds"]) == ["loading", "collect_attention", "measure_sensitivity", "ablate"]
    assert all(value > 0 for value in found["seconds"].values())
    assert found["environment"]["threads"] >= 1


def test_ratios_are_of_runs_that_took_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run(folder: Path, processes: int, documents: int, tokens: int) -> dict:
        asked.append((processes, documents, tokens))
        busy = 1 + (len(asked) - 1) // 3  # the machine is slower from round to round
        environment = {"device": "abacus", "dtype": "float32", "torch": "2"}
        return {"seconds": {"ablate": busy * documents / processes}, "environment": environment}

    monkeypatch.setattr(collect, "run_processes", run)
    flags = ["--documents", "16", "--tokens", "128", "--processes", "4", "--rounds", "3"]
    report = result_of(collect.app, ["scaling", str(tmp_path), *flags], tmp_path)
    one, several, share = (1, 16, 128), (4, 16, 128), (1, 4, 128)
    assert asked == [share, several, one, one, several, share, share, several, one]
    (row,) = report["rows"]
    assert (row["one_s"], row["several_s"], row["share_s"]) == (32, 8, 8)  # the middle round's
    assert (row["faster"], row["weak_efficiency"]) == (4, 1)
    assert (report["documents"], report["documents_of_a_share"], report["processes"]) == (16, 4, 4)
    assert "| ablate | 32.0 | 8.0 | 4.00 | 1.00 |" in update_docs.scaling(report)


@pytest.mark.parametrize(("documents", "processes"), [(8, 3), (6, 2), (4, 2), (8, 4), (0, 2)])
def test_every_process_has_the_same_work(monkeypatch: pytest.MonkeyPatch, documents: int, processes: int) -> None:
    monkeypatch.setattr(collect, "run_processes", lambda *asked: pytest.fail("nothing is to be run"))
    flags = ["--documents", str(documents), "--processes", str(processes)]
    refused(collect.app, ["scaling", "nowhere", *flags], f"error: --documents is {documents}, expected a multiple of")


def test_a_run_that_fails_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = (
        "W1125 a warning of torchrun\nerror: model folder nowhere cannot be loaded\nTraceback ...\nChildFailedError"
    )

    def failing(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        assert command[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        return subprocess.CompletedProcess(command, 1, "", stderr)

    monkeypatch.setattr(collect.subprocess, "run", failing)
    done = CliRunner().invoke(collect.app, ["scaling", "nowhere"])
    assert done.exit_code == 1
    assert done.stderr == "error: a run of 1 processes failed: error: model folder nowhere cannot be loaded\n"
