"""Score by key norm (Devoto et al. 2024, "A Simple and Effective L2 Norm-Based Strategy", arXiv 2406.11430)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import vector_norm

from kvcompress.scores.base import Score
from kvcompress.scores.inputs import ScoreInputs


@dataclass(frozen=True)
class KeyNorm(Score):
    """-|k|: keys of small norm were found to receive much attention. Rotation does not change a norm. No parameters."""

    def rank(self, inputs: ScoreInputs) -> Tensor:
        return -vector_norm(inputs.keys, dim=-1, dtype=torch.float32)
