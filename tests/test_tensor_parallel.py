"""One model in several processes gives what it gives in one: statistics, prices, caches and evaluations of all heads.

The processes are started for real, on the CPU, and on two GPUs where there are as many.
"""

import json
import sys
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import GPT2Config, Phi3Config

from kvcompress import ranks
from kvcompress.artifacts import read_json, read_tensors
from kvcompress.cli.main import app
from kvcompress.errors import InputError, UnsupportedModelError
from kvcompress.graphs import GraphedDecoder
from kvcompress.methods import FixSizeL2Compressor, HeadAwareCompressor
from kvcompress.models import load_folder
from kvcompress.params.model import LocalModel, ModelParams
from kvcompress.parts import Part, part_of
from kvcompress.switching import use_attention
from kvcompress.tensor_parallel import require_as_split, require_split, share
from tests.parts_program import CHOSEN, CONFIGS, WINDOWS, cached, measured, opened, save_wide
from tests.project import ROOT, copy_project, run, stage_here
from tests.tiny import tiny_model

RUNS = (("collect_attention", []), ("measure_sensitivity", []), ("compare_plans", ["windows.json", "chosen.json"]))
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


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy_project(tmp_path_factory.mktemp("parts"))
    for name in CONFIGS:
        save_wide(name, folder / "inputs" / name)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["model"] |= {"local": {"path": "inputs/llama"}}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    params["model"] |= {"tp_plan": "auto"}
    (folder / "split.yaml").write_text(yaml.safe_dump(params))
    (folder / "tests").mkdir()
    for name in ("__init__.py", "parts_program.py", "tiny.py"):
        (folder / "tests" / name).write_bytes((ROOT / "tests" / name).read_bytes())
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
    return run(project, *hidden, sys.executable, *launcher, "-m", "tests.parts_program", flag)


@pytest.fixture(scope="module")
def together(project: Path, device: str) -> Path:
    """What two processes with half of the heads each give."""
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
    exact, rough = (1e-6, 1e-5) if device == "cpu" else (1e-4, 1e-3)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        other = found[name].to("cpu", tensor.dtype)
        if name.endswith(".judged"):
            assert max(tensor.abs().max(), other.abs().max()) < 10 * rough, name
        elif name.startswith("attention."):
            torch.testing.assert_close(other, tensor, rtol=exact, atol=rough, msg=lambda text, name=name: name + text)
        else:
            equal = tensor.dtype == torch.long or name.startswith(("answers", "bytes")) or name.endswith(".held")
            bounds = {"rtol": 0, "atol": 0} if equal else {"rtol": rough, "atol": rough}
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


@pytest.mark.parametrize(
    ("settings", "processes", "message"),
    [
        ({}, 1, "tp_plan is 'auto', which needs several processes"),
        ({"device_map": "auto"}, 2, "and model.device_map is 'auto': expected one of the two"),
        ({"device": "cpu"}, 2, "but model.device is 'cpu'"),
        ({}, 3, "llama has 4 KV heads a layer, which 3 processes cannot share equally"),
    ],
)
def test_settings_that_do_not_go_together(
    project: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], processes: int, message: str
) -> None:
    joined(monkeypatch, processes)
    params = ModelParams(source="local", local=LocalModel(path="-"), tp_plan="auto", **settings)
    with pytest.raises(InputError, match=message):
        load_folder(project / "inputs/llama", params)


def test_flags_that_do_not_go_together(project: Path) -> None:
    for flag, message in (("all", "--tp-plan is 'all', expected auto"), ("auto", "needs several processes")):
        with pytest.raises(InputError, match=message):
            app(["generate", str(project / "inputs/llama"), "What?", "--tp-plan", flag], standalone_mode=False)


def joined(monkeypatch: pytest.MonkeyPatch, processes: int, one_model: bool = False) -> None:
    if processes > 1:
        monkeypatch.setattr(ranks, "_joined", ranks.Joined(1, processes, None, torch.device("cpu"), one_model))


def test_a_gpu_for_every_process(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    joined(monkeypatch, 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    params = ModelParams(source="local", local=LocalModel(path="-"), tp_plan="auto")
    with pytest.raises(InputError, match="needs a GPU for each of the 2 processes here, but there are 1"):
        load_folder(project / "inputs/llama", params)


def test_plans_that_leave_heads_whole() -> None:
    with pytest.raises(UnsupportedModelError, match="plan to split phi3 leaves its heads whole in every process"):
        require_split(Phi3Config(), 2)
    with pytest.raises(UnsupportedModelError, match="plan to split gpt2 does not exist"):
        require_split(GPT2Config(), 2)
    require_split(CONFIGS["gpt_neox"](), 2)


def test_a_model_that_is_not_as_it_was_split(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="the model is in 1 tensor-parallel parts, but the run has 1 processes"):
        share(tiny_model("llama"))
    model = tiny_model("llama")
    require_as_split(model, 1)
    with pytest.raises(UnsupportedModelError, match="layer 0 has 2 of its 2 KV heads in each of 2 processes"):
        require_as_split(model, 2)
    model.config.vocab_size = 128
    with pytest.raises(UnsupportedModelError, match="gives 256 logits for 128 tokens"):
        require_as_split(model, 1)
    model.lm_head = torch.nn.Linear(31, 256)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM, as transformers splits it, does not run: mat1"):
        require_as_split(model, 1)


def test_processes_of_one_model_share_no_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    joined(monkeypatch, 2, one_model=True)
    assert ranks.mine([3.0, 1.0, 2.0]) == [0, 1, 2]
    assert ranks.summed({"a": torch.ones(2)})["a"].tolist() == [1, 1]
    assert [one.item() for one in ranks.in_order({1: torch.tensor(1.0), 0: torch.tensor(0.0)}, 2)] == [0, 1]


def test_heads_of_a_part() -> None:
    assert [list(range(8))[Part(i, 4).own(8)] for i in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_what_a_part_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    model.config.distributed_config = SimpleNamespace(tp_size=2)
    with pytest.raises(UnsupportedModelError, match="llama model is one of 2 tensor-parallel parts"):
        use_attention(model, "kvcompress_observe")
    joined(monkeypatch, 2, one_model=True)
    assert part_of(model.config) == Part(1, 2)
    with pytest.raises(UnsupportedModelError, match="draws at random for all heads"):
        FixSizeL2Compressor(8, strategy="random").new_cache(model.config)
    compressor = HeadAwareCompressor.from_model_config(model.config)
    dense = tiny_model("llama")(torch.arange(9)[None], use_cache=True).past_key_values
    with pytest.raises(InputError, match="only some of the model's heads: pass config=model.config"):
        compressor.compress(dense)
    with pytest.raises(UnsupportedModelError, match="split among processes cannot be captured"):
        GraphedDecoder(model, compressor.new_cache(model.config), 4)
