"""Every command that a README or a help text shows exists, with every flag, dial and target it is given; nothing long runs.

What a tiny model can stand for is run as written by `tests/project/test_readme_runs.py`.
"""

import importlib
import json
import re
import shlex
import subprocess
import sys
from functools import reduce
from operator import getitem
from pathlib import Path

import pytest
import typer
import yaml

from kvcompress.cli.main import app as kvcompress
from tests.core.param_sections import CLASSES
from tests.project.project import ROOT, copy_project, run
from tests.project.readme_blocks import (
    commands,
    indented_blocks,
    is_shell,
    mentioned,
    parsed_by_dvc,
    program,
    unknown_flags,
)
from tests.project.stage_files import STAGES

PAGES = ("README.md", "README.zh.md", "CONTRIBUTING.md", "inputs/README.md")
PAGES += tuple(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))
TEXTS = {page: (ROOT / page).read_text() for page in PAGES}
COMMANDS = sorted({shlex.join(words) for text in TEXTS.values() for words in commands(text)})
HELP = sorted(
    {shlex.join(words) for one in kvcompress.registered_commands for words in mentioned(one.callback.__doc__)}
)
MENTIONED = sorted({shlex.join(words) for text in TEXTS.values() for words in mentioned(text)} - set(COMMANDS))
NAMES_OF_TOOLS = {"dvc metrics", "dvc plots", "dvc exp"}  # in prose, a group of commands


def check_python(words: list[str], complete: bool) -> None:
    assert words[1] == "-m", words
    base = ROOT / "pipeline" if words[2].startswith("kvcompress") else ROOT
    assert (base / (words[2].replace(".", "/") + ".py")).is_file(), words[2]
    module = importlib.import_module(words[2])
    app = getattr(module, "app", None) or typer.Typer()
    if not hasattr(module, "app"):
        app.command()(module.main)
    check_typer(app, words[3:], complete)


def check_typer(app: typer.Typer, words: list[str], complete: bool) -> None:
    """Flags exist; a complete command also parses, values and all."""
    command, rest = program(app, words)
    assert unknown_flags(command, rest) == []
    if complete:
        command.make_context("test", rest)


def check_dvc(words: list[str], complete: bool) -> None:
    """DVC's own parser takes it; its targets are stages, and its dials those of params.yaml, with values they may have."""
    if shlex.join(words) in NAMES_OF_TOOLS:
        return
    given = parsed_by_dvc(words)
    if words[1] == "repro" or words[1:3] == ["exp", "run"]:
        assert set(given.targets or ()) <= set(STAGES), given.targets
    values = [dial.split("=", 1) for dial in getattr(given, "set_param", None) or ()]
    sweep = next((name for name, value in values if "," in value), None)
    assert sweep is None or given.queue, f"{words}: a sweep has to be queued"
    for value in dict(values)[sweep].split(",") if sweep else [None]:
        check_params({name: value if name == sweep else text for name, text in values})


def check_params(dials: dict[str, str]) -> None:
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    for name, text in dials.items():
        *path, last = name.split(".")
        block = reduce(getitem, path, params)
        assert last in block, f"params.yaml has no {name}"
        block[last] = yaml.safe_load(text)
    for section in {name.split(".")[0] for name in dials}:
        CLASSES[section].model_validate(params[section])


def check_make(words: list[str], complete: bool) -> None:
    assert subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True).returncode == 0, words


def check_source(words: list[str], complete: bool) -> None:
    assert words[1] == ".venv/bin/activate"
    assert re.search(r"^VENV := \.venv$", (ROOT / "Makefile").read_text(), re.M)


def check_pip(words: list[str], complete: bool) -> None:
    assert words == ["pip", "install", "."]  # `make wheel-test` does it


def check_torchrun(words: list[str], complete: bool) -> None:
    from torch.distributed.run import get_args_parser

    given = get_args_parser().parse_args(words[1:])
    started = [given.training_script, *given.training_script_args]
    if not given.no_python:
        started = ["python", "-m", *started]
    CHECKS[started[0]](started, complete)


def check_bash(words: list[str], complete: bool) -> None:
    assert subprocess.run(["bash", "-n", words[1]], cwd=ROOT, capture_output=True).returncode == 0, words


CHECKS = {
    "torchrun": check_torchrun,
    "bash": check_bash,
    "python": check_python,
    "kvcompress": lambda words, complete: check_typer(kvcompress, words[1:], complete),
    "dvc": check_dvc,
    "make": check_make,
    "source": check_source,
    "pip": check_pip,
}


def test_there_is_something_to_check() -> None:
    assert len(COMMANDS) > 30
    assert len(MENTIONED) > 10
    assert len(HELP) >= len(kvcompress.registered_commands)
    others = [block for text in TEXTS.values() for block in indented_blocks(text) if not is_shell(block)]
    assert all(block.startswith("stages/") for block in others), others  # the two trees of files


def test_the_sweep_queues_an_experiment_for_each_value(tmp_path: Path) -> None:
    """DVC itself on the queue's commands, in a copy; nothing is started."""
    folder = copy_project(tmp_path)
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "start"]):
        run(folder, "git", *words)
    (sweep,) = [shlex.join(words) for words in commands(TEXTS["README.md"]) if "--queue" in words]
    shown = [sweep, "dvc queue status", "dvc exp show --only-changed", "dvc queue remove --queued", "dvc queue status"]
    assert set(shown) <= {*COMMANDS, *MENTIONED}
    said = in_one_process(folder, shown)
    queued = re.findall(r"\bQueued experiment", said[0])
    assert len(queued) == said[0].count("thresholds.sink=") == 3
    assert said[1].count("Queued") == 3
    assert "No experiment tasks in the queue" in said[4]
    run(folder, "git", "check-ignore", "dvc_plots/index.html")  # what `dvc plots diff` writes


def in_one_process(folder: Path, lines: list[str]) -> list[str]:
    """Output of DVC's commands, which would spend most of their time on imports."""
    code = (
        "import json, sys\nfrom dvc.cli import main\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    assert main(words) == 0, words\n    print('=' * 9, flush=True)"
    )
    words = json.dumps([shlex.split(line)[1:] for line in lines])
    return run(folder, sys.executable, "-c", code, words).stdout.split("=" * 9)


@pytest.mark.parametrize("command", COMMANDS + HELP)
def test_a_command_is_complete_and_right(command: str) -> None:
    words = shlex.split(command)
    CHECKS[words[0]](words, True)


@pytest.mark.parametrize("command", MENTIONED)
def test_a_command_in_prose_exists(command: str) -> None:
    words = shlex.split(command)
    CHECKS[words[0]](words, False)
