"""The interface of all scores: what is held goes in, a number for every key comes out, and larger means keep.

A score is a frozen dataclass whose fields are its parameters. It is a function of what it is given and nothing else: no
state between calls, and random numbers only from a seed among its fields.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from kvcompress.core.errors import InputError, UnsupportedModelError
from kvcompress.scores.inputs import AttentionTotals, ScoreInputs


class Score(ABC):
    """`score(held)` is float32 `[batch, kv_head, key]`: -inf in empty slots, +inf at keys that stay anyway.

    Scores are comparable within a KV head only. Raises `InputError` where the score needs queries and there are none,
    `UnsupportedModelError` where it needs the rotary embedding and that is unknown.
    """

    @property
    def needs_queries(self) -> bool:
        return False

    @property
    def needs_rotation(self) -> bool:
        """Whether it looks at vectors before rotation."""
        return False

    @property
    def accumulates(self) -> bool:
        """Whether it goes on from `held.earlier`, so that a query must come to it once and no more."""
        return False

    def received(self, held: ScoreInputs) -> AttentionTotals | None:
        """What a score that accumulates will go on from, None for others."""
        return None

    @property
    def looks_back(self) -> int | None:
        """How many of the last queries it looks at, None for all."""
        return None

    def looks_at(self, count: int) -> slice:
        """Of the last `count` queries those that are enough to have; all of them, unless it can do without their order."""
        return slice(None)

    @torch.no_grad()
    def __call__(self, held: ScoreInputs, totals: AttentionTotals | None = None) -> Tensor:
        scores = self.of_candidates(held, totals).masked_fill(~held.real, -float("inf"))
        return scores if held.stays is None else scores.masked_fill(held.real & held.stays, float("inf"))

    @torch.no_grad()
    def of_candidates(self, held: ScoreInputs, totals: AttentionTotals | None = None) -> Tensor:
        """The same for who does not ask for anything but `held.candidates`: others may have any number."""
        name = type(self).__name__
        if self.needs_queries and (held.queries is None or not held.queries.shape[2]):
            raise InputError(f"{name} ranks keys by the attention of queries, and there are none")
        if self.needs_rotation and held.rotation is None:
            raise UnsupportedModelError(
                f"{name} looks at queries or keys before rotation, and this model's rotary embedding is not known"
            )
        return self.rank(held) if totals is None else self.of_totals(totals)

    def of_totals(self, totals: AttentionTotals) -> Tensor:
        """Scores from the result of `received`, of a score that accumulates."""
        raise NotImplementedError

    @abstractmethod
    def rank(self, held: ScoreInputs) -> Tensor:
        """The scores, with anything at slots that are not `held.candidates`."""


def require_at_least(least: int, **counts: int) -> None:
    """Raise `InputError` that names the first of these parameters that is no whole number or smaller."""
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InputError(f"{name} is {value!r}, expected a whole number of at least {least}")


def require_odd(**counts: int) -> None:
    """As `require_at_least` 1, and odd: a kernel reaches equally far to both sides."""
    require_at_least(1, **counts)
    for name, value in counts.items():
        if value % 2 == 0:
            raise InputError(f"{name} is {value}, expected an odd number")
