"""The examples of CONTRIBUTING.md: each is short; applied to a copy of the project, they do there what they say."""

import re
import shutil
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvcompress.cli.main import app as kvcompress
from kvcompress.core.artifacts import read_json
from tests.project.project import ROOT, copy_project, run
from tests.tiny import prose

TITLE, *PARTS = re.split(r"^### ", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.M)
EXAMPLES = {part.split("\n", 1)[0]: part for part in PARTS}
MOST_LINES = 30


def fenced(part: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", part, flags=re.M | re.S)


def new_files(part: str) -> dict[str, str]:
    """Path -> content of Python blocks that begin with `# PATH`."""
    blocks = (block.split("\n", 1) for block in fenced(part, "python"))
    return {path.removeprefix("# "): content for path, content in blocks}


def hunks(part: str) -> list[tuple[str, list[str]]]:
    """(path, lines) of every change in diff blocks: `--- PATH` begins a file, `@@` another place in it."""
    found: list[tuple[str, list[str]]] = []
    for line in "".join(fenced(part, "diff")).splitlines():
        if line.startswith("--- "):
            found.append((line.removeprefix("--- "), []))
        elif line == "@@":
            found.append((found[-1][0], []))
        else:
            found[-1][1].append(line)
    return found


def changed(text: str, lines: list[str]) -> str:
    """`text` with one change made; the lines it starts from must stand there exactly once."""
    before, after = ("".join(f"{line[1:]}\n" for line in lines if line[:1] in (" ", sign)) for sign in "-+")
    assert f"\n{text}".count(f"\n{before}") == 1, before
    return f"\n{text}".replace(f"\n{before}", f"\n{after}")[1:]


def lines_added(part: str) -> int:
    written = "\n".join(new_files(part).values()).splitlines()
    changes = [line[1:] for _, lines in hunks(part) for line in lines if line[:1] == "+"]
    return sum(bool(line.strip()) for line in written + changes)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project, its tests included, with all examples applied, which ruff accepts."""
    folder = copy_project(tmp_path_factory.mktemp("copy"))
    for name in ("tests", "benchmarks", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    for part in EXAMPLES.values():
        for path, content in new_files(part).items():
            assert not (folder / path).exists()
            (folder / path).write_text(content)
        for path, lines in hunks(part):
            (folder / path).write_text(changed((folder / path).read_text(), lines))
    run(folder, "ruff", "check", ".")
    run(folder, "ruff", "format", "--check", ".")
    return folder


# Words of the copy's tests that speak of an example, as `pytest -k` takes them, and the files they lie in.
CHOSEN = (
    "static_baselines or first_only or every_method_once or escapes or value_norm or "
    "starcoder2 or count_sinks or described"
)
FILES = ("methods/test_baselines", "project/test_benchmark_stages", "project/test_pipeline", "collect/test_collect")
FILES += ("cache/test_oracle", "scores/test_scores", "reporting/test_method_style")


@pytest.fixture(scope="module")
def passed(project: Path) -> list[str]:
    """Names of the copy's tests that speak of an example, after one run in which none failed."""
    files = [f"tests/{name}.py" for name in FILES]
    marks = ["-m", "slow or not slow", "-k", CHOSEN]
    said = run(project, sys.executable, "-m", "pytest", "-rp", *marks, *files).stdout
    return re.findall(r"^PASSED tests/(\S+)", said, flags=re.M)


def test_every_example_is_here_and_short() -> None:
    assert list(EXAMPLES) == ["A baseline", "A score", "A model family", "A stage", "A storage format"]
    assert {title: lines_added(part) <= MOST_LINES for title, part in EXAMPLES.items()} == dict.fromkeys(EXAMPLES, True)


def test_the_baseline_is_a_uniform_plan_and_takes_part(passed: list[str]) -> None:
    """Compared with the mask oracle, run by name in the benchmark, its file among the stage's packages."""
    assert sum("static_baselines" in name for name in passed) == 4
    assert sum("every_method_once" in name for name in passed) == 1
    assert any("escapes" in name and "baselines" in name for name in passed)


def test_the_score_agrees_with_its_slow_twin(passed: list[str]) -> None:
    assert sum("value_norm" in name for name in passed) > 3


def test_the_model_family_is_under_the_tests_of_analysis_and_cache(passed: list[str]) -> None:
    of_family = [name for name in passed if "starcoder2" in name]
    assert sum(name.startswith("cache/test_oracle") for name in of_family) > 20
    assert any(name.startswith("collect") for name in of_family)


def test_the_stage_is_declared_and_runs_under_dvc(
    project: Path, passed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sum("count_sinks" in name or "described" in name for name in passed) >= 3
    monkeypatch.chdir(project)
    (project / "book.txt").write_text(prose(100))
    words = ["analyze", "inputs/tiny", "-t", "book.txt", "--max-tokens", "200", "--output-dir", "data"]
    assert CliRunner().invoke(kvcompress, words, catch_exceptions=False).exit_code == 0
    run(project, "git", "init", "-q")
    said = run(project, "dvc", "repro", "--single-item", "count_sinks").stdout
    assert "Running stage 'count_sinks'" in said
    assert isinstance(read_json(project / "reports/sinks/metrics.json"), dict)
