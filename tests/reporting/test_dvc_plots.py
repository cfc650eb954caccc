"""What `dvc plots` needs of the repository: templates in the colours of the figures, and a page with its scripts inside."""

import json
import re

import pytest
import yaml

from kvcompress.core.head_classes import CLASS_STYLE as CLASSES
from kvcompress.reporting.comparison_data import OTHER
from kvcompress.reporting.comparison_data import STYLE as METHODS
from tests.project.project import ROOT

PLOTS = ROOT / ".dvc/plots"
PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())
SHOWN = {name: plot for entry in PIPELINE["plots"] for name, plot in entry.items()}
BUILT_IN = {"linear", "scatter", "bar_horizontal"}


def test_every_plot_has_its_template_and_a_stage_that_writes_its_data() -> None:
    outs = {
        name
        for stage in PIPELINE["stages"].values()
        for out in stage.get("outs", []) + stage.get("plots", [])
        for name in ([out] if isinstance(out, str) else out)
    }
    for name, plot in SHOWN.items():
        assert plot["template"] in BUILT_IN or (PLOTS / f"{plot['template']}.json").is_file(), name
        assert set(plot["y"]) <= outs, name
    assert {path.stem for path in PLOTS.glob("*.json")} == {plot["template"] for plot in SHOWN.values()} - BUILT_IN


@pytest.mark.parametrize("path", sorted(PLOTS.glob("*.json")), ids=lambda path: path.stem)
def test_templates_take_what_dvc_fills_in(path) -> None:
    text = path.read_text()
    for anchor in ("DATA", "TITLE", "X", "Y", "X_LABEL", "Y_LABEL"):
        assert f"<DVC_METRIC_{anchor}>" in text, anchor
    scale = json.loads(text)["encoding"]["color"]["scale"]
    if "range" in scale:
        known = {kind.value: colour for kind, (colour, _) in CLASSES.items()} if "classes" in path.stem else {
            name: colour for name, (colour, _) in METHODS.items()
        }  # fmt: skip
        assert scale["range"] == [known.get(name, OTHER[0]) for name in scale["domain"]]
    else:
        assert scale["scheme"] == "cividis"


def test_the_page_holds_its_scripts() -> None:
    page = (PLOTS / "page.html").read_text()
    (config,) = re.findall(r"html_template = (.+)", (ROOT / ".dvc/config").read_text())
    assert ROOT / ".dvc" / config == PLOTS / "page.html"
    assert page.count("{plot_divs}") == 1
    assert "{scripts}" not in page  # where DVC puts its links to a server
    around = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"<script|src=|href=|https?:", around)
    assert "default-src 'none'" in page
    licences = (PLOTS / "LICENSES.txt").read_text()
    for name, version in re.findall(r"<script>/\* (\S+) (\S+), see", page):
        assert f"{name} {version} (BSD-3-Clause)" in licences
    assert len(page) < 1_500_000
