"""Score by the expected attention of future queries (Devoto et al. 2025, "Expected Attention", arXiv 2510.00636)."""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm

from kvcompress.models.rotary import Rotation
from kvcompress.ops import score_launchers
from kvcompress.scores.attention_received import query_sample
from kvcompress.scores.base import Score, require_at_least
from kvcompress.scores.inputs import ScoreInputs


@dataclass(frozen=True)
class ExpectedAttention(Score):
    """(softmax_k(s k.m + s^2 k'Ck / 2) + epsilon) |v|: attention of Gaussian queries, times the key's contribution.

    m and C are mean and covariance of the queries before rotation, then rotated like future queries: with R the mean
    of the rotations at the next `future` positions, R m and R C R'. s is `ScoreInputs.scaling`. For a Gaussian query,
    exp(s k.q) has the mean exp(s k.m + s^2 k'Ck / 2); the softmax divides the keys' shares. Keys that stay are left
    out of it, and query heads of a KV head are averaged after it.

    R C R' is the paper's choice. It is less than the covariance of the coming queries: planes that turn often within
    `future` positions average to nothing, and the spread that the rotations themselves add is left out.

    Parameters
    ----------
    future: positions to look ahead.
    skip: first positions whose queries are not counted, as their vectors are far from all others; they are counted if
        there are no others.
    covariance: use C. Without it every query is taken to be the mean query.
    most: largest number of queries that m and C are taken from. With more, every second, third, ... is used, the last
        included.
    epsilon: added to the attention, so that a large value counts even where attention is close to 0.
    value_norm: multiply by |v|.
    """

    future: int = 512
    skip: int = 4
    covariance: bool = True
    most: int = 1024
    epsilon: float = 0.0
    value_norm: bool = True

    def __post_init__(self) -> None:
        require_at_least(1, future=self.future, most=self.most)
        require_at_least(0, skip=self.skip)

    @property
    def needs_queries(self) -> bool:
        return True

    @property
    def needs_rotation(self) -> bool:
        return True

    def looks_at(self, count: int) -> slice:
        return query_sample(count, most=self.most)

    def rank(self, inputs: ScoreInputs) -> Tensor:
        assert inputs.rotation is not None
        mean, covariance = self.future_queries(inputs, inputs.rotation)
        logits = gaussian_logits(inputs.keys, mean, covariance, inputs.scaling)
        expected = logits.masked_fill(inputs.others[:, :, None], -float("inf")).softmax(-1).mean(2)
        expected = expected + self.epsilon if self.epsilon else expected
        return expected * vector_norm(inputs.values, dim=-1, dtype=torch.float32) if self.value_norm else expected

    def future_queries(self, inputs: ScoreInputs, rotation: Rotation) -> tuple[Tensor, Tensor | None]:
        """Mean `[batch, kv_head, group, head_dim]` and covariance `[.., head_dim, head_dim]` of future queries."""
        assert inputs.queries is not None
        sample = self.looks_at(inputs.queries.shape[2])
        queries = inputs.queries[:, :, sample]
        if inputs.query_range is None:
            factors = self.factors(inputs.at[:, sample], rotation, queries.shape[-1])
        else:
            factors = factors_of_range(self, inputs.query_range[sample], rotation, queries.shape[-1], queries.device)
        if inputs.query_range is not None and score_launchers.can_launch(queries):
            queries = score_launchers.turned(queries, factors.cos[0, 0], factors.sin[0, 0])
        else:
            queries = rotation.turn_by(queries.float(), factors.cos, factors.sin)
        queries = queries.unflatten(1, (inputs.keys.shape[1], -1))
        mean = (factors.share.mT @ queries)[:, :, :, 0]
        covariance = None
        if self.covariance:
            half = inputs.queries.dtype == torch.bfloat16
            centred = torch.empty_like(queries, dtype=torch.bfloat16 if half else torch.float32)
            torch.mul(queries - mean[:, :, :, None], factors.root, out=centred)
            covariance = factors.ahead.mT @ (centred.mT @ centred).float() @ factors.ahead
        return (mean[..., None, :] @ factors.ahead)[..., 0, :], covariance

    def factors(self, at: Tensor, rotation: Rotation, size: int) -> "PositionFactors":
        """Factors of queries at positions `[batch or 1, query]`; `size` is head_dim."""
        counted = at >= self.skip
        counted = torch.where(counted.any(-1, keepdim=True), counted, at >= 0)
        share = (counted / counted.sum(-1, keepdim=True).clamp_min(1))[:, None, None, :, None]
        ahead = mean_rotation(rotation, size, self.future, at.device)
        following = at.amax(-1, keepdim=True) + 1  # [batch or 1, 1]
        ahead = rotation.turn(ahead.expand(len(following), -1, -1), following)[:, None, None]
        return PositionFactors(*rotation.cos_sin(-at[:, None, :]), share, share.sqrt(), ahead)


class PositionFactors(NamedTuple):
    """Factors of the estimate that depend on the positions of the queries alone.

    cos, sin: `[batch or 1, 1, query, plane]`, undo the rotation of the queries.
    share: `[batch or 1, 1, 1, query, 1]`, weight of each query; root: its square root.
    ahead: `[batch or 1, 1, 1, head_dim, head_dim]`, mean rotation to the future positions.
    """

    cos: Tensor
    sin: Tensor
    share: Tensor
    root: Tensor
    ahead: Tensor


@lru_cache(maxsize=4)
def factors_of_range(
    score: ExpectedAttention, at: range, rotation: Rotation, size: int, device: torch.device
) -> PositionFactors:
    """Factors of positions in a Python range, cached because all layers that read a prompt share them."""
    return score.factors(torch.arange(at.start, at.stop, at.step, device=device)[None], rotation, size)


def gaussian_logits(keys: Tensor, mean: Tensor, covariance: Tensor | None, scaling: float) -> Tensor:
    """s k.m + s^2 k'Ck / 2 of keys `[batch, kv_head, key, head_dim]`, float32 `[batch, kv_head, group, key]`."""
    if covariance is not None and keys.dtype == torch.bfloat16 and score_launchers.can_launch(keys):
        return score_launchers.gaussian_logits(keys, mean, covariance, scaling)
    logits = torch.einsum("bhnd,bhgd->bhgn", keys.float(), mean * scaling)
    if covariance is not None:
        # In the precision of the keys, except float16, whose range is too small.
        keys = (keys.float() if keys.dtype == torch.float16 else keys).contiguous()
        covariance = (covariance * (scaling**2 / 2)).to(keys.dtype)
        for i in range(mean.shape[2]):  # one query head at a time: [.., group, key, head_dim] may be large
            logits[:, :, i] += (keys @ covariance[:, :, i]).mul_(keys).sum(-1, dtype=torch.float32)
    return logits


@lru_cache(maxsize=8)
def mean_rotation(rotation: Rotation, size: int, positions: int, device: torch.device) -> Tensor:
    """Mean of the rotations by 0 ... positions - 1, applied to every unit vector, `[head_dim, head_dim]`, row by row.

    Rotations commute, so the mean over later consecutive positions is this one turned by the first of them.
    """
    unit = torch.eye(size)[:, None].expand(size, positions, size)
    return rotation.turn(unit, torch.arange(positions)).mean(1).to(device)
