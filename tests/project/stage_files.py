"""Files of the project that a stage's script imports, directly or not; read from the sources, nothing is imported."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]


def declared_stages(text: str) -> dict[str, dict[str, Any]]:
    """Stages of a dvc.yaml by their full names: `foreach` is expanded and `${...}` filled in, as DVC does."""
    content = yaml.safe_load(text)
    variables = {f"${{{name}}}": value for block in content.get("vars", []) for name, value in block.items()}
    found = {}
    for name, stage in content["stages"].items():
        if "foreach" not in stage:
            found[name] = _filled(stage, variables)
        for key, item in stage.get("foreach", {}).items():
            items = {f"${{item.{field}}}": value for field, value in item.items()}
            found[f"{name}@{key}"] = _filled(stage["do"], {**variables, **items, "${key}": key})
    return found


def _filled(value: Any, variables: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {_filled(key, variables): _filled(one, variables) for key, one in value.items()}
    if isinstance(value, list):
        return [_filled(one, variables) for one in value]
    if isinstance(value, str):
        for name, text in variables.items():
            value = value.replace(name, text)
    return value


STAGES = declared_stages((ROOT / "dvc.yaml").read_text())


def script(stage: str) -> Path:
    (module,) = set(re.findall(r"python -m stages\.(\w+)", STAGES[stage]["cmd"]))
    return ROOT / "stages" / f"{module}.py"


def imports(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import wherever it stands, but for those that only a type checker sees."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        else:
            yield from imports(node)


@cache
def imported_files(path: Path) -> frozenset[Path]:
    """Project files that a file imports directly, with the packages that they lie in."""
    found: set[Path] = set()
    for node in imports(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            modules = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        for module in modules:
            parts = module.split(".")
            for base in (ROOT, ROOT / "pipeline"):
                for depth in range(1, len(parts) + 1):
                    place = base.joinpath(*parts[:depth])
                    found |= {file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()}
    return frozenset(found)


def import_closure(path: Path, without: Path | None = None) -> set[Path]:
    """The file and all that it imports, directly or not, but for what lies in the folder `without`."""
    closure: set[Path] = set()
    todo = {path, ROOT / "stages/__init__.py"}
    while todo:
        file = todo.pop()
        closure.add(file)
        todo |= {one for one in imported_files(file) - closure if without not in one.parents}
    return closure
