"""Which files of the project a stage's script imports, directly or not; read from the sources, nothing is imported."""

import ast
import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def script(stage: str) -> Path:
    (module,) = set(re.findall(r"python -m stages\.(\w+)", STAGES[stage]["cmd"]))
    return ROOT / "stages" / f"{module}.py"


def imported_files(path: Path) -> set[Path]:
    """Project files that a file imports directly, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for module in modules:
            parts = module.split(".")
            for base in (ROOT, ROOT / "pipeline"):
                for depth in range(1, len(parts) + 1):
                    place = base.joinpath(*parts[:depth])
                    files = (place.with_suffix(".py"), place / "__init__.py", place / "__init__.pyi")
                    found |= {file for file in files if file.is_file()}
            stub = ROOT / "pipeline" / Path(*parts[:-1]) / "__init__.pyi"
            if stub.is_file():  # a name that the package loads when it is used
                of_name = re.search(rf"^from \.(\w+) import {parts[-1]} as", stub.read_text(), re.M)
                found |= {stub.with_name(f"{of_name[1]}.py")} if of_name else set()
    return found


def import_closure(path: Path) -> set[Path]:
    closure, todo = set(), {path, ROOT / "stages/__init__.py"}
    while todo:
        file = todo.pop()
        closure.add(file)
        if file.suffix == ".py":  # a stub names what a package can load, not what it does load
            todo |= imported_files(file) - closure
    return closure
