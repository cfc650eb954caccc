"""docs/measures.md speaks of everything that is measured, and of nothing that is not there."""

import re
from dataclasses import fields

from kvcompress.analysis.classification import classify_first_pass, classify_refined
from kvcompress.core.head_classes import HeadType
from kvcompress.core.head_statistics import REGIONS, HeadStatistics
from kvcompress.core.params import SECTIONS
from kvcompress.core.retention import Strategy
from kvcompress.planning.policies import POLICIES
from kvcompress.scores.registry import SCORES, make_score
from kvcompress.scores.selection_rule import SelectionRule
from tests.project.project import ROOT

TEXT = (ROOT / "docs/measures.md").read_text()
STATISTICS, CLASSES, PRICES, SELECTION = re.split(r"^## \w+\n", TEXT, flags=re.M)[1:]


def rows(part: str) -> dict[str, str]:
    """What stands between backticks in the first column of the part's tables -> the rest of its row."""
    lines = re.findall(r"^\| ([^|]+) \| (.+) \|$", part, flags=re.M)
    return {name: rest for first, rest in lines for name in re.findall(r"`(\w+)`", first)}


def test_every_statistic_is_defined() -> None:
    known = {field.name for field in fields(HeadStatistics)} - {"layer_idx", "head_idx"}
    assert set(rows(STATISTICS)) == known | set(REGIONS)


def test_every_class_is_explained_with_its_strategy() -> None:
    assert set(rows(CLASSES)) == {kind.value for kind in HeadType}
    for name, rest in rows(CLASSES).items():
        strategies = set(re.findall(r"`(\w+)`", rest))
        assert strategies <= set(Strategy.__args__), name
        assert name == "positional" or strategies, name
    examples = [
        statistics(*numbers) for numbers in [(0.5, 0.9, 0.05), (0.5, 0.1, 0.9), (4.0, 0.1, 0.1), (2.0, 0.5, 0.1)]
    ]
    for head in [*examples, statistics(2.0, 0.1, 0.1), statistics(5.0, 0.0, 0.0, uniform=0.01)]:
        found = classify_refined(head)
        assert f"`{found.compression_strategy}`" in rows(CLASSES)[found.head_type.value]
    assert classify_first_pass(examples[0]).head_type is HeadType.POSITIONAL


def statistics(entropy: float, sink: float, local: float, uniform: float = 1.0) -> HeadStatistics:
    preference = {"sink": sink, "local": local, "recent": local, "global": 1 - sink - local}
    return HeadStatistics(0, 0, entropy, 0.1, 0.5, preference, sink, uniform, [1.0])


def test_every_policy_is_explained() -> None:
    assert set(rows(PRICES)) == set(POLICIES)


def test_every_score_is_explained_with_the_queries_it_needs() -> None:
    told = rows(SELECTION)
    assert set(told) == set(SCORES)
    for name, rest in told.items():
        assert rest.endswith("none") != make_score(name).needs_queries
    numbers = f"`every` ({SelectionRule.every})", f"`observe` ({SelectionRule.observe})"
    assert all(number in SELECTION for number in numbers)


def test_files_and_dials_that_it_names_exist() -> None:
    for path in re.findall(r"`(\w+/\w+\.py)`", TEXT):
        assert (ROOT / "pipeline/kvcompress" / path).is_file(), path
    for path in re.findall(r"\]\((\.\./[^)]+)\)", TEXT):
        assert (ROOT / "docs" / path).exists(), path
    params = (ROOT / "params.yaml").read_text()
    dials = re.findall(rf"`({'|'.join(SECTIONS)})\.(\w+)`", TEXT)
    assert len(dials) > 4
    for section, dial in dials:
        assert re.search(rf"^{section}:(?:.*\n)(?:(?: .*)?\n)*?  {dial}:", params, re.M), (section, dial)
