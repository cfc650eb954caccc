"""The tables of results in README.md and docs/scaling.md, made from reports: no number there is typed in by hand.

Run: python -m kvcompress.evaluation.readme

Between `<!-- ablation: begin REPORT -->` and `<!-- ablation: end -->` in README.md stands what the report REPORT says;
the same for `plans` and the tables of `cost_tables` and `scaling_tables`. A test checks that all are current.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kvcompress.artifacts import read_json, read_text, write_text
from kvcompress.errors import InputError, said_in_a_sentence
from kvcompress.evaluation.ablation_data import by_size, facts_cells, leading_cells, rows_of
from kvcompress.evaluation.ablation_report import origin, plan_table, verdict
from kvcompress.evaluation.cost_tables import batch, choosing, kernel, prefill, steps
from kvcompress.evaluation.scaling_tables import long, scaling
from kvcompress.evaluation.select_quality import table as select_table

Results = Sequence[Mapping[str, Any]]
MARKED = re.compile(r"(<!-- (\w+): begin (\S+) -->).*?(<!-- \2: end -->)", re.DOTALL)


def ablation(results: Results) -> str:
    """The table of all contenders of an ablation report, smallest first, and the class table's verdict."""
    rows = rows_of(results)
    tasks = list(rows[0]["retrieval"])
    header = ["contender (sinks + window)", "bytes", "perplexity", "ΔNLL to the full cache", *tasks]
    lines = [origin(results[0]), "", "| " + " | ".join(header) + " |", "| --- " * len(header) + "|"]
    lines += ["| " + " | ".join([*leading_cells(row), *facts_cells(row)]) + " |" for row in by_size(rows)]
    (table,) = (row for row in rows if row["name"] == "class table")
    return "\n".join([*lines, "", f"**{verdict(table)}**"])


def plans(results: Results) -> str:
    """Allocated plans against uniform caches of the same bytes, and the verdicts on the policies that price heads."""
    (result,) = results
    sentences = [verdict(row) for row in result["rows"] if row["family"] in ("priced", "select")]
    return "\n".join(
        [origin(result), "", *plan_table(result["rows"]), "", *(f"- {sentence}" for sentence in sentences)]
    )


def headline(result: Mapping[str, Any]) -> str:
    """What a small cache costs, in two sentences: text and facts, beside the same window for all heads."""
    rows = {row["family"]: row for row in result["rows"]}
    mine, full = rows["select"], rows["full"]
    rival = next(row for row in result["rows"] if row["name"] == mine["rival"]["name"])
    grown, evenly = (one["perplexity_gmean"] / full["perplexity_gmean"] - 1 for one in (mine, rival))
    settings = result["settings"]
    facts = [
        f"{mine['retrieval'][task]['correct']} of {mine['retrieval'][task]['total']} {named} "
        f"({full['retrieval'][task]['correct']}; {rival['retrieval'][task]['correct']})"
        for task, named in (("passkey", "passkeys in monotonous text"), ("needle", "facts in prose"))
    ]
    return (
        f"Compressed once, after a prompt of {settings['context']:,} tokens was read, and holding {mine['mean_share']:.0%} "
        f"of the full cache on average, it predicts the next {settings['continuation']} with a perplexity {grown:.1%} "
        f"above the full cache's, against {evenly:.1%} with the same window for all heads ({rival['mean_share']:.0%}). Of "
        f"facts from anywhere in {settings['retrieval_length']:,} tokens, compressed to {settings['shares'][0]:.0%} before "
        f"the question is known, it gives (full cache; same window): {', '.join(facts)}."
    )


def selection(result: Mapping[str, Any]) -> str:
    """Heads that select keys by content, after an exact prefill."""
    settings, where = result["settings"], result["environment"]
    more = ", and half of the continuation more, as a cache that grows holds on average" if settings["growing"] else ""
    return (
        f"{where['device']}, {where['dtype']}, torch {where['torch']}. {settings['documents_per_text']} documents of each "
        f"evaluation text: exact prefill of {settings['context']} tokens, perplexity of the next "
        f"{settings['continuation']}; facts in contexts of {settings['retrieval_length']} tokens. Caches hold their share "
        f"of the context{more}.\n\n{select_table(result['rows'])}"
    )


def windows_alone(results: Results) -> str:
    """As `plans`, of a report whose plans that select were made by an earlier rule: these are left out."""
    (result,) = results
    return plans([{**result, "rows": [row for row in result["rows"] if row["family"] != "select"]}])


BLOCKS: dict[str, Callable[[Any], str]] = {
    "ablation": ablation,
    "headline": headline,
    "plans": plans,
    "plans_gpu": windows_alone,
    "selection_more": selection,
    "selection": selection,
    "selection_less": selection,
    "choosing": choosing,
    "kernel": kernel,
    "steps": steps,
    "batch": batch,
    "prefill": prefill,
}
SCALING: dict[str, Callable[[Any], str]] = {"scaling": scaling, "long": long}


def current(page: str, folder: Path, blocks: Mapping[str, Callable[[Any], str]] = BLOCKS) -> str:
    """The page with every marked block made anew from its report; `folder` is what the reports' paths start from.

    Raises `InputError` where a block has no marks, or not once.
    """
    found = [match[2] for match in MARKED.finditer(page)]
    if sorted(found) != sorted(blocks):
        raise InputError(f"the page has the marked blocks {found}, expected {sorted(blocks)} once each")
    return MARKED.sub(lambda one: f"{one[1]}\n\n{blocks[one[2]](read_json(folder / one[3]))}\n\n{one[4]}", page)


def main(readme: Annotated[Path, typer.Option(help="The file to rewrite.")] = Path("README.md")) -> None:
    """Rewrite the results in the README, and in docs/scaling.md beside it, from the reports that they name."""
    write_text(readme, current(read_text(readme), readme.parent))
    page = readme.parent / "docs/scaling.md"
    write_text(page, current(read_text(page), readme.parent, SCALING))


if __name__ == "__main__":
    with said_in_a_sentence():
        typer.run(main)
