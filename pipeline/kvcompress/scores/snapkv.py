"""Score by the attention of the last queries (Li et al. 2024, "SnapKV", arXiv 2404.14469)."""

from dataclasses import dataclass

from torch import Tensor

from kvcompress.core.errors import InputError
from kvcompress.scores.attention_received import Pooling, pool, received
from kvcompress.scores.base import Score, require_at_least, require_odd
from kvcompress.scores.inputs import ScoreInputs


@dataclass(frozen=True)
class SnapKV(Score):
    """Mean over the last `window` queries q of softmax_k(q.k * scaling), pooled over the key's neighbours in the text.

    Query heads of a KV head are averaged. The paper scores only keys before the observation window; here a key inside
    it gets the mean over the queries that could see it. If fewer queries are available, as in a short chunk, those
    observe. The paper pools the prefix alone; here sinks and keys of the window count as neighbours like others.

    Parameters
    ----------
    window: queries that observe.
    kernel: keys pooled over, the key itself and as many on each side; odd. Evicted neighbours do not count.
    pooling: "mean" or "max"; both keep the surroundings of a key that receives attention.
    """

    window: int = 64
    kernel: int = 5
    pooling: Pooling = "mean"

    def __post_init__(self) -> None:
        require_at_least(1, window=self.window)
        require_odd(kernel=self.kernel)
        if self.pooling not in ("mean", "max"):
            raise InputError(f"pooling is {self.pooling!r}, expected 'mean' or 'max'")

    @property
    def needs_queries(self) -> bool:
        return True

    @property
    def looks_back(self) -> int | None:
        return self.window

    def rank(self, inputs: ScoreInputs) -> Tensor:
        totals = received(inputs, self.window)
        mean = totals.total / totals.queries.clamp_min(1)
        return pool(mean, inputs.positions.expand(mean.shape), self.kernel // 2, self.pooling, inputs.in_order)
