"""All scores by name, for whoever chooses one in a parameter file, and for the tests."""

from collections.abc import Callable
from typing import Any

from kvcompress.core.errors import InputError
from kvcompress.scores.accumulated_attention import AccumulatedAttention
from kvcompress.scores.base import Score
from kvcompress.scores.compactor import Leverage
from kvcompress.scores.expected_attention import ExpectedAttention
from kvcompress.scores.key_diff import KeyDiff
from kvcompress.scores.key_norm import KeyNorm
from kvcompress.scores.snapkv import SnapKV

SCORES: dict[str, Callable[..., Score]] = {
    "key_norm": KeyNorm,
    "key_diff": KeyDiff,
    "snapkv": SnapKV,
    "expected_attention": ExpectedAttention,
    "leverage": Leverage,
    "accumulated_attention": AccumulatedAttention,
}


def make_score(name: str, **parameters: Any) -> Score:
    """The score of that name with these parameters. Raises `InputError` for a name or a parameter that is not known."""
    if name not in SCORES:
        raise InputError(f"unknown score {name!r}, expected one of {', '.join(SCORES)}")
    try:
        return SCORES[name](**parameters)
    except TypeError as error:
        raise InputError(f"score {name}: {error}") from error
