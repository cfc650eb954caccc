"""Score by all attention received so far, the heavy hitters (Zhang et al. 2023, "H2O", arXiv 2306.14048)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress.scores.attention_received import received
from kvcompress.scores.base import Score, require_at_least
from kvcompress.scores.inputs import AttentionTotals, ScoreInputs


@dataclass(frozen=True)
class AccumulatedAttention(Score):
    """Sum over queries q of softmax_k(q.k * scaling), divided by the number of queries that could see the key.

    Query heads of a KV head are averaged. In a stream `ScoreInputs.earlier` carries the totals of earlier queries. To
    continue, keep `received(inputs)` and `take` the slots that remain.

    Parameters
    ----------
    per_query: divide. The paper's plain sum (False) favours early keys, which more queries could see: a key that gets
        the same share of every query would rank by its age alone.
    most: largest number of queries used. With more, every second, third, ... is used, the last included. The paper uses
        all (None), which takes as long as attention itself.
    """

    per_query: bool = True
    most: int | None = 1024

    def __post_init__(self) -> None:
        if self.most is not None:
            require_at_least(1, most=self.most)

    @property
    def needs_queries(self) -> bool:
        return True

    @property
    def accumulates(self) -> bool:
        return True

    @torch.no_grad()
    def received(self, inputs: ScoreInputs) -> AttentionTotals:
        return received(inputs, most=self.most)

    def rank(self, inputs: ScoreInputs) -> Tensor:
        return self.of_totals(self.received(inputs))

    def of_totals(self, totals: AttentionTotals) -> Tensor:
        return totals.total / totals.queries.clamp_min(1) if self.per_query else totals.total
