"""Keys that the others cannot replace, blended with attention (Chari and Van Durme 2025, "Compactor", arXiv 2507.08143).

The leverage of a row of a matrix X is its entry on the diagonal of X (X'X)^-1 X': how far the row determines its own
fit by all rows. It is 1 for a key in a direction of its own and small for one among many alike. A random projection of
the head's dimensions to fewer keeps it approximately and makes X'X smaller.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.linalg import vector_norm

from kvcompress.core.errors import InputError
from kvcompress.ops import score_launchers
from kvcompress.scores.base import Score, require_at_least, require_odd
from kvcompress.scores.chunk_attention import non_causal
from kvcompress.scores.inputs import ScoreInputs
from kvcompress.scores.pooling import pool

PART = 512  # keys whose products are summed by one program


@dataclass(frozen=True)
class Leverage(Score):
    """blend z(leverage of k) + z(attention on k among its neighbours, times |v|), with z(x) = (x - mean) / deviation.

    Leverage is that of the keys before rotation, minus their mean, projected by a Gaussian matrix; attention is that of
    `non_causal`, pooled over neighbours. z is taken within a KV head. Keys that stay are left out of everything: the
    sinks' vectors and attention are of a size that would leave no difference between the rest.

    sketch: dimensions after projection; a head with no more dimensions is not projected, which makes leverage exact.
    ridge: added to the diagonal of X'X, so that it can be inverted where keys are few or alike.
    blend: weight of leverage against attention. The authors' engine uses 0.5; a reference implementation of theirs
        takes the share of keys to be removed.
    chunk: positions in a chunk of non-causal attention.
    scale: multiplies the products of queries and keys there. The authors' programs use 1, which makes attention sharper
        than the model's own by head_dim ** 0.5; None takes the model's scaling.
    kernel: keys that attention is pooled over, odd.
    unrotate: take keys before rotation. Without it (for models whose rotary embedding is not known, or that have none)
        they are taken as they are cached.
    seed: of the random projection, one for all heads and layers.
    """

    sketch: int = 48
    ridge: float = 0.01
    blend: float = 0.5
    chunk: int = 256
    scale: float | None = 1.0
    kernel: int = 3
    unrotate: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        require_at_least(1, sketch=self.sketch, chunk=self.chunk)
        require_odd(kernel=self.kernel)
        if self.ridge <= 0:
            raise InputError(f"ridge is {self.ridge}, expected more than 0")

    @property
    def needs_queries(self) -> bool:
        return True

    @property
    def needs_rotation(self) -> bool:
        return self.unrotate

    def rank(self, held: ScoreInputs) -> Tensor:
        attention = non_causal(held, self.chunk, held.scaling if self.scale is None else self.scale)
        attention = attention * vector_norm(held.values, dim=-1, dtype=torch.float32)
        places = held.positions.where(held.candidates, -1)
        attention = pool(attention, places, self.kernel // 2, "mean", held.in_order)
        leverage, attention = standard(torch.stack((self.leverage(held), attention)), held.candidates)
        return self.blend * leverage + attention

    def leverage(self, held: ScoreInputs) -> Tensor:
        """Leverage of each candidate among the candidates, float32 `[batch, kv_head, key]`."""
        keys, number = self.projected(held), held.candidates.sum(-1).clamp_min(1)[..., None]
        # In float32 the factor of X'X loses directions that a few unusual keys alone reach, and they are what counts.
        exact = keys.double()
        total, products = sums(exact)
        mean = total / number
        products -= number[..., None] * mean[..., None] * mean[..., None, :]
        unit = torch.eye(keys.shape[-1], dtype=exact.dtype, device=exact.device)
        # The ridge makes it positive, whatever finite keys there are; to ask whether that worked would wait for the device.
        factor = torch.linalg.cholesky_ex(products + self.ridge * unit).L
        inverse = torch.linalg.solve_triangular(factor.mT, unit, upper=True)
        if score_launchers.can_launch(held.keys):
            return score_launchers.squared_lengths(keys, mean.float(), inverse.float())
        return ((exact - mean[..., None, :]) @ inverse).square().sum(-1).float()

    def projected(self, held: ScoreInputs) -> Tensor:
        """Keys before rotation, projected, float32 `[batch, kv_head, key, sketch]`; 0 where they are no candidates."""
        size, turn = held.keys.shape[-1], held.rotation if self.unrotate else None
        matrix = gaussian(size, self.sketch, self.seed, held.keys.device) if self.sketch < size else None
        if turn and matrix is not None and held.in_order and score_launchers.can_launch(held.keys):
            return score_launchers.turned_back(held.keys, held.candidates, turn, matrix)
        keys = held.keys.float()
        keys = turn.turn(keys, -held.positions) if turn else keys
        keys = keys if matrix is None else keys @ matrix
        return keys.masked_fill(~held.candidates[..., None], 0)


def sums(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the rows of X `[.., row, size]`, and X'X; in parts side by side, as a GPU multiplies few long matrices on few
    of its processors."""
    parts = rows.shape[-2] // PART
    whole, rest = rows[..., : parts * PART, :].unflatten(-2, (parts, PART)), rows[..., parts * PART :, :]
    return whole.sum(-2).sum(-2) + rest.sum(-2), (whole.mT @ whole).sum(-3) + rest.mT @ rest


@lru_cache(maxsize=8)
def gaussian(size: int, sketch: int, seed: int, device: torch.device) -> Tensor:
    """A random projection, `[size, sketch]`."""
    generator = torch.Generator().manual_seed(seed)  # of the CPU, so that every device draws the same
    return (torch.randn(size, sketch, generator=generator) / sketch**0.5).to(device)


def standard(scores: Tensor, there: Tensor) -> Tensor:
    """Zero mean and unit deviation over the keys that are `there`, within a KV head, `[.., batch, kv_head, key]`."""
    number = there.sum(-1, keepdim=True).clamp_min(1)
    centred = scores.masked_fill(~there, 0)
    centred = (centred - centred.sum(-1, keepdim=True) / number).masked_fill(~there, 0)
    deviation = (centred.square().sum(-1, keepdim=True) / number).sqrt()
    return centred / deviation.clamp_min(1e-6)
