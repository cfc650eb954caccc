"""The examples of CONTRIBUTING.md: each is applied to a copy of the project, is short, and there does what it says."""

import re
import shutil
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvcompress.artifacts import read_json
from kvcompress.cli.main import app as kvcompress
from tests.project import ROOT, copy_project, run
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


@pytest.fixture
def project(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A copy of the project, its tests included, with one example applied, `make deps` run, and nothing that ruff minds."""
    part = EXAMPLES[request.param]
    folder = copy_project(tmp_path / "copy")
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    for path, content in new_files(part).items():
        assert not (folder / path).exists()
        (folder / path).write_text(content)
    for path, lines in hunks(part):
        (folder / path).write_text(changed((folder / path).read_text(), lines))
    run(folder, sys.executable, "-m", "tests.write_deps")
    run(folder, "ruff", "check", ".")
    run(folder, "ruff", "format", "--check", ".")
    return folder


def pytest_in(folder: Path, chosen: str, *files: str) -> int:
    """Run tests of the copy; how many passed."""
    paths = [f"tests/test_{name}.py" for name in files]
    said = run(folder, sys.executable, "-m", "pytest", "-k", chosen, *paths).stdout
    return int(re.findall(r"(\d+) passed", said)[-1])


def test_every_example_is_here_and_short() -> None:
    assert list(EXAMPLES) == ["A baseline", "A model family", "A stage"]
    assert {title: lines_added(part) <= MOST_LINES for title, part in EXAMPLES.items()} == dict.fromkeys(EXAMPLES, True)


@pytest.mark.parametrize("project", ["A baseline"], indirect=True)
def test_the_baseline_is_what_it_says_and_takes_part(project: Path) -> None:
    """Judged by the mask oracle, by name in the benchmark, on its page, and its file among the stage's deps."""
    chosen = "static_baselines or all_methods or every_method_once or (import_closure and baselines)"
    assert pytest_in(project, chosen, "methods_baselines", "benchmark_stages", "pipeline") == 4 + 1 + 1 + 1


@pytest.mark.parametrize("project", ["A model family"], indirect=True)
def test_the_model_family_is_under_the_tests_of_analysis_and_cache(project: Path) -> None:
    assert pytest_in(project, "starcoder2", "collect", "cache_oracle") > 20


@pytest.mark.parametrize("project", ["A stage"], indirect=True)
def test_the_stage_runs_under_dvc(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    (project / "book.txt").write_text(prose(100))
    words = ["analyze", "inputs/tiny", "-t", "book.txt", "--max-tokens", "200", "--output-dir", "data"]
    assert CliRunner().invoke(kvcompress, words, catch_exceptions=False).exit_code == 0
    run(project, "git", "init", "-q")
    said = run(project, "dvc", "repro", "--single-item", "count_sinks").stdout
    assert "Running stage 'count_sinks'" in said
    assert isinstance(read_json(project / "reports/metrics/sinks.json"), dict)
    assert pytest_in(project, "count_sinks or described", "pipeline") == 3
