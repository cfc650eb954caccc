"""Running a program of benchmarks/ in this process."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner

from kvcompress.core.artifacts import read_json


def result_of(app: typer.Typer, words: Sequence[str], folder: Path) -> Any:
    """The result of a run, which is the last line of its output and the file of `--output`."""
    output = folder / "result.json"
    done = CliRunner().invoke(app, [*words, "--output", str(output)])
    assert done.exit_code == 0, (done.output, done.exception)
    result = read_json(output)
    assert json.loads(done.stdout.splitlines()[-1]) == result
    assert {"device", "dtype", "torch"} <= set(result) | set(result.get("environment", {}))
    return result


def refused(app: typer.Typer, words: Sequence[str], message: str) -> None:
    """A run ends with one sentence that says what is wrong."""
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1, (words, done.output)
    assert message in done.stderr
    assert "Traceback" not in done.output
