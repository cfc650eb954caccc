"""Small keys (Devoto et al. 2024, "A Simple and Effective L2 Norm-Based Strategy", arXiv 2406.11430)."""

from dataclasses import dataclass

from torch import Tensor

from kvcompress.scores.held import Held
from kvcompress.scores.score import Score


@dataclass(frozen=True)
class KeyNorm(Score):
    """-|k|: keys of small norm were found to get much attention. Rotation does not change it. No parameters."""

    def rank(self, held: Held) -> Tensor:
        return -held.keys.float().norm(dim=-1)
