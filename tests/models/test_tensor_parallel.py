"""One model in several processes gives what it gives in one: statistics, prices, caches and evaluations of all heads.

The processes are started for real, on the CPU, and on two GPUs where there are as many. What is refused before that:
tests/models/test_head_shards.py.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import chdir
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from kvcompress.cli.main import app
from kvcompress.core.artifacts import read_json, read_tensors
from tests.models.shards_program import CHOSEN, CONFIGS, REFUSED, WINDOWS, cached, measured, opened, save_wide
from tests.project.project import ROOT, copy_project, run, stage_here

RUNS = (
    ("collect_attention", []),
    ("measure_sensitivity", []),
    ("compare_plans", ["windows.json", "chosen.json"]),
    ("ablate", ["--ablation", "window_size"]),
)
SHORT = ["--text", "inputs/unseen.txt", "--max-tokens", "256"]
COMMANDS = {
    "analyze": [*SHORT, "--output-dir", "@analysis"],
    "plan": [*SHORT, "--documents-per-text", "1", "-o", "@plan.json"],
    "evaluate": [*SHORT, "--plan", "chosen.json", "--retrieval-depths", "1", "-o", "@evaluation.json"],
    "generate": ["What was it?", "--plan", "chosen.json", "--max-new-tokens", "30", "--json"],
}
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in another order may make a head choose another key if two scores are nearly equal."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy_project(tmp_path_factory.mktemp("parts"))
    for name in CONFIGS | REFUSED:
        save_wide(name, folder / "inputs" / name)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["model"] |= {"local": {"path": "inputs/llama"}}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    params["model"] |= {"tp_plan": "auto"}
    (folder / "split.yaml").write_text(yaml.safe_dump(params))
    for part in ("models", "reference"):
        shutil.copytree(ROOT / "tests" / part, folder / "tests" / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("__init__.py", "tiny.py"):
        shutil.copy(ROOT / "tests" / name, folder / "tests" / name)
    WINDOWS.save(folder / "windows.json")
    CHOSEN.save(folder / "chosen.json")
    assert stage_here(folder, "prepare").returncode == 0
    return folder


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def start(project: Path, device: str, flag: str) -> CompletedProcess[str]:
    hidden = [] if device == "cuda" else ["env", "CUDA_VISIBLE_DEVICES="]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return run(project, *hidden, sys.executable, *launcher, "-m", "tests.models.shards_program", flag)


@pytest.fixture(scope="module")
def together(project: Path, device: str) -> Path:
    """Results of two processes, each with half of the heads."""
    (folder := project / f"together-{device}").mkdir()
    runs = [[name, [*flags, "--params", "split.yaml", "--output-dir", folder.name]] for name, flags in RUNS]
    runs += [["kvcompress", command(name, folder, "--tp-plan", "auto")] for name in COMMANDS]
    result = start(project, device, json.dumps(runs))
    (folder / "said").write_text(result.stdout)
    return project


@pytest.fixture(scope="module")
def alone(project: Path, device: str) -> Path:
    for name, flags in RUNS:
        place = "cuda:0" if device == "cuda" else "cpu"
        stage_here(project, name, *flags, "--device", place, "--output-dir", f"alone-{device}")
    return project / f"alone-{device}"


def command(name: str, folder: Path, *flags: str) -> list[str]:
    """A command line of `kvcompress` that leaves its results in `folder`, or says them in JSON."""
    own = [flag.replace("@", f"{folder}/") for flag in COMMANDS[name]]
    return [name, "inputs/llama", *own, *flags]


def compare(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], device: str) -> None:
    exact, rough = (1e-6, 5e-5) if device == "cpu" else (1e-4, 1e-3)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        other = found[name].to("cpu", tensor.dtype)
        if name.endswith(".judged"):
            assert max(tensor.abs().max(), other.abs().max()) < 10 * rough, name
        elif name.startswith("attention."):
            torch.testing.assert_close(other, tensor, rtol=exact, atol=rough, msg=lambda text, name=name: name + text)
        else:
            equal = tensor.dtype == torch.long or name.startswith(("answers", "bytes")) or name.endswith(".held")
            near = 3 * rough if name.startswith("prices.") else rough  # sums of squared differences of outputs
            bounds = {"rtol": 0, "atol": 0} if equal else {"rtol": near, "atol": near}
            torch.testing.assert_close(other, tensor, **bounds, msg=lambda text, name=name: name + text)


def of_one_process(project: Path, name: str, device: str, what: Callable[..., Any]) -> dict[str, torch.Tensor]:
    with chdir(project):
        found = what(opened(name, device="cuda:0" if device == "cuda" else "cpu"))
    return {key: tensor.cpu() for key, tensor in found.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_everything_is_as_in_one_process(project: Path, together: Path, device: str, name: str) -> None:
    expected = of_one_process(project, name, device, measured if name == "llama" else cached)
    compare(load_file(together / f"together-{name}.safetensors"), expected, device)


@pytest.mark.parametrize("name", ["attention", "head_sensitivity"])
def test_stages_write_what_one_process_writes(together: Path, alone: Path, device: str, name: str) -> None:
    (found, header), (expected, same) = (
        read_tensors(folder / f"{name}.safetensors") for folder in (together / f"together-{device}", alone)
    )
    assert header == same
    compare(found, expected, device)


def test_plans_are_compared_by_the_bytes_of_all_processes(together: Path, alone: Path, device: str) -> None:
    (found,), (expected,) = (
        read_json(folder / "plan_comparison.json") for folder in (together / f"together-{device}", alone)
    )
    assert len(found["rows"]) == len(expected["rows"]) > 3
    for row, other in zip(found["rows"], expected["rows"], strict=True):
        for name in ("name", "share", "nbytes_end", "nbytes_mean", "tokens", "retrieval"):
            assert row[name] == other[name], name
        for name in ("perplexity", "accuracy", "kl"):
            assert row[name] == pytest.approx(other[name], rel=1e-4, abs=1e-4), name
        assert other["nbytes_peak"] <= row["nbytes_peak"] <= 1.2 * other["nbytes_peak"]


def test_an_ablation_is_of_all_heads(together: Path, alone: Path, device: str) -> None:
    (found,), (expected,) = (read_json(folder / "ablation.json") for folder in (together / f"together-{device}", alone))
    assert len(found["rows"]) == len(expected["rows"]) > 3
    for row, other in zip(found["rows"], expected["rows"], strict=True):
        for name in ("name", "share", "nbytes_end", "nbytes_mean", "retrieval"):
            assert row[name] == other[name], name
        assert row["perplexity"] == pytest.approx(other["perplexity"], rel=1e-4, abs=1e-4)


def test_commands_say_what_one_process_says(
    project: Path, together: Path, device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, other = project / f"together-{device}", project / f"command-{device}"
    other.mkdir()
    place = "cuda:0" if device == "cuda" else "cpu"
    with chdir(project):
        for name in COMMANDS:
            app(command(name, other, "--device", place), standalone_mode=False)
    said, alone = (folder / "said").read_text(), capsys.readouterr().out
    texts = [json.loads(text[text.rindex('{\n  "text"') :]) for text in (said, alone)]
    peak, whole = (text["cache"].pop("peak_bytes") for text in texts if text.pop("seconds"))
    assert texts[0] == texts[1]
    assert whole <= peak <= 1.2 * whole
    assert said.count('"text"') == said.count("written to ") == 1
    heads, expected = (read_json(at / "plan.json")["heads"] for at in (folder, other))
    assert heads == expected
    heads, expected = (read_json(at / "analysis/head_statistics.json")["head_statistics"] for at in (folder, other))
    assert len(heads) == len(expected) == 16
    for one, same in zip(heads, expected, strict=True):
        assert one["mean_entropy"] == pytest.approx(same["mean_entropy"], rel=1e-4)
    rows, expected = (read_json(at / "evaluation.json")["rows"] for at in (folder, other))
    assert [row["nbytes_end"] for row in rows] == [row["nbytes_end"] for row in expected]
    assert [row["perplexity"] for row in rows] == pytest.approx([row["perplexity"] for row in expected], rel=1e-4)


def test_a_model_that_transformers_split_is_taken_over(project: Path, device: str) -> None:
    start(project, device, "adopt")
    compare(load_file(project / "adopted.safetensors"), of_one_process(project, "llama", device, cached), device)


def test_a_killed_part_ends_the_run(project: Path) -> None:
    """`machine.processes` starts them."""
    params = yaml.safe_load((project / "split.yaml").read_text())
    (project / "killed.yaml").write_text(yaml.safe_dump(params | {"machine": {"processes": 2}}))
    command = [sys.executable, "-m", "stages.collect_attention", "--params", "killed.yaml", "--output-dir", "killed"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(
        [*command, "--chunk-size", "1"], cwd=project, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stderr
        seen = b""
        while b"tok" not in seen or b"  0%" in seen[-60:]:  # the bar moves: both compute
            more = os.read(process.stderr.fileno(), 200)
            assert more, seen  # it ended
            seen += more
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(workers) == 2
        os.kill(int(workers[-1]), signal.SIGKILL)
        message = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 1
    assert "so stages.collect_attention left no result" in message
    assert not (project / "killed/attention.safetensors").exists()
