"""benchmarks.memory compares resident memory with what caches report, and an offloaded model with a whole one."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import memory
from tests.benchmarks.programs import refused, result_of
from tests.tiny import save_tiny


@pytest.mark.slow
def test_resident_memory_falls_by_what_the_caches_report(tmp_path: Path) -> None:
    """Fresh processes; 262 MB of cache in many layers and little model, so that the difference stands out."""
    result = result_of(memory.app, ["resident", "--tiny"], tmp_path)
    assert result["predicted"] > 190e6
    assert abs(result["saved"] - result["predicted"]) < 0.1 * result["predicted"]
    refused(memory.app, ["resident"], "expected a model folder")


def test_an_offloaded_model_gives_what_a_whole_one_gives(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    for where in ([str(folder), "--tokens", "256"], ["--tiny"]):
        found = result_of(memory.app, ["offload", *where, "--device", "cpu"], tmp_path)
        assert 0 < found["offloaded"] < found["parameters"]
        assert 0 <= max(found["differences"].values()) <= memory.TOLERANCE


def test_the_program_notices_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []
    monkeypatch.setattr(memory, "measured", lambda *_: calls.append(0.5) or {"sinks": torch.tensor(sum(calls))})
    assert CliRunner().invoke(memory.app, ["offload", "--tiny", "--device", "cpu"]).exit_code == 1
