"""Figure of how a decode step of a whole model grows with context and batch, from a report of `step_cost`.

python -m benchmarks.step_figure step_cost.json --output growth.png
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.figure import Figure

from kvcompress.core.artifacts import atomic_path, read_json
from kvcompress.core.errors import InputError, said_in_a_sentence

COLOURS = {"full": "#000000", "plan": "#009E73"}  # Okabe and Ito's
LABELS = {"full": "full cache", "plan": "plan"}


def step_figure(costs: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Milliseconds a step against tokens of context, one panel a batch; broken lines are the bandwidth's limit."""
    batches = sorted({cost["batch"] for cost in costs})
    figure = Figure(figsize=(1.2 + 3.4 * len(batches), 3.6), layout="constrained")
    for batch, axis in zip(batches, figure.subplots(1, len(batches), sharey=True, squeeze=False)[0], strict=True):
        for name, colour in COLOURS.items():
            rows = sorted(
                (cost for cost in costs if (cost["contender"], cost["batch"]) == (name, batch)),
                key=lambda cost: cost["context"],
            )
            x = [row["context"] for row in rows]
            axis.fill_between(
                x, [row["p10"] for row in rows], [row["p90"] for row in rows], color=colour, alpha=0.15, lw=0
            )
            axis.plot(x, [row["ms"] for row in rows], color=colour, marker="o", ms=4, lw=1.4, label=LABELS[name])
            axis.plot(x, [row["limit_ms"] for row in rows], color=colour, ls=(0, (4, 2)), lw=1)
        axis.plot([], [], color="0.4", ls=(0, (4, 2)), lw=1, label="limit: (weights + cache) ÷ bandwidth")
        axis.set_xscale("log", base=2)
        ticks = sorted({cost["context"] for cost in costs if cost["batch"] == batch})
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8, rotation=30)
        axis.minorticks_off()
        axis.set_xlabel("context (tokens)")
        axis.set_title(f"batch {batch}", fontsize=10)
        axis.grid(alpha=0.25, lw=0.5)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylim(0, None)
    figure.axes[0].set_ylabel("milliseconds a decode step")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10)
    return figure


def main(
    report: Annotated[Path, typer.Argument(help="A result of step_cost with the part growth.")],
    output: Annotated[Path, typer.Option(help="The PNG to write.")],
) -> None:
    """Draw the growth of decode steps."""
    found = read_json(report)
    if not isinstance(found, dict) or not found.get("growth", {}).get("costs"):
        raise InputError(f"{report} has no growth: measure it with step_cost --part growth")
    growth = found["growth"]
    title = (
        f"{growth['model']}, {found['dtype']}, {found['device']}, a plan that keeps {found['share']:.0%}, CUDA graphs"
    )
    with atomic_path(output) as temporary:
        step_figure(growth["costs"], title).savefig(temporary, format="png", dpi=150, metadata={"Software": None})


if __name__ == "__main__":
    with said_in_a_sentence():
        typer.run(main)
