"""What a README or a page of docs/ shows is run as written, wherever a tiny random model can stand for the one it names.

No word of a command or a Python block is changed: the folder they run in holds a tiny model under every name that they
use (`MODEL`, `data/model`, `EleutherAI/pythia-2.8b`) and the files they read. The blocks of a page run one after the other,
as a reader pastes them, and nothing is given to the first. Where the real `data/model` has been made, the passkey example
runs on it too and has to find the key.
"""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import decode
from kvcompress.cli.main import app as kvcompress
from kvcompress.core.head_classes import HeadClassification, HeadType, save_classifications
from kvcompress.core.plan import RetentionPlan
from kvcompress.core.retention import FULL, Retention
from stages import ablate, benchmark, collect_attention, compute_stats, prepare, reclassify
from tests.project.project import ROOT, copy_project
from tests.project.readme_blocks import alternatives, commands, python_blocks
from tests.tiny import prose, save_tiny

PAGES = ("README.md", "README.zh.md", "docs/library.md", "docs/pipeline.md", "docs/speed.md")
TEXTS = {page: (ROOT / page).read_text() for page in PAGES}
README, CHINESE = TEXTS["README.md"], TEXTS["README.zh.md"]
STAGES = {f"stages.{module.__name__.split('.')[-1]}": module.app for module in (
    ablate, benchmark, collect_attention, compute_stats, reclassify
)}  # fmt: skip
PLANS = "reports/plans/SmolLM2-135M-Instruct"
PUBLISHED = "reports/devices/cpu-2-cores/plans/SmolLM2-135M-Instruct"  # plans that no run of the pipeline rewrites


def long_tiny(folder: Path) -> None:
    """A tiny model whose context has room for what READMEs read."""
    save_tiny("llama", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16384}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project, with what READMEs name: models, texts, a plan, classes."""
    folder = copy_project(tmp_path_factory.mktemp("reader"))
    for name in ("MODEL", "EleutherAI/pythia-2.8b", "inputs/tiny"):
        long_tiny(folder / name)
    for number, name in enumerate(("book.txt", "another.txt", "inputs/seen.txt", "inputs/unseen.txt")):
        (folder / name).write_text(prose(900, number))
    layers = ((FULL, Retention(2, 30)), (Retention(2, 60), Retention(2, 62)))
    for name in (f"{PLANS}/priced-25.json", f"{PLANS}/select-25.json", "reports/plans/tiny/priced-25.json"):
        RetentionPlan(layers, 4, "tiny", "priced").save(folder / name)
    heads = [HeadClassification(i, j, HeadType.MIXED, 0.5) for i in range(2) for j in range(4)]
    for name in ("data/refined_classifications.json", "refined_classifications.json"):
        save_classifications(folder / name, heads)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        invoke(prepare.app, [])
    long_tiny(folder / "data/model")  # the pipeline's own is made where a package is unpacked
    return folder


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors: sharing them out costs more than it saves
    yield
    torch.set_num_threads(threads)


def everywhere() -> list[list[str]]:
    return [words for text in TEXTS.values() for words in commands(text)]


def invoke(app: Any, words: list[str]) -> str:
    done = CliRunner(env={"NO_COLOR": "1", "COLUMNS": "160"}).invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, (shlex.join(words), done.output)
    return done.stdout


def test_the_command_line() -> None:
    shown = [tuple(words) for page in (README, CHINESE) for words in commands(page) if words[0] == "kvcompress"]
    assert {words[1] for words in shown} == {"analyze", "plan", "generate", "evaluate", "benchmark", "show"}
    for words in dict.fromkeys(shown):  # in the order of the page: what one writes, the next reads
        assert invoke(kvcompress, list(words[1:]))


def test_stages_one_by_one(folder: Path) -> None:
    shown = [words for words in everywhere() if words[:2] == ["python", "-m"] and words[2] in STAGES]
    assert {words[2] for words in shown} == set(STAGES)
    for words in shown:
        invoke(STAGES[words[2]], words[3:])
    assert {"attention.safetensors", "head_statistics.json"} <= {path.name for path in (folder / "results").iterdir()}


def test_the_cost_of_a_decode_step() -> None:
    (words,) = [words for words in everywhere() if words[2:4] == ["benchmarks.decode", "model"]]
    assert "DynamicCache" in invoke(decode.app, words[3:])


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(TEXTS[page])])
def test_the_python_blocks_of_a_page(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for block in python_blocks(TEXTS[page]):
        exec(compile(block, page, "exec"), names)
        for other in alternatives(block):
            assert eval(other, names)
        assert "print(" not in block or "RaggedCache" in capsys.readouterr().out


def made_here() -> str | None:
    """The model that `make repro` has put into data/model, if it was run."""
    record = ROOT / "data/model.json"
    return json.loads(record.read_text())["id"] if record.is_file() and (ROOT / "data/model").is_dir() else None


@pytest.mark.skipif(made_here() != Path(PLANS).name, reason="make repro puts the README's model into data/model")
def test_the_passkey_is_found_by_the_real_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    torch.set_num_threads(2)
    (block,) = [block for block in python_blocks(README) if "pass key" in block]
    assert PLANS in block
    exec(compile(block.replace(PLANS, PUBLISHED), "README", "exec"), {})
    assert capsys.readouterr().out.strip().startswith("48213")
