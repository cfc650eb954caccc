"""Who won at equal bytes: one card a plan, and the reports' own sentences, folded."""

from collections.abc import Mapping, Sequence
from typing import Any

from kvcompress.evaluation.intervals import CONFIDENCE
from kvcompress.reporting.comparison_data import Rows
from kvcompress.reporting.comparison_report import outcome, verdict
from kvcompress.reporting.page.markup import Html, details, tag

WORDS = {
    "wins": ("▲", "wins"),
    "loses": ("▼", "loses"),
    "even": ("=", "even"),
    "not comparable": ("?", "not comparable"),
}
FAMILIES = {
    "priced": "a window for each head, by its measured price",
    "select": "windows and keys that a score chooses, by measured price",
}


def badge(row: Mapping[str, Any]) -> Html:
    found = outcome(row)
    assert found is not None
    sign, words = WORDS[found]
    return tag("span", f"{sign} {words}", class_=f"badge {found.split()[0]}")


def found_facts(row: Mapping[str, Any]) -> str:
    results = row["retrieval"].values()
    return f"{sum(result['correct'] for result in results)}/{sum(result['total'] for result in results)}"


def budget(row: Mapping[str, Any]) -> str:
    """What the plan was asked to hold, from its name: `priced-6.25` -> `6.25%`, `priced-60tokens` -> `60tokens`."""
    label = str(row["name"]).removeprefix(f"{row['family']}-")
    return f"{label}%" if label.replace(".", "").isdigit() else label


def card(row: Mapping[str, Any], rival: Mapping[str, Any], full: Mapping[str, Any]) -> Html:
    """One plan, the uniform cache of its bytes, and the full cache: perplexity and facts found."""
    header = tag("tr", tag("td"), (tag("th", name, scope="col") for name in ("perplexity", "facts")))
    lines = [
        tag("tr", tag("th", name, scope="row"), tag("td", f"{one['perplexity']:.2f}"), tag("td", found_facts(one)))
        for name, one in ((row["family"], row), ("uniform", rival), ("full cache", full))
    ]
    return tag(
        "article",
        tag("h4", f"Budget {budget(row)}", badge(row)),
        tag("table", tag("thead", header), tag("tbody", lines)),
        tag("p", f"holds {100 * row['share']:.3g}% of the full cache's bytes"),
        class_="card",
    )


def cards(rows: Rows, family: str) -> list[Html]:
    """A heading, and a card for every plan of `family` that has a rival; nothing without one."""
    by_name = {row["name"]: row for row in rows}
    mine = [row for row in rows if row["family"] == family and row.get("rival")]
    found = [card(row, by_name[row["rival"]["name"]], by_name["full cache"]) for row in mine]
    title = tag("h3", f"{family}: {FAMILIES[family]}")
    return [title, tag("div", found, class_="cards")] if found else []


def explained(full: Mapping[str, Any]) -> Html:
    """What a card's words mean; `full` is the row of the full cache."""
    asked = sum(result["total"] for result in full["retrieval"].values())
    return tag(
        "p",
        "Every card sets a plan against the uniform cache of its bytes, which has the same sinks and window in all heads. "
        f"It wins or loses where the {CONFIDENCE:.0%} interval of the difference in loss leaves out zero. Facts are exact "
        f"answers to {asked} questions about something said earlier in a text ({', '.join(full['retrieval'])}).",
    )


def sentences(rows: Sequence[Mapping[str, Any]]) -> Html:
    """The verdicts of these rows as a list."""
    items = [tag("li", badge(row), tag("span", verdict(row), class_="verdict")) for row in rows if row.get("rival")]
    return tag("ul", items, class_="verdicts")


def summary(plans: Rows, ablation: Rows) -> list[Html | None]:
    """Cards of the policies `priced` and `select`, the verdict on the class table, all other verdicts folded."""
    table = [row for row in ablation if row["name"] == "class table"]
    rest = [row for row in [*plans, *ablation] if row not in table and row.get("rival")]
    folded = details(f"{len(rest)} comparisons at equal bytes, with intervals", sentences(rest)) if rest else None
    shown = [one for family in FAMILIES for one in cards(plans, family)]
    return [explained(next(row for row in plans if row["family"] == "full")), *shown, sentences(table), folded]
