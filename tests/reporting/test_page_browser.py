"""The report page and `dvc plots` in a real browser without a network, at the widths of a desk and of a phone."""

import re
import shutil
from html import unescape
from pathlib import Path

import pytest
import yaml

from kvcompress.analysis.visualize import save_plot_data
from kvcompress.core.artifacts import read_json, write_json
from kvcompress.reporting.benchmark import growth_data, method_data
from kvcompress.reporting.comparison import all_rows, pareto_data, retrieval_data
from tests.project.project import ROOT, run
from tests.reporting.chromium import needs_browser, show
from tests.reporting.page_files import HEADS, LAYERS, classified, head, made_page, write_files

pytestmark = needs_browser
PLOTS = [name for entry in yaml.safe_load((ROOT / "reports/dvc.yaml").read_text())["plots"] for name in entry]
WIDTHS = (1280, 390)
SAY_WIDTH = "<script>parent.postMessage(`${document.documentElement.scrollWidth} of ${innerWidth}`, '*')</script>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_files(tmp_path_factory.mktemp("page"), speed=True)
    made_page(made)
    return made


def framed(page: Path, width: int) -> Path:
    """Return a page with another in a frame of this width; it writes down how wide the other has become."""
    copy, frame = page.with_name(f"copy{width}.html"), page.with_name(f"frame{width}.html")
    copy.write_text(page.read_text().replace("</body>", SAY_WIDTH + "</body>"))
    frame.write_text(
        "<!DOCTYPE html><p></p><script>onmessage = (event) => { document.querySelector('p').textContent = event.data; };"
        f"</script><iframe src={copy.name} style='width:{width}px;height:900px;border:0'></iframe>"
    )
    return frame


def test_requests_would_be_seen(tmp_path: Path) -> None:
    page = tmp_path / "asks.html"
    page.write_text("<img src='http://example.invalid/picture.png'>")
    assert show(page, tmp_path).asked == ["http://example.invalid/picture.png"]


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_fits_and_asks_for_nothing(folder: Path, tmp_path: Path, width: int) -> None:
    shown = show(framed(folder / "reports/index.html", width), tmp_path)
    assert f"<p>{width} of {width}</p>" in shown.dom
    assert shown.asked == []


@pytest.mark.parametrize(("kind", "place", "marked"), [("q", "2-1", 6), ("k", "0-1", 4)])
def test_a_head_says_what_is_known_of_it(folder: Path, tmp_path: Path, kind: str, place: str, marked: int) -> None:
    shown = show(folder / "reports/index.html", tmp_path, fragment=f"#head-{kind}{place}")
    assert shown.asked == []
    (row,) = re.findall(rf'<tr id="{kind}{place}">(.*?)</tr>', shown.dom)
    values = [unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)]
    layer, number = values[0].split(".")
    for name in ("tip", "said"):
        (said,) = re.findall(rf'<div id="{name}"[^>]*>(.*?)</div>', shown.dom, re.DOTALL)
        first, *rest = unescape(said).split("\n")
        assert first == f"layer {layer}, {'query' if kind == 'q' else 'KV'} head {number}"
        assert [line.split(": ")[1] for line in rest] == values[1:]
    assert shown.dom.count('class="here"') == marked


@pytest.fixture(scope="module")
def project(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the plots' section and its data, and another version of the data in the workspace."""
    made = tmp_path_factory.mktemp("plots")
    shutil.copytree(ROOT / ".dvc/plots", made / ".dvc/plots")
    reports = made / "reports"
    reports.mkdir()
    for name in ("reports/dvc.yaml", "params.yaml", ".dvc/config", ".dvc/.gitignore", ".dvcignore"):
        shutil.copy(ROOT / name, made / name)
    places = [(i, j) for i in range(LAYERS) for j in range(HEADS)]
    plots = reports / "analysis/plots"
    save_plot_data(plots, [head(*place) for place in places], [classified(*place) for place in places])
    shutil.copytree(folder / "reports/prices", reports / "prices")
    for name in ("ablation", "plan_comparison"):
        results = read_json(folder / f"reports/{name}/{name}.json")
        for protocol, rows in all_rows(results).items():
            write_json(reports / name / f"plots/{protocol}.json", pareto_data(rows))
        write_json(reports / name / "plots/retrieval.json", retrieval_data(results))
    timed = read_json(folder / "reports/benchmark/benchmark.json")
    timed[0]["growth"] += [row | {"contender": "uniform 25%"} for row in timed[0]["growth"][:2]]
    write_json(reports / "benchmark/plots/growth.json", growth_data(timed))
    write_json(reports / "benchmark/plots/methods.json", method_data(timed))
    run(made, "git", "init", "-q")
    run(made, "git", "add", "-A")
    run(made, "git", "commit", "-qm", "start")
    heads = read_json(plots / "heads.json")
    write_json(plots / "heads.json", [row | {"class": "mixed", "window": -1} for row in heads])
    return made


OWN = {  # plot -> marks of one revision, by kind
    "classes of heads": {"rect": LAYERS * HEADS},
    "windows of heads": {"rect": LAYERS * HEADS},
    "prices of heads": {"rect": 6},
    "facts that heads carry": {"rect": 6},
    "quality against bytes": {"symbol": 4, "rule": 4, "line": 3},
    "plans after a prefill": {"symbol": 4, "rule": 4, "line": 4},
    "plans on a stream": {"symbol": 6, "rule": 6, "line": 4},
    "facts found by plans": {"rect": 18},
}


def part_of(dom: str, plot: str) -> str:
    (part,) = re.findall(rf'id="[^"]*{plot.replace(" ", "_")}"(.*?)(?:<div id=|</main>)', dom, re.DOTALL)
    return part


def marks(dom: str, plot: str) -> dict[str, int]:
    """Count the marks of each kind in a plot."""
    part = part_of(dom, plot)
    found: dict[str, int] = {}
    for kind, inside in re.findall(r'<g class="mark-(\w+) role-mark [^"]*marks"[^>]*>(.*?)</g>', part, re.DOTALL):
        found[kind] = found.get(kind, 0) + inside.count("<path") + inside.count("<line")
    return {kind: count for kind, count in found.items() if count}


@pytest.mark.parametrize(("command", "revisions"), [("show", 1), ("diff", 2)])
def test_dvc_plots_draws_every_plot_without_a_network(
    project: Path, tmp_path: Path, command: str, revisions: int
) -> None:
    run(project, "dvc", "plots", command)
    shown = show(project / "dvc_plots/index.html", tmp_path)
    assert shown.asked == []
    for plot, expected in OWN.items():
        assert marks(shown.dom, plot) == {kind: count * revisions for kind, count in expected.items()}, plot
    for plot in set(PLOTS) - set(OWN):
        assert sum(marks(shown.dom, plot).values()) > 0, plot
    methods = [unescape(one) for one in re.findall(r">([^<>]*)</text>", part_of(shown.dom, "plans on a stream"))]
    legend = [one for one in methods if one in ("priced", "full cache", "sink + window (StreamingLLM)", "random heads")]
    assert legend == ["priced", "full cache", "sink + window (StreamingLLM)", "random heads"]
