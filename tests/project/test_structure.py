"""The structure of the library, read from its imports and definitions: floors, circles, folders, names, prose."""

import ast
import itertools
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.project.stage_files import ROOT, imported_files, imports

LIBRARY = ROOT / "pipeline/kvcompress"
FLOORS = {
    "core": 1,
    "models": 2,
    "texts": 2,
    "ops": 3,
    "collect": 3,
    "scores": 4,
    "analysis": 4,
    "cache": 5,
    "sensitivity": 5,
    "methods": 6,
    "planning": 6,
    "evaluation": 7,
    "reporting": 8,
    "cli": 9,
}
FILES = sorted(LIBRARY.rglob("*.py"))
MOST_FILES = 12
OPENINGS = {"what", "whether", "how", "which", "where", "who", "as", "the same"}


def package(file: Path) -> str | None:
    """The package of a file of the library; None for kvcompress/__init__.py, which only passes names on."""
    parts = file.relative_to(LIBRARY).parts
    return parts[0] if len(parts) > 1 else None


def library_imports(file: Path) -> set[Path]:
    """Files of the library that a file imports, without the packages' `__init__` that come along."""
    return {one for one in imported_files(file) if LIBRARY in one.parents and one.name != "__init__.py"} - {file}


def packages_asked(file: Path) -> set[str]:
    """Packages whose `__init__` a file asks for a name, as in `from kvcompress.methods import HeadAwareCompressor`."""
    found = [node.module or "" for node in imports(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
    return {module.removeprefix("kvcompress.").split(".")[0] for module in found if module.startswith("kvcompress.")}


def test_every_package_has_a_floor() -> None:
    assert {package(file) for file in FILES} - {None} == set(FLOORS)


@pytest.mark.parametrize("name", FLOORS)
def test_no_arrow_runs_up_or_along(name: str) -> None:
    """A package imports from lower floors alone; nothing imports `stages`, `benchmarks`, `tools` or tests."""
    for file in FILES:
        if package(file) == name:
            others = {one for one in imported_files(file) if LIBRARY not in one.parents}
            assert not others, (file, others)
            asked = packages_asked(file) - {name}
            assert all(FLOORS[one] < FLOORS[name] for one in asked), (file, asked)
            for one in library_imports(file):
                to = package(one)
                assert to in (name, None) or FLOORS[to] < FLOORS[name], f"{file} imports {one}"


def test_no_circle_between_files() -> None:
    graph = {file: library_imports(file) for file in FILES if file.name != "__init__.py"}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the files


def test_folders_are_small() -> None:
    counts = Counter(file.parent for file in FILES if file.name != "__init__.py")
    assert {str(folder.relative_to(ROOT)): count for folder, count in counts.items() if count > MOST_FILES} == {}


def test_every_package_owns_its_section() -> None:
    """Parameters are read where they are used: `params.py` of a package, and nowhere a folder of all of them."""
    sections = {
        file for file in FILES if "(SectionParams)" in file.read_text() or ", SectionParams)" in file.read_text()
    }
    assert sections
    assert all(file.name == "params.py" for file in sections), sections


def test_no_two_classes_of_one_name() -> None:
    names = Counter(
        node.name for file in FILES for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in names.items() if count > 1] == []


def docstrings() -> list[str]:
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes = itertools.chain.from_iterable(ast.walk(ast.parse(file.read_text())) for file in FILES)
    return [text for node in nodes if isinstance(node, kinds) and (text := ast.get_docstring(node))]


def test_docstrings_open_with_a_verb_or_a_noun() -> None:
    found = docstrings()
    riddles = [text for text in found if text.lower().startswith(tuple(f"{word} " for word in OPENINGS))]
    assert len(riddles) <= 0.04 * len(found), riddles
