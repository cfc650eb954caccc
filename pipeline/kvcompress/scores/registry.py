"""Names of all scores, and the score of a name.

Parameter files are checked against the names, so importing this file loads neither torch nor kernels. The classes are
imported when the first score is made.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from kvcompress.core.errors import InputError

if TYPE_CHECKING:
    from kvcompress.scores.base import Score

SCORES = ("key_norm", "key_diff", "snapkv", "expected_attention", "leverage", "accumulated_attention")


def make_score(name: str, **parameters: Any) -> Score:
    """Return the score `name` with these parameters. Raises `InputError` for an unknown name or parameter."""
    if name not in SCORES:
        raise InputError(f"unknown score {name!r}, expected one of {', '.join(SCORES)}")
    try:
        return score_classes()[name](**parameters)
    except TypeError as error:
        raise InputError(f"score {name}: {error}") from error


@cache
def score_classes() -> dict[str, type[Score]]:
    """Classes of all scores by name."""
    from kvcompress.scores.accumulated_attention import AccumulatedAttention
    from kvcompress.scores.compactor import Leverage
    from kvcompress.scores.expected_attention import ExpectedAttention
    from kvcompress.scores.key_diff import KeyDiff
    from kvcompress.scores.key_norm import KeyNorm
    from kvcompress.scores.snapkv import SnapKV

    classes = KeyNorm, KeyDiff, SnapKV, ExpectedAttention, Leverage, AccumulatedAttention
    return dict(zip(SCORES, classes, strict=True))
