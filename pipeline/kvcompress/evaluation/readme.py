"""The README's table of results, made from a report: no number there is typed in by hand.

Run: python -m kvcompress.evaluation.readme reports/devices/nvidia-h100/ablation.json

What stands between the two `ablation` marks of README.md is replaced; a test checks that it is current.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kvcompress.artifacts import read_json, read_text, write_text
from kvcompress.errors import InputError
from kvcompress.evaluation.ablation_report import origin, verdict

BEGIN, END = "<!-- ablation: begin -->", "<!-- ablation: end -->"


def block(results: Sequence[Mapping[str, Any]]) -> str:
    """The table of all contenders of an ablation report, smallest first, and the class table's verdict."""
    rows = {row["name"]: row for result in results for row in result["rows"]}
    tasks = list(next(iter(rows.values()))["retrieval"])
    header = ["contender (sinks + window)", "bytes", "perplexity", "ΔNLL to the full cache", *tasks]
    lines = [origin(results[0]), "", "| " + " | ".join(header) + " |", "| --- " * len(header) + "|"]
    for row in sorted(rows.values(), key=lambda row: (row["share"], row["perplexity"])):
        change = row["nll_over_full"]
        cells = [row["name"], f"{row['share']:.1%}", f"{row['perplexity']:.2f}"]
        cells += [f"{change['mean']:+.3f} ({change['low']:+.3f} … {change['high']:+.3f})"]
        cells += [f"{row['retrieval'][task]['correct']}/{row['retrieval'][task]['total']}" for task in tasks]
        lines.append("| " + " | ".join(cells) + " |")
    sentence = verdict(rows["class table"])
    return "\n".join([*lines, "", f"**{sentence}**"])


def replaced(readme: str, content: str) -> str:
    """The README with `content` between the marks. Raises `InputError` where the marks are not there once each."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise InputError(f"README.md needs the marks {BEGIN} and {END} once each")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n\n{content}\n\n{END}{rest.split(END)[1]}"


def main(
    report: Annotated[Path, typer.Argument(help="An ablation.json.")],
    readme: Annotated[Path, typer.Option(help="The file to rewrite.")] = Path("README.md"),
) -> None:
    """Rewrite the results in the README from a report."""
    write_text(readme, replaced(read_text(readme), block(read_json(report))))


if __name__ == "__main__":
    typer.run(main)
