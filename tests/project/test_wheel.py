"""What the wheel holds: every file of the library, with types and data, and nothing else; `make wheel-test` installs it."""

import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
import setuptools

from tests.project.project import ROOT
from tests.project.wheel_trial import copy_sources

TYPES_AND_DATA = {
    "py.typed",
    "reporting/page.css",
    "reporting/page.js",
}
BUILD = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip(f"setuptools is {setuptools.__version__}, the build needs 77")
    top = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-c", BUILD, str(top)]
    done = subprocess.run(command, cwd=copy_sources(top / "sources"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return top / done.stdout.split()[-1]


def test_it_holds_the_whole_library_and_nothing_else(wheel: Path) -> None:
    names = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = [file for file in (ROOT / "pipeline/kvcompress").rglob("*") if file.is_file()]
    files = [file for file in files if file.suffix != ".pyc"]
    assert names == {str(file.relative_to(ROOT / "pipeline")) for file in files}
    assert {f"kvcompress/{name}" for name in TYPES_AND_DATA} <= names


def test_it_says_what_it_is(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        (folder,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        metadata = archive.read(f"{folder}/METADATA").decode()
        assert "kvcompress = kvcompress.cli.main:run" in archive.read(f"{folder}/entry_points.txt").decode()
    assert "License-Expression: MIT" in metadata
    assert "Requires-Dist: torch" in metadata


def test_unpacked_it_is_imported_and_runs(wheel: Path, tmp_path: Path) -> None:
    """Lazy names need the stubs, the page its style and script: all found beside the code, far from this checkout."""
    ZipFile(wheel).extractall(tmp_path)
    code = (
        "import kvcompress\nfrom kvcompress.methods import StreamingLLMCompressor\n"
        "from kvcompress.planning import make_plan\nfrom kvcompress.analysis import AttentionAnalyzer\n"
        "from kvcompress.reporting.page import HERE\nfrom kvcompress.cli.main import run\n"
        "print(kvcompress.__file__, (HERE / 'page.css').is_file(), flush=True)\nrun()"
    )
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{code}", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path}/kvcompress/__init__.py True")
    assert "benchmark" in done.stdout
