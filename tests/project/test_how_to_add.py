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
    """A copy of the project, its tests included, with all examples applied, `make deps` run, and nothing that ruff minds."""
    folder = copy_project(tmp_path_factory.mktemp("copy"))
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    for part in EXAMPLES.values():
        for path, content in new_files(part).items():
            assert not (folder / path).exists()
            (folder / path).write_text(content)
        for path, lines in hunks(part):
            (folder / path).write_text(changed((folder / path).read_text(), lines))
    run(folder, sys.executable, "-m", "tests.project.write_deps")
    run(folder, "ruff", "check", ".")
    run(folder, "ruff", "format", "--check", ".")
    return folder


# Example -> the copy's tests that speak of it, as `pytest -k` takes them.
BASELINE = "static_baselines or all_methods or every_method_once or (import_closure and baselines)"
FAMILY, STAGE = "starcoder2", "count_sinks or described"
FILES = ("methods_baselines", "benchmark_stages", "pipeline", "collect", "cache_oracle")


@pytest.fixture(scope="module")
def passed(project: Path) -> list[str]:
    """Names of the copy's tests that speak of an example, after one run in which none failed."""
    files = [f"tests/test_{name}.py" for name in FILES]
    chosen = f"{BASELINE} or {FAMILY} or {STAGE}"
    said = run(project, sys.executable, "-m", "pytest", "-rp", "-k", chosen, *files).stdout
    return re.findall(r"^PASSED tests/test_(\S+)", said, flags=re.M)


def test_every_example_is_here_and_short() -> None:
    assert list(EXAMPLES) == ["A baseline", "A model family", "A stage"]
    assert {title: lines_added(part) <= MOST_LINES for title, part in EXAMPLES.items()} == dict.fromkeys(EXAMPLES, True)


def test_the_baseline_is_what_it_says_and_takes_part(passed: list[str]) -> None:
    """Judged by the mask oracle, by name in the benchmark, on its page, and its file among the stage's deps."""
    assert sum("static_baselines" in name for name in passed) == 4
    assert sum("all_methods" in name or "every_method_once" in name for name in passed) == 2
    assert sum("import_closure" in name and "baselines" in name for name in passed) == 1


def test_the_model_family_is_under_the_tests_of_analysis_and_cache(passed: list[str]) -> None:
    of_family = [name for name in passed if "starcoder2" in name]
    assert sum(name.startswith("cache_oracle") for name in of_family) > 20
    assert any(name.startswith("collect") for name in of_family)


def test_the_stage_is_declared_and_runs_under_dvc(
    project: Path, passed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sum("count_sinks" in name or "described" in name for name in passed) == 3
    monkeypatch.chdir(project)
    (project / "book.txt").write_text(prose(100))
    words = ["analyze", "inputs/tiny", "-t", "book.txt", "--max-tokens", "200", "--output-dir", "data"]
    assert CliRunner().invoke(kvcompress, words, catch_exceptions=False).exit_code == 0
    run(project, "git", "init", "-q")
    said = run(project, "dvc", "repro", "--single-item", "count_sinks").stdout
    assert "Running stage 'count_sinks'" in said
    assert isinstance(read_json(project / "reports/metrics/sinks.json"), dict)
