"""The README's numbers are those of the committed report, and what it names exists."""

import re

import pytest

from kvcompress.errors import InputError
from kvcompress.evaluation.readme import SCALING, current
from tests.project import ROOT

README, PAGE = (ROOT / "README.md").read_text(), (ROOT / "docs/scaling.md").read_text()


def test_the_tables_are_current() -> None:
    assert current(README, ROOT) == README
    assert current(PAGE, ROOT, SCALING) == PAGE


def test_marks_are_needed() -> None:
    with pytest.raises(InputError, match="once each"):
        current("nothing", ROOT)
    with pytest.raises(InputError, match="once each"):
        current(README + README, ROOT)


def test_files_that_it_links_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert len(links) > 5
    for link in links:
        name, _, heading = link.partition("#")
        assert (ROOT / (name or "README.md")).exists(), link
        if heading:
            titles = re.findall(r"(?m)^#+ (.+)$", (ROOT / (name or "README.md")).read_text())
            assert heading in {title.lower().replace(" ", "-") for title in titles}, link
    links = re.findall(r"\]\(([^)]+)\)", PAGE)
    assert len(links) >= 5
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []
