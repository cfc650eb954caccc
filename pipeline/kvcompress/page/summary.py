"""Who won at equal bytes: one card a budget, and the reports' own sentences."""

from collections.abc import Mapping, Sequence
from typing import Any

from kvcompress.evaluation.ablation_data import Rows
from kvcompress.evaluation.ablation_report import outcome, verdict
from kvcompress.page.markup import Html, details, tag

WORDS = {
    "wins": ("▲", "wins"),
    "loses": ("▼", "loses"),
    "even": ("=", "even"),
    "not comparable": ("?", "not comparable"),
}


def badge(row: Mapping[str, Any]) -> Html:
    found = outcome(row)
    assert found is not None
    sign, words = WORDS[found]
    return tag("span", f"{sign} {words}", class_=f"badge {found.split()[0]}")


def found_facts(row: Mapping[str, Any]) -> str:
    results = row["retrieval"].values()
    return f"{sum(result['correct'] for result in results)}/{sum(result['total'] for result in results)}"


def card(row: Mapping[str, Any], rival: Mapping[str, Any], full: Mapping[str, Any]) -> Html:
    """One plan, the uniform cache of its bytes, and the full cache: perplexity and facts found."""
    header = tag("tr", tag("td"), (tag("th", name, scope="col") for name in ("perplexity", "facts")))
    lines = [
        tag("tr", tag("th", name, scope="row"), tag("td", f"{one['perplexity']:.2f}"), tag("td", found_facts(one)))
        for name, one in ((row["family"], row), ("uniform", rival), ("full cache", full))
    ]
    return tag(
        "article",
        tag("h3", f"{100 * row['share']:.3g}% of the bytes", badge(row)),
        tag("table", tag("thead", header), tag("tbody", lines)),
        class_="card",
    )


def cards(rows: Rows, family: str = "priced") -> Html | None:
    """A card for every plan of `family` that has a rival."""
    by_name = {row["name"]: row for row in rows}
    mine = [row for row in rows if row["family"] == family and row.get("rival")]
    found = [card(row, by_name[row["rival"]["name"]], by_name["full cache"]) for row in mine]
    return tag("div", found, class_="cards") if found else None


def sentences(rows: Sequence[Mapping[str, Any]]) -> Html:
    """The verdicts of these rows as a list."""
    items = [tag("li", badge(row), tag("span", verdict(row), class_="verdict")) for row in rows if row.get("rival")]
    return tag("ul", items, class_="verdicts")


def summary(plans: Rows, ablation: Rows) -> list[Html | None]:
    """Verdicts on the policies `priced` and `select` and on the class table first, all others folded."""
    main = [row for row in plans if row["family"] in ("priced", "select")]
    main += [row for row in ablation if row["name"] == "class table"]
    names = {id(row) for row in main}
    rest = [row for row in [*plans, *ablation] if id(row) not in names and row.get("rival")]
    folded = details(f"{len(rest)} more comparisons at equal bytes", sentences(rest)) if rest else None
    return [cards(plans), cards(plans, "select"), sentences(main), folded]
