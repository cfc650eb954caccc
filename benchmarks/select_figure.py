"""A figure of what `select_quality` found at several shares: text lost, and facts found, by every contender.

python -m benchmarks.select_figure select_quality-*.json --output select_quality.png
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import typer
from matplotlib.figure import Figure

from kvcompress.core.artifacts import atomic_path, read_json
from kvcompress.core.errors import InputError, said_in_a_sentence
from kvcompress.reporting.method_style import look


def judged(result: Mapping[str, Any]) -> tuple[Any, ...]:
    """All that has to be alike for two results to stand in one figure."""
    settings = {name: value for name, value in result["settings"].items() if name != "shares"}
    return result["model"], result["texts"], result["environment"]["dtype"], settings, families(result)


def families(result: Mapping[str, Any]) -> list[str]:
    return [row["family"] for row in result["rows"]]


def draw(results: Sequence[Mapping[str, Any]]) -> Figure:
    """Panels from left to right: perplexity divided by the full cache's, then the share found of each kind of fact.

    The first is against the bytes held on average while the text goes on, the others against the share of the prompt
    that is kept when the question comes. One line a contender, dashed where its window has a fixed length. Raises
    `InputError` where results differ in model, texts, precision, settings or contenders, or have not one share each.
    """
    results = sorted(results, key=lambda result: min(result["settings"]["shares"]))
    shares = [100 * share for result in results for share in result["settings"]["shares"]]
    if any(judged(result) != judged(results[0]) for result in results) or len(set(shares)) != len(results):
        raise InputError(
            "the results differ in model, texts, precision, settings or contenders, expected the same but for one share each"
        )
    full = [result["rows"][0] for result in results]
    tasks = list(full[0]["retrieval"])
    figure = Figure(figsize=(4.3 * (1 + len(tasks)), 4.6), layout="constrained")
    text, *facts = figure.subplots(1, 1 + len(tasks), squeeze=False)[0]
    for i, family in enumerate(families(results[0])[1:], start=1):
        rows = [result["rows"][i] for result in results]
        score, _, fixed = family.partition(", ")
        _, colour, marker, _ = look(score)
        style: dict[str, Any] = {"color": colour, "marker": marker, "ls": "--" if fixed else "-", "lw": 1.2, "ms": 6}
        lost = [row["perplexity_gmean"] / whole["perplexity_gmean"] for row, whole in zip(rows, full, strict=True)]
        text.plot([100 * row["mean_share"] for row in rows], lost, label=family, **style)
        for axis, task in zip(facts, tasks, strict=True):
            axis.plot(shares, [row["retrieval"][task]["share"] for row in rows], **style)
    for axis, task in zip(facts, tasks, strict=True):
        axis.axhline(full[0]["retrieval"][task]["share"], color="0.6", lw=0.8, ls=":")
        axis.set(title=f"{task}: share found", ylim=(-0.03, 1.03), xscale="log")
        axis.set(xlabel="share of the prompt that is kept (%)")
        axis.set_xticks(shares, [f"{share:g}" for share in shares])
    text.axhline(1, color="0.6", lw=0.8, ls=":")
    text.set(title="perplexity ÷ the full cache's", xlabel="mean bytes over the text (% of the full cache)")
    for axis in (text, *facts):
        axis.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        axis.grid(alpha=0.25, lw=0.5)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    figure.suptitle(f"Keys chosen by content, at equal bytes: {results[0]['model']}", fontsize=11)
    return figure


def main(
    results: Annotated[list[Path], typer.Argument(help="JSON files of select_quality, one share each.")],
    output: Annotated[Path, typer.Option(help="The figure, PNG.")] = Path("select_quality.png"),
) -> None:
    """Draw text lost and facts found against the share that is kept."""
    with said_in_a_sentence():
        figure = draw([read_json(path) for path in results])
        with atomic_path(output) as path:
            figure.savefig(path, dpi=150, format="png")


if __name__ == "__main__":
    typer.run(main)
