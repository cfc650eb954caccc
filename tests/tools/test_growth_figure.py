"""The figure of decode steps shows the numbers of the result."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from kvcompress.core.errors import InputError
from tests.project.project import ROOT
from tools import growth_figure

PUBLISHED = ROOT / "reports/devices/nvidia-h100"


def test_growth_is_drawn_from_a_result(tmp_path: Path) -> None:
    report = PUBLISHED / "batch_cost.json"
    costs = json.loads(report.read_text())["growth"]["costs"]
    figure = growth_figure.draw(costs, "title")
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == [f"batch {batch}" for batch in sorted({cost["batch"] for cost in costs})]
    drawn = [y for axis in figure.axes for line in axis.lines for y in line.get_ydata()]
    assert max(drawn) == max(cost["ms"] for cost in costs)
    assert figure.axes[0].get_ylim()[0] == 0
    assert figure.axes[0].get_ylim()[1] > max(drawn)
    app = typer.Typer()
    app.command()(growth_figure.main)
    assert CliRunner().invoke(app, [str(report), "--output", str(tmp_path / "growth.png")]).exit_code == 0
    assert (tmp_path / "growth.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(InputError, match="has no growth"):
        growth_figure.main(PUBLISHED / "kernel_cost.json", tmp_path / "no.png")
