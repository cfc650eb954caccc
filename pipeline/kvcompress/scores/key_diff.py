"""Score by dissimilarity from the mean key (Park et al. 2025, "KeyDiff", arXiv 2504.15364)."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import normalize

from kvcompress.scores.base import Score
from kvcompress.scores.inputs import ScoreInputs


@dataclass(frozen=True)
class KeyDiff(Score):
    """-cos(k, a) with the anchor a, the mean of all keys held, each rotated and at length 1. No parameters.

    Sinks and window are part of the anchor: the paper measures how much a key repeats the rest of the cache.
    """

    def rank(self, inputs: ScoreInputs) -> Tensor:
        # An empty slot may hold anything, NaN included, so it is replaced, not multiplied by 0.
        units = normalize(inputs.keys.float(), dim=-1).masked_fill(~inputs.real[..., None], 0)
        anchor = units.sum(2, keepdim=True)  # the mean up to its length
        return -(units @ normalize(anchor, dim=-1).mT)[..., 0]
