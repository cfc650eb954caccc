"""Figure of decode steps at growing context and batch, from a result of `benchmarks.decode steps --part growth`.

Run: python -m tools.growth_figure step_cost.json --output growth.png
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.figure import Figure

from kvcompress.core.artifacts import atomic_path, read_json
from kvcompress.core.errors import InputError, said_in_a_sentence
from kvcompress.reporting.method_style import look

LOOKS = {"full": look("full"), "plan": look("priced")._replace(label="plan")}  # it holds windows
LIMIT = (0, (4, 2))  # dashes


def draw(costs: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Milliseconds a step against tokens of context, one panel a batch; dashed: the limit of the memory bandwidth."""
    batches = sorted({cost["batch"] for cost in costs})
    figure = Figure(figsize=(1.2 + 3.4 * len(batches), 3.6), layout="constrained")
    for batch, axis in zip(batches, figure.subplots(1, len(batches), sharey=True, squeeze=False)[0], strict=True):
        shown = sorted((cost for cost in costs if cost["batch"] == batch), key=lambda cost: cost["context"])
        for name, style in LOOKS.items():
            columns = {
                field: [cost[field] for cost in shown if cost["contender"] == name]
                for field in ("context", "ms", "p10", "p90", "limit_ms")
            }
            x = columns["context"]
            axis.fill_between(x, columns["p10"], columns["p90"], color=style.colour, alpha=0.15, lw=0)
            axis.plot(x, columns["ms"], color=style.colour, marker=style.marker, ms=4, lw=1.4, label=style.label)
            axis.plot(x, columns["limit_ms"], color=style.colour, ls=LIMIT, lw=1)
        axis.plot([], [], color="0.4", ls=LIMIT, lw=1, label="limit: (weights + cache) ÷ bandwidth")
        axis.set_xscale("log", base=2)
        ticks = sorted({cost["context"] for cost in shown})
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
    result: Annotated[Path, typer.Argument(help="A result of benchmarks.decode steps with the part growth.")],
    output: Annotated[Path, typer.Option(help="The PNG to write.")],
) -> None:
    """Draw the growth of decode steps."""
    found = read_json(result)
    if not isinstance(found, dict) or not found.get("growth", {}).get("costs"):
        raise InputError(f"{result} has no growth; measure it with benchmarks.decode steps --part growth")
    growth = found["growth"]
    about = growth["model"], found["dtype"], found["device"], f"a plan that keeps {found['share']:.0%}", "CUDA graphs"
    with atomic_path(output) as temporary:
        figure = draw(growth["costs"], ", ".join(about))
        figure.savefig(temporary, format="png", dpi=150, metadata={"Software": None})


if __name__ == "__main__":
    with said_in_a_sentence():
        typer.run(main)
