"""One look a method: every method has one, no two are alike, and reports use the papers' names."""

from kvcompress.core.matplotlib_setup import INK
from kvcompress.evaluation.params import METHODS as BENCHMARKED
from kvcompress.planning.policies import POLICIES
from kvcompress.reporting.comparison import ceiling, pareto_data, title
from kvcompress.reporting.figures import family_of, looks
from kvcompress.reporting.method_style import METHODS, OWN, in_order, key_of, look
from kvcompress.scores.registry import SCORES
from tests.reporting.page_files import comparison, row

COMPARED = ("full", "uniform sink + window", "window only", "other sink counts", "class table", "per layer", "random")
COMPARED += ("inverted", "fix_size_l2", "l2_compress")


def test_no_two_methods_look_alike() -> None:
    assert len({(style.colour, style.marker) for style in METHODS.values()}) == len(METHODS)
    assert len({style.colour.lower() for style in METHODS.values()}) == len(METHODS)  # dvc plots has no other markers
    assert len({style.label for style in METHODS.values()}) == len(METHODS)
    assert look("full").colour == INK


def test_every_method_that_can_appear_has_a_look() -> None:
    families = [*COMPARED, *POLICIES, *BENCHMARKED, *SCORES, *(f"select {score}" for score in SCORES), "ada_kv"]
    for family in families:
        assert key_of(family) in METHODS, family


def test_an_unknown_method_has_a_look_of_its_own_that_stays() -> None:
    names = [f"snapkv, window {size}" for size in range(16, 256, 16)] + ["a", "b"]
    found = {look(name) for name in names} | set(METHODS.values())
    assert len({(style.colour, style.marker) for style in found}) == len(names) + len(METHODS)
    assert look("a") == look("a")


def test_own_policies_lead_every_legend() -> None:
    order = in_order([*COMPARED, "unknown", "select snapkv", "uniform", "select", "priced"])
    assert order[:4] == ["select", "priced", "class table", "full"]
    assert order[-1] == "unknown"
    assert list(METHODS)[: len(OWN)] == list(OWN)


def test_rivals_are_called_by_their_paper() -> None:
    assert title(row("select snapkv 25.00%", "select snapkv", 0.25, 20.0)) == "SnapKV, even budget, 25.00%"
    assert title(row("ada_kv 25%", "ada_kv", 0.25, 20.0)) == "Ada-KV with SnapKV, 25%"
    assert title(row("uniform = priced-25", "uniform sink + window", 0.25, 20.0)) == "uniform, bytes of priced-25"
    assert title(row("priced-25", "priced", 0.25, 20.0)) == "priced-25"


def test_names_in_benchmarks_and_streams_have_the_look_of_their_method() -> None:
    families = [
        family_of("uniform 25%"),
        family_of("head_aware x", "select"),
        family_of("head_aware"),
        family_of("full"),
    ]
    assert [look(family).label for family in families] == [
        METHODS[key].label for key in ("uniform sink + window", "select", "class table", "full")
    ]
    streamed = ("4 + 60, positions of the text", "4 + 60, positions in the cache", "0 + 64, positions of the text")
    assert len({look(family_of(name)) for name in streamed}) == 3
    assert len(set(looks({"one": "select", "two": "select"}).values())) == 2


def test_a_failed_method_does_not_stretch_the_axis() -> None:
    rows = comparison("m")[0]["rows"]
    data = pareto_data(rows)
    assert 20 < data[0]["ceiling"] < 21
    assert max(point["perplexity"] for point in data) == 25
    assert ceiling(pareto_data(rows[:1])) == 18
