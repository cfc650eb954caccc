"""The numbers of README.md and docs/ are those of published results, and what these pages link exists."""

import re
from pathlib import Path

import pytest

from kvcompress.core.errors import InputError
from tests.project.project import ROOT
from tools.update_docs import MARKED, PAGES, current

README = "README.md"
LINKING = [README, "README.zh.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
LONGEST = 150  # lines of a README that is read to the end


@pytest.mark.parametrize("name", PAGES)
def test_the_tables_are_current(name: str) -> None:
    page = (ROOT / name).read_text()
    assert current(page, ROOT, PAGES[name]) == page


def test_the_tables_need_published_results_alone(tmp_path: Path) -> None:
    """Results that a local run of the pipeline writes may differ, or be missing."""
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports/devices").symlink_to(ROOT / "reports/devices")
    for name, blocks in PAGES.items():
        page = (ROOT / name).read_text()
        assert current(page, tmp_path, blocks) == page
        with pytest.raises(InputError, match="expected a file under reports/devices/"):
            current(page.replace("begin reports/devices/", "begin reports/"), ROOT, blocks)


def test_published_results_are_no_outputs_of_the_pipeline() -> None:
    assert "reports/devices" not in (ROOT / "dvc.yaml").read_text()


def test_every_marked_block_is_made() -> None:
    marked = {name for name in LINKING if MARKED.search((ROOT / name).read_text())}
    assert marked == set(PAGES)


def test_marks_are_needed() -> None:
    page = (ROOT / README).read_text()
    for wrong in ("nothing", page + page):
        with pytest.raises(InputError, match="once each"):
            current(wrong, ROOT, PAGES[README])


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    page = (ROOT / README).read_text()
    assert len(page.splitlines()) <= LONGEST
    for path in (ROOT / "docs").glob("*.md"):
        assert f"](docs/{path.name}" in page, path


def headings(path: Path) -> set[str]:
    """What a link after `#` may name, as GitHub makes it of titles."""
    titles = re.findall(r"(?m)^#+ (.+)$", path.read_text())
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", LINKING)
def test_files_that_it_links_exist(name: str) -> None:
    page = ROOT / name
    links = [link for link in re.findall(r"\]\(([^)]+)\)", page.read_text()) if not link.startswith("http")]
    assert len(links) > 5 or name != README
    for link in links:
        file, _, heading = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not heading or heading in headings(target), link
