"""Write into dvc.yaml what every stage's script imports, directly or not. Run: make deps"""

import re

from tests.project.stage_files import ROOT, STAGES, import_closure, script


def with_deps(text: str, stage: str, deps: list[str]) -> str:
    """`text` of dvc.yaml with these deps for one stage. Raises `ValueError` where the stage has no list of deps."""
    listed = re.compile(rf"(^  {stage}:\n(?:(?: {{4}}.*)?\n)*? {{4}}deps:\n)(?: {{6}}- .*\n)+", re.M)
    changed, count = listed.subn(lambda found: found[1] + "".join(f"      - {dep}\n" for dep in deps), text)
    if count != 1:
        raise ValueError(f"dvc.yaml has {count} lists of deps for the stage {stage}, expected one")
    return changed


def main() -> None:
    file = ROOT / "dvc.yaml"
    text = file.read_text()
    for name, stage in STAGES.items():
        others = {dep for dep in stage["deps"] if not dep.endswith((".py", ".pyi"))}
        code = {str(path.relative_to(ROOT)) for path in import_closure(script(name))}
        text = with_deps(text, name, sorted(others | code))
    file.write_text(text)


if __name__ == "__main__":
    main()
