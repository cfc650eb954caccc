"""Interface of all scores: keys and queries go in, a number for every key comes out, and larger means keep.

A score is a frozen dataclass whose fields are its parameters. It is a pure function of its inputs: it has no state
between calls, and takes random numbers only from a seed among its fields.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from kvcompress.core.errors import InputError, UnsupportedModelError
from kvcompress.scores.inputs import AttentionTotals, ScoreInputs


class Score(ABC):
    """Rank the keys of a layer, each KV head by itself.

    Calling a score gives float32 `[batch, kv_head, key]`: -inf in empty slots, +inf at keys that stay in any case.
    Scores are comparable within a KV head only. `totals`, the result of `received` for the same inputs, saves a score
    that accumulates from computing it again.

    Raises `InputError` if the score needs queries and there are none, `UnsupportedModelError` if it needs the rotary
    embedding and that is unknown.
    """

    @property
    def needs_queries(self) -> bool:
        """True if the score ranks keys by queries."""
        return False

    @property
    def needs_rotation(self) -> bool:
        """True if the score uses vectors before rotation."""
        return False

    @property
    def accumulates(self) -> bool:
        """True if the score continues from `ScoreInputs.earlier`, so that it must be given every query exactly once."""
        return False

    @property
    def looks_back(self) -> int | None:
        """Number of last queries that the score uses, None for all."""
        return None

    def looks_at(self, count: int) -> slice:
        """Slice of the last `count` queries that the score uses; all of them if it needs their order."""
        return slice(None)

    @torch.no_grad()
    def __call__(self, inputs: ScoreInputs, totals: AttentionTotals | None = None) -> Tensor:
        scores = self.of_candidates(inputs, totals).masked_fill(~inputs.real, -float("inf"))
        return scores if inputs.stays is None else scores.masked_fill(inputs.real & inputs.stays, float("inf"))

    @torch.no_grad()
    def of_candidates(self, inputs: ScoreInputs, totals: AttentionTotals | None = None) -> Tensor:
        """Scores like those of `__call__`, of which only the entries in `inputs.candidates` are meaningful."""
        self.require_inputs(inputs)
        return self.rank(inputs) if totals is None else self.of_totals(totals)

    def require_inputs(self, inputs: ScoreInputs) -> None:
        """Raise the errors of the class if `inputs` lack what the score needs."""
        name = type(self).__name__
        if self.needs_queries and (inputs.queries is None or not inputs.queries.shape[2]):
            raise InputError(f"{name} ranks keys by the attention of queries, and there are none")
        if self.needs_rotation and inputs.rotation is None:
            raise UnsupportedModelError(
                f"{name} uses vectors before rotation, and this model's rotary embedding is not known"
            )

    @torch.no_grad()
    def of_prefixes(self, inputs: ScoreInputs, lengths: Iterable[int]) -> Iterator[Tensor]:
        """Scores of the first tokens of a whole text as if it ended there, like `of_candidates`, for every length."""
        for length in lengths:
            yield self.of_candidates(inputs.between(0, length))

    @abstractmethod
    def rank(self, inputs: ScoreInputs) -> Tensor:
        """Scores of `inputs.candidates`, with any number elsewhere."""

    def received(self, inputs: ScoreInputs) -> AttentionTotals | None:
        """Totals from which a score that accumulates will continue, None for other scores."""
        return None

    def of_totals(self, totals: AttentionTotals) -> Tensor:
        """Scores from the result of `received`, for a score that accumulates."""
        raise NotImplementedError


def require_at_least(least: int, **counts: int) -> None:
    """Raise `InputError` for the first parameter that is no whole number or is below `least`."""
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InputError(f"{name} is {value!r}, expected a whole number of at least {least}")


def require_odd(**counts: int) -> None:
    """Raise `InputError` for the first parameter that is no odd number of at least 1, the size of a kernel."""
    require_at_least(1, **counts)
    for name, value in counts.items():
        if value % 2 == 0:
            raise InputError(f"{name} is {value}, expected an odd number")
