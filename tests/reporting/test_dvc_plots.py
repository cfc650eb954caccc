"""Templates and page of `dvc plots`, which works without a network."""

import json
import re

import pytest
import yaml

from kvcompress.core.head_classes import CLASS_STYLE as CLASSES
from tests.project.project import ROOT

PLOTS = ROOT / ".dvc/plots"
SHOWN = {
    name: plot
    for entry in yaml.safe_load((ROOT / "reports/dvc.yaml").read_text())["plots"]
    for name, plot in entry.items()
}
BUILT_IN = {"linear", "scatter", "bar_horizontal"}
FOLDERS = {"analysis", "ablation", "plan_comparison", "benchmark", "prices"}  # of reports, one a stage


def test_every_plot_has_its_template_and_reads_the_folder_of_a_stage() -> None:
    for name, plot in SHOWN.items():
        assert plot["template"] in BUILT_IN or (PLOTS / f"{plot['template']}.json").is_file(), name
        assert {path.split("/")[0] for path in plot["y"]} <= FOLDERS, name
    assert {path.stem for path in PLOTS.glob("*.json")} == {plot["template"] for plot in SHOWN.values()} - BUILT_IN


@pytest.mark.parametrize("path", sorted(PLOTS.glob("*.json")), ids=lambda path: path.stem)
def test_templates_have_the_anchors_of_dvc(path) -> None:
    text = path.read_text()
    for anchor in ("DATA", "TITLE", "X", "Y", "X_LABEL", "Y_LABEL"):
        assert f"<DVC_METRIC_{anchor}>" in text, anchor


def test_classes_have_the_colours_of_the_figures() -> None:
    scale = json.loads((PLOTS / "head_classes.json").read_text())["encoding"]["color"]["scale"]
    assert dict(zip(scale["domain"], scale["range"], strict=True)) == {kind.value: CLASSES[kind][0] for kind in CLASSES}


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
