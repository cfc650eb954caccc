"""Head maps in the terminal: one row a layer, one cell a head, coloured by class, slots or any number."""

from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.text import Text

from kvcompress.core.head_classes import CLASS_LETTERS, ClassificationFile, HeadType
from kvcompress.core.plan import RetentionPlan

# Okabe and Ito's colours, which colour-blind readers can tell apart, as bright as a dark terminal needs
COLOURS = {
    HeadType.SINK_POSITIONAL: "#56B4E9",
    HeadType.TRUE_POSITIONAL: "#0072B2",
    HeadType.POSITIONAL: "#0072B2",
    HeadType.SINK_MIXED: "#E69F00",
    HeadType.GATHERING: "#D55E00",
    HeadType.MIXED: "#009E73",
    HeadType.DEAD: "#999999",
}
SHADES = " .:-=+*#%@"  # ten steps, readable without colour


def class_map(file: ClassificationFile, console: Console | None = None) -> None:
    """Print the classes of all query heads."""
    out = console or Console()
    out.print("layer  query heads")
    for i, layer in enumerate(file.layers):
        row = Text(f"{i:>5}  ")
        for head in layer:
            row.append(f"{CLASS_LETTERS[head.head_type]} ", style=COLOURS[head.head_type])
        out.print(row)
    used = [kind for kind in COLOURS if any(head.head_type is kind for head in file.classifications)]
    legend = Text("\n")
    for kind in used:
        count = sum(head.head_type is kind for head in file.classifications)
        legend.append(f"{CLASS_LETTERS[kind]} {kind.value} {count}   ", style=COLOURS[kind])
    out.print(legend)


def plan_map(plan: RetentionPlan, context: int, console: Console | None = None) -> None:
    """Print the slots of all KV heads after `context` tokens; a mark shows where some of them hold selected keys."""
    held = [[kept.held(context) for kept in layer] for layer in plan.layers]
    chooses = [[kept.chosen > 0 and kept.held(context) < context for kept in layer] for layer in plan.layers]
    marks = " (c: also by content)" if any(map(any, chooses)) else ""
    title = f"slots held of {context}, a row a layer, policy {plan.policy}{marks}"
    number_map(held, title, console, low=0, high=context, decimals=0, marked=chooses)


def number_map(
    values: Sequence[Sequence[float]] | np.ndarray,
    title: str,
    console: Console | None = None,
    low: float | None = None,
    high: float | None = None,
    decimals: int = 3,
    marked: Sequence[Sequence[bool]] | None = None,
) -> None:
    """Print numbers `[layer][head]` as shades, dark to bright from `low` to `high`.

    The numbers follow their shades if the terminal is wide enough, and a c follows those that are `marked`.
    """
    out, grid = console or Console(), np.asarray(values, dtype=float)
    least, most = (float(grid.min()) if low is None else low), (float(grid.max()) if high is None else high)
    span = most - least or 1.0
    written = [[f"{value:.{decimals}f}" for value in row] for row in grid]
    wide = max(len(word) for row in written for word in row)
    with_numbers = 7 + grid.shape[1] * (wide + 3) <= out.width
    out.print(f"{title}: {least:.{decimals}f} to {most:.{decimals}f}")
    for i, row in enumerate(grid):
        line = Text(f"{i:>5}  ")
        for j, value in enumerate(row):
            step = min(int(max(value - least, 0) / span * len(SHADES)), len(SHADES) - 1)
            level = 60 + round(195 * step / (len(SHADES) - 1))
            mark = "c" if marked and marked[i][j] else " "
            cell = f"{SHADES[step]}{written[i][j]:>{wide + 1}}{mark}" if with_numbers else f"{SHADES[step]}{mark}"
            line.append(cell, style=f"rgb({level},{level},{max(255 - level, 60)})")
        out.print(line)
