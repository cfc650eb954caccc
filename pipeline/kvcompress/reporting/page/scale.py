"""From numbers to places and colours: linear, logarithmic and root scales, ticks, and the colour map cividis.

Cividis (Nuñez, Anderton and Renslow 2018) runs evenly from dark blue to yellow, also for colour-blind readers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log, log10, sqrt
from typing import Literal

CIVIDIS = (
    (0, 34, 78),
    (18, 53, 112),
    (59, 73, 108),
    (87, 93, 109),
    (112, 113, 115),
    (138, 134, 120),
    (165, 156, 116),
    (195, 179, 105),
    (225, 204, 85),
    (254, 232, 56),
)
Kind = Literal["linear", "log", "root"]


@dataclass(frozen=True)
class Scale:
    """`low` ... `high` -> 0 ... 1, what lies beyond is clipped."""

    low: float
    high: float
    kind: Kind = "linear"

    def __call__(self, value: float) -> float:
        low, high, here = (self._bent(one) for one in (self.low, self.high, value))
        return min(max((here - low) / (high - low), 0.0), 1.0) if high > low else 0.5

    def _bent(self, value: float) -> float:
        if self.kind == "log":
            return log(max(value, 1e-12))
        return sqrt(max(value, 0.0)) if self.kind == "root" else value

    def middle(self) -> float:
        """The value half way along."""
        if self.kind == "log":
            return sqrt(self.low * self.high)
        if self.kind == "root":
            return ((sqrt(max(self.low, 0)) + sqrt(max(self.high, 0))) / 2) ** 2
        return (self.low + self.high) / 2


def cividis(share: float) -> str:
    """The colour at 0 ... 1, as #rrggbb."""
    place = min(max(share, 0.0), 1.0) * (len(CIVIDIS) - 1)
    i = min(int(place), len(CIVIDIS) - 2)
    mixed = (round(a + (b - a) * (place - i)) for a, b in zip(CIVIDIS[i], CIVIDIS[i + 1], strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def ink_on(colour: str) -> str:
    """Black or white, whichever is easier to read on `colour`."""
    return "#000" if luminance(colour) > 0.179 else "#fff"


def log_ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Round numbers between `low` and `high`: 1, 2, 5 times powers of ten, or more of them where these are few.

    Where the two are close, the ticks are those of a linear scale.
    """
    for steps in (
        (1,),
        (1, 2, 5),
        (1, 1.5, 2, 3, 5, 7),
        (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9),
    ):
        found = [
            step * 10.0**power
            for power in range(int(log10(low)) - 2, int(log10(high)) + 2)
            for step in steps
            if low <= step * 10.0**power <= high
        ]
        if len(found) >= 4:
            return thinned(found, most)
    return linear_ticks(low, high, most)


def linear_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers between `low` and `high`, at most `most`."""
    span = high - low
    step = 10.0 ** ceil(log10(span / most))
    for part in (5, 2):
        if span / (step / part) <= most:
            step /= part
            break
    return [i * step for i in range(ceil(low / step - 1e-9), int(high / step + 1e-9) + 1)]


def thinned(values: Sequence[float], most: int) -> list[float]:
    """Every second, third ... value, so that at most `most` are left."""
    return list(values[:: -(-len(values) // most)]) if values else []
