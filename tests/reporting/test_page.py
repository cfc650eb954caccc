"""The report page as a file: complete, escaped, without requests, byte-stable."""

import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kvcompress.core.artifacts import write_json
from kvcompress.core.errors import InputError
from kvcompress.reporting.comparison import conclusion, report
from kvcompress.reporting.head_map import Scale, cividis, ink_on, luminance
from kvcompress.reporting.html import number, tag
from tests.reporting.page_files import (
    HEADS,
    KV_HEADS,
    LAYERS,
    ablation,
    benchmark,
    comparison,
    made_page,
    write_files,
)

HOSTILE = """<script>alert("x")</script>&'</title>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return made_page(write_files(tmp_path_factory.mktemp("page"), speed=True))


class Balanced(HTMLParser):
    """Whether every tag is closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, name: str, attributes: list) -> None:
        self.seen.append((name, dict(attributes)))
        if name not in ("meta", "br", "hr"):
            self.open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name


def table_row(page: str, key: str) -> list[str]:
    (found,) = re.findall(rf'<tr id="{key}">(.*?)</tr>', page)
    return [unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", found)]


def test_markup_is_balanced_and_ids_are_unique(page: str) -> None:
    found = Balanced(page)
    assert found.open == []
    ids = [attributes["id"] for _, attributes in found.seen if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [attributes["href"] for name, attributes in found.seen if name == "a"]
    assert {link.removeprefix("#") for link in links} <= set(ids)


def test_the_page_requests_nothing(page: str) -> None:
    assert "default-src 'none'" in unescape(page)
    assert not re.search(r"https?:|src=|@import|url\((?!#)|<link|<image", page)


def test_all_heads_are_in_every_map_and_in_the_tables(page: str) -> None:
    for kind, heads, least in (("q", HEADS, 6), ("k", KV_HEADS, 4)):
        maps = re.findall(rf'<svg [^>]*data-rows="{kind}"[^>]*>(.*?)</svg>', page)
        assert len(maps) == least
        assert {one.count("<rect") for one in maps} == {LAYERS * heads}
        rows = re.findall(rf'<tr id="{kind}(\d+)-(\d+)">', page)
        assert rows == [(str(i), str(j)) for i in range(LAYERS) for j in range(heads)]


def test_what_is_said_of_a_head_is_what_the_files_say(page: str) -> None:
    assert table_row(page, "q2-3") == ["2.3", "gathering", "full", "3.75", "0.230", "0.200", "0.375"]
    assert table_row(page, "q1-1") == ["1.1", "sink-positional", "9", "2.25", "0.110", "0.100", "0.125"]
    assert table_row(page, "k0-0") == ["0.0", "0.000", "-0.100", "2,048 (all)", "2,048 (all)"]
    assert table_row(page, "k2-1") == ["2.1", "2.500", "0.150", "16 (4 + 12)", "64 (4 + 60)"]


def test_conclusions_are_those_of_the_reports(page: str) -> None:
    said = [unescape(one) for one in re.findall(r'<span class="conclusion">(.*?)</span>', page)]
    results = comparison("maker/made-up") + ablation("maker/made-up")
    rows = [row for one in results for row in [*one["rows"], *one.get("continuation", [])]]
    sentences = [sentence for row in rows if (sentence := conclusion(row))]
    assert sorted(said) == sorted(sentences)
    assert all(sentence in report(results) for sentence in said)
    shown = [
        unescape(one)
        for one in re.findall(r'<span class="conclusion">(.*?)</span>', page.split("comparisons at equal bytes")[0])
    ]
    assert shown == [one for one in said if one.startswith("class table loses to the uniform cache of its bytes: ")]
    assert len(shown) == 1
    assert page.count('class="badge loses"') == 2


def test_the_first_table_compares_own_plans_with_their_rivals(page: str) -> None:
    after, published, streamed = (
        part.split("</tbody>")[0] for part in page.split('id="summary"')[1].split("<tbody>")[1:4]
    )
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line) for line in streamed.split("</tr>")[:-1]]
    assert [row[0] for row in rows] == ["full cache", "priced-50", "priced-25"]
    assert [re.sub("<.*?>", "", row[2]) for row in rows] == ["", "= even", "▲ wins"]
    assert rows[2][1] == "25.0%"
    assert rows[2][3:5] == ["19.00", "20.00"]
    assert [re.findall(r"<th[^>]*>(.*?)</th>", line)[0] for line in after.split("</tr>")[:-1]] == [
        "full cache", "select-25", "SnapKV, even budget, 25%",
    ]  # fmt: skip
    assert "<td>SnapKV, even budget, 25%</td><td>wins</td><td>17.50</td><td>17.80</td>" in published


def test_figures_are_inline_in_the_colours_of_the_page(page: str) -> None:
    figures = dict(re.findall(r'<svg class="chart" data-name="([\w-]+)"(.*?)</svg>', page, re.DOTALL))
    names = {"plans-pareto", "plans-pareto_continuation", "ablation-pareto", "plans-retrieval", "ablation-retrieval"}
    assert set(figures) == names | {"growth0"}
    for name, drawn in figures.items():
        assert "var(--ink)" in drawn, name
        assert "<style" not in drawn, name  # its rules would hold for the whole page
        places = set(re.findall(r'"url\(#(\w+)\)|href="#(\w+)"', drawn))
        ids = re.findall(r' id="(\w+)"', drawn)
        assert {one or other for one, other in places} == set(ids), name
    assert "n = 255 tokens" in unescape(figures["plans-pareto"])


def test_every_run_of_a_benchmark_has_a_heading_of_its_own(tmp_path: Path) -> None:
    folder = write_files(tmp_path)
    one, two = benchmark("m")[0], benchmark("m")[0]
    two["rows"][1]["name"], two["growth"] = "recent_only", []
    write_json(folder / "reports/benchmark/benchmark.json", [one, two])
    speed = made_page(folder).split('id="speed"')[1]
    assert "<h3>full cache, head_aware priced-25</h3>" in speed
    assert "<h3>full cache, recent_only</h3>" in speed
    assert "compare methods within one table" in speed


def test_the_benchmark_is_left_out_where_there_is_none(page: str, tmp_path: Path) -> None:
    without = made_page(write_files(tmp_path))
    assert 'id="speed"' in page
    assert "<td>90</td>" in page
    assert 'id="speed"' not in without
    assert "#speed" not in without
    broken = benchmark("m")
    del broken[0]["rows"][1]["bytes_peak"]
    write_json(tmp_path / "reports/benchmark/benchmark.json", broken)
    with pytest.raises(InputError, match="the benchmark's results have no 'bytes_peak'"):
        made_page(tmp_path)


def test_a_hostile_name_is_only_text(tmp_path: Path) -> None:
    model = HOSTILE.replace("/", "∕")  # a slash divides owner and name
    folder = write_files(tmp_path, model)
    results = comparison(model)
    results[0]["rows"][1]["name"] = HOSTILE
    write_json(folder / "reports/plan_comparison/plan_comparison.json", results)
    page = made_page(folder)
    assert "<script>alert" not in page
    assert page.count("</title>") == 1
    assert page.count("<script>") == 1
    assert Balanced(page).open == []
    assert "&lt;script&gt;alert(&quot;x&quot;)" in page


def test_the_same_files_give_the_same_bytes(page: str, tmp_path: Path) -> None:
    assert made_page(write_files(tmp_path, speed=True)) == page


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("reports/prices/prices.json", lambda rows: rows[:-1], "the prices of KV heads are not those of 3 layers"),
        ("reports/prices/prices.json", lambda rows: [{}], "does not hold the prices of KV heads"),
        ("reports/ablation/ablation.json", lambda rows: {}, "holds no results"),
        ("reports/plan_comparison/plan_comparison.json", None, "cannot read"),
        ("reports/plans/maker--made-up", None, "holds no plan of the policy 'priced'"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(tmp_path: Path, file: str, change, message: str) -> None:
    folder = write_files(tmp_path)
    path = folder / file
    if change:
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
    else:
        path.rename(path.with_name("elsewhere"))
    with pytest.raises(InputError, match=message):
        made_page(folder)
    assert not (folder / "reports/index.html").exists()


def test_tags_escape_all_that_is_not_markup() -> None:
    assert tag("p", "<&", tag("b", 1.50), None, class_='"', hidden=True, title=None) == (
        '<p class="&quot;" hidden>&lt;&amp;<b>1.5</b></p>'
    )
    assert [number(value) for value in (-0.0001, 10.0, 0.126, 100)] == ["0", "10", "0.13", "100"]


def test_scales_place_and_paint() -> None:
    assert [Scale(1, 100, "log")(value) for value in (0, 1, 10, 100, 1e9)] == pytest.approx([0, 0, 0.5, 1, 1])
    assert Scale(0, 4, "root")(1) == pytest.approx(0.5)
    for kind in ("linear", "log", "root"):
        scale = Scale(2, 50, kind)  # type: ignore[arg-type]
        assert scale(scale.middle()) == pytest.approx(0.5)
    levels = [luminance(cividis(i / 20)) for i in range(21)]
    assert levels == sorted(levels)
    for i in range(21):
        colour = cividis(i / 20)
        ink = {"#000": 0.0, "#fff": 1.0}[ink_on(colour)]
        dark, light = sorted((luminance(colour), ink))
        assert (light + 0.05) / (dark + 0.05) >= 4.5
