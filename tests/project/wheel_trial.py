"""The wheel in an empty environment: built, installed with what it depends on, and used. Run: make wheel-test

Needs the Python package index and a minute or two, so pytest does not run it; `tests/project/test_wheel.py` checks
what a wheel
holds. What is used: the command line on a tiny random model, and the README's passkey example, as written.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from kvcompress.core.plan import RetentionPlan
from kvcompress.core.retention import FULL, Retention
from tests.project.project import ROOT
from tests.project.readme_blocks import python_blocks
from tests.tiny import prose, save_tiny

SOURCES = ("pipeline", "pyproject.toml", "README.md", "LICENSE")
PLAN = "reports/plans/SmolLM2-135M-Instruct/select-25.json"


def copy_sources(folder: Path) -> Path:
    """What the wheel is built from, in a folder that the build may litter."""
    folder.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def reader(folder: Path) -> Path:
    """A folder as somebody has it who only installed the wheel: a model, a text, a plan, the README's example."""
    folder.mkdir()
    for name in ("tiny", "data/model"):
        save_tiny("llama", folder / name)
    (folder / "book.txt").write_text(prose(300, 1))
    RetentionPlan(((FULL, Retention(2, 30)), (Retention(2, 60), Retention(2, 62))), 4, "tiny").save(folder / PLAN)
    (block,) = [block for block in python_blocks((ROOT / "README.md").read_text()) if "pass key" in block]
    (folder / "example.py").write_text(block)
    return folder


def run(folder: Path, *command: str) -> None:
    """Run and show; the environment knows no checkout of this project. Raises `CalledProcessError` on failure."""
    print("$", " ".join([Path(command[0]).name, *command[1:]]), flush=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    subprocess.run(command, cwd=folder, env={**environment, "NO_COLOR": "1"}, check=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        top = Path(scratch)
        sources, empty, folder = copy_sources(top / "sources"), top / "empty", reader(top / "reader")
        venv.create(empty, with_pip=True)
        python, program = str(empty / "bin/python"), str(empty / "bin/kvcompress")
        pip = (python, "-m", "pip", "--quiet", "--disable-pip-version-check")
        run(top, *pip, "wheel", "--no-deps", "--wheel-dir", "dist", str(sources))
        (wheel,) = (top / "dist").iterdir()
        run(top, *pip, "install", "--constraint", str(ROOT / "requirements.lock"), str(wheel))
        run(folder, python, "-c", "import kvcompress; print(kvcompress.__version__, 'from', kvcompress.__file__)")
        run(folder, program, "--help")
        for line in (
            "analyze tiny --text book.txt --max-tokens 200 --output-dir found",
            "show found/refined_classifications.json",
            "plan tiny --budget 25% --text book.txt --max-tokens 512 --context 512 --facts-per-context 2 -o plan.json",
            "generate tiny The-key-is --plan plan.json --max-new-tokens 8 --json",
            "benchmark tiny --text book.txt --max-tokens 160 --max-new-tokens 5 --plan plan.json",
        ):
            run(folder, program, *line.split())
        run(folder, python, "example.py")
    print("the wheel works in an empty environment")


if __name__ == "__main__":
    sys.exit(main())
