"""The figure of scores shows what the reports hold, and nothing of reports that were not judged alike."""

import copy
from pathlib import Path
from typing import Any

import pytest
from typer import Typer
from typer.testing import CliRunner

from benchmarks.select_figure import draw, main
from kvcompress.core.artifacts import read_json
from kvcompress.core.errors import InputError
from tests.project.project import ROOT

REPORTS = sorted((ROOT / "reports/devices/nvidia-h100").glob("select_quality-*.json"))


def test_every_contender_has_a_line_of_its_numbers() -> None:
    results = [read_json(path) for path in REPORTS]
    figure = draw(results)
    lost, passkey, needle = figure.axes
    small, *_, large = sorted(results, key=lambda result: result["settings"]["shares"])
    for result, at in ((small, 0), (large, -1)):
        full, *rows = result["rows"]
        lines = {line.get_label(): line for line in lost.get_lines() if line.get_marker() != "None"}
        assert list(lines) == [row["family"] for row in rows]
        for i, row in enumerate(rows):
            line = lines[row["family"]]
            assert line.get_ydata()[at] == pytest.approx(row["perplexity_gmean"] / full["perplexity_gmean"])
            assert line.get_xdata()[at] == 100 * row["mean_share"]
            assert (line.get_linestyle() == "--") == ("window 64" in row["family"])
            for axis, task in ((passkey, "passkey"), (needle, "needle")):
                found = axis.get_lines()[i]
                assert found.get_xdata()[at] == 100 * result["settings"]["shares"][0]
                assert found.get_ydata()[at] == row["retrieval"][task]["share"]
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines.values()}
    assert len(looks) == len(lines)


def test_results_judged_otherwise_do_not_go_into_one_figure(tmp_path: Path) -> None:
    one, other = (read_json(path) for path in REPORTS[:2])
    draw([one, other])
    changes: list[dict[str, Any]] = [{"settings": {"context": 512}}, {"settings": {"shares": [0.25, 0.5]}}]
    changes += [{"settings": {"shares": one["settings"]["shares"]}}, {"environment": {"dtype": "bfloat16"}}]
    for change in (*changes, {"texts": ["hamlet"]}, {"model": "another"}, {"rows": other["rows"][:-1]}):
        changed = copy.deepcopy(other)
        for name, value in change.items():
            changed[name] = changed[name] | value if isinstance(value, dict) else value
        with pytest.raises(InputError, match="the results differ in model, texts, precision, settings or contenders"):
            draw([one, changed])
    app = Typer()
    app.command()(main)
    done = CliRunner().invoke(app, [str(REPORTS[0]), "--output", str(tmp_path / "figure.png")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
