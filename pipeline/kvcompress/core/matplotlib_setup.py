"""Style of all matplotlib figures of the library, and the way they are written: byte for byte reproducible."""

from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from kvcompress.core.artifacts import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, SOFT, RULE = "#1a1d21", "#555d66", "#d9dde2"  # text; secondary text, axes and thresholds; grid
SETTINGS: Any = {  # of matplotlib; its stubs know each key by name
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 9.5,
    "axes.edgecolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.fonttype": "none",
}


def set_title(figure: "Figure", heading: str, details: str) -> None:
    """Write a heading and, below it, the conditions of the measurement; lines are broken to the figure's width."""
    text = f"{heading}\n{fill(details, int(12.4 * figure.get_figwidth()))}"
    plain = text.replace("$", r"\$")  # a name is no formula
    figure.suptitle(plain, fontsize=10, x=0.01, ha="left", linespacing=1.35)


def save_png(figure: "Figure", path: str | Path, dpi: int) -> None:
    """Write a figure atomically."""
    import matplotlib

    with atomic_path(path) as temporary, matplotlib.rc_context(SETTINGS):
        figure.savefig(temporary, format="png", dpi=dpi, metadata={"Software": None})
