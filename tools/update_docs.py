"""The tables of results in README.md and docs/, made from reports: no number there is typed in by hand.

Run: python -m tools.update_docs

Between `<!-- ablation: begin REPORT -->` and `<!-- ablation: end -->` in docs/results.md stands what the report REPORT
says; `PAGES` has all blocks of all pages. A test checks that they are current.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.select_quality import table as select_table
from kvcompress.core.artifacts import read_json, read_text, write_text
from kvcompress.core.errors import InputError, said_in_a_sentence
from kvcompress.reporting.comparison import by_size, conclusion, facts_cells, leading_cells, origin, plan_table, rows_of
from kvcompress.reporting.tables import markdown
from tools.cost_tables import batch, choosing, kernel, prefill, steps
from tools.cost_tables import table as table_of
from tools.scaling_tables import long, scaling

Results = Sequence[Mapping[str, Any]]
MARKED = re.compile(r"(<!-- (\w+): begin (\S+) -->).*?(<!-- \2: end -->)", re.DOTALL)


def ablation(results: Results) -> str:
    """The table of all contenders of an ablation report, smallest first, and the class table's verdict."""
    rows = rows_of(results)
    tasks = list(rows[0]["retrieval"])
    header = ["contender (sinks + window)", "bytes", "perplexity", "ΔNLL to the full cache", *tasks]
    lines = [
        origin(results[0]),
        "",
        markdown(header, ([*leading_cells(row), *facts_cells(row)] for row in by_size(rows))),
    ]
    (table,) = (row for row in rows if row["name"] == "class table")
    return "\n".join([*lines, "", f"**{conclusion(table)}**"])


def plans(results: Results) -> str:
    """Allocated plans against uniform caches of the same bytes, and the verdicts on the policies that price heads."""
    (result,) = results
    sentences = [conclusion(row) for row in result["rows"] if row["family"] in ("priced", "select")]
    return "\n".join([origin(result), "", plan_table(result["rows"]), "", *(f"- {sentence}" for sentence in sentences)])


def headline(result: Mapping[str, Any]) -> str:
    """At one share of the cache, on text and facts: the full cache, one window for all heads, plans from prices."""
    settings = result["settings"]
    rows = {row["family"]: row for row in result["rows"]}
    full, mine = rows["full"], rows["select"]
    uniform = next(row for row in result["rows"] if row["name"] == mine["rival"]["name"])
    shown = {"full": full, "uniform": uniform, "priced": rows["priced"], "select": mine}
    tasks = {"passkey": "passkeys", "needle": "facts in prose"}
    lines = [
        (
            f"`{name}`" if row is not full else "full cache",
            f"{row['perplexity_gmean']:.2f}",
            "" if row is full else f"{row['perplexity_gmean'] / full['perplexity_gmean'] - 1:+.1%}",
            *(str(row["retrieval"][task]["correct"]) for task in tasks),
            f"{row['mean_share']:.0%}",
        )
        for name, row in shown.items()
    ]
    found = (f"{named} of {mine['retrieval'][task]['total']}" for task, named in tasks.items())
    head = ("cache", "perplexity", "against full", *found, "bytes, mean over the text")
    half = settings["continuation"] // 2
    more = f", and {half} tokens more, as one that grows with the text does on average" if settings["growing"] else ""
    return (
        f"{table_of(head, lines)}\n\n"
        f"On text, a prompt of {settings['context']:,} tokens is read and compressed once; perplexity is that of the next "
        f"{settings['continuation']}. Caches hold {settings['shares'][0]:.0%} of the prompt{more}. Passkeys (a number "
        "in monotonous text) and facts hide anywhere in "
        f"{settings['retrieval_length']:,} tokens, compressed to {settings['shares'][0]:.0%} before the question is known. "
        f"{_where(result)}."
    )


def _where(result: Mapping[str, Any]) -> str:
    return f"{result['environment']['device']}, {result['environment']['dtype']}"


def selection(result: Mapping[str, Any]) -> str:
    """Heads that select keys by content, after an exact prefill."""
    settings = result["settings"]
    more = ", and half of the continuation more, as a cache that grows holds on average" if settings["growing"] else ""
    use = "calibration" if settings["calibration"] else "evaluation"
    streamed = ", streamed in" if settings.get("retrieval_prefill") == "streaming" else ""
    return (
        f"{_where(result)}, torch {result['environment']['torch']}. {settings['documents_per_text']} documents of each "
        f"{use} text: exact prefill of {settings['context']} tokens, perplexity of the next "
        f"{settings['continuation']}; facts in contexts of {settings['retrieval_length']} tokens{streamed}. Caches hold "
        f"their share of the context{more}.\n\n{select_table(result['rows'])}"
    )


def windows_alone(results: Results) -> str:
    """As `plans`, of a report whose plans that select were made by an earlier rule: these are left out."""
    (result,) = results
    return plans([{**result, "rows": [row for row in result["rows"] if row["family"] != "select"]}])


Blocks = Mapping[str, Callable[[Any], str]]
PAGES: dict[str, Blocks] = {
    "README.md": {"headline": headline},
    "docs/results.md": {
        "plans_gpu": windows_alone,
        "plans": plans,
        "selection_more": selection,
        "selection": selection,
        "selection_less": selection,
        "streaming": plans,
        "streamed_passkeys": selection,
        "passkeys_by_price": selection,
        "early": selection,
        "selection_others": selection,
        "adaptive": selection,
        "ablation": ablation,
    },
    "docs/speed.md": {
        "kernel": kernel,
        "steps": steps,
        "batch": batch,
        "prefill": prefill,
        "choosing": choosing,
        "choosing_plans": choosing,
    },
    "docs/scaling.md": {"scaling": scaling, "long": long},
}


def current(page: str, folder: Path, blocks: Blocks) -> str:
    """The page with every marked block made anew from its report; `folder` is what the reports' paths start from.

    Raises `InputError` where a block has no marks, or not once.
    """
    found = [match[2] for match in MARKED.finditer(page)]
    if sorted(found) != sorted(blocks):
        raise InputError(f"the page has the marked blocks {found}, expected {sorted(blocks)} once each")
    return MARKED.sub(lambda one: f"{one[1]}\n\n{blocks[one[2]](read_json(folder / one[3]))}\n\n{one[4]}", page)


def main(folder: Annotated[Path, typer.Option(help="The project's folder.")] = Path(".")) -> None:
    """Rewrite the results in README.md and docs/ from the reports that they name."""
    for name, blocks in PAGES.items():
        write_text(folder / name, current(read_text(folder / name), folder, blocks))


if __name__ == "__main__":
    with said_in_a_sentence():
        typer.run(main)
