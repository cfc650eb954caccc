"""Keys that future queries are expected to attend to (Devoto et al. 2025, "Expected Attention", arXiv 2510.00636)."""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm

from kvcompress.models.rotary import Rotation
from kvcompress.ops import score_launchers
from kvcompress.scores.attention_received import which
from kvcompress.scores.base import Score, require_at_least
from kvcompress.scores.inputs import ScoreInputs


@dataclass(frozen=True)
class ExpectedAttention(Score):
    """(softmax_k(s k.m + s^2 k'Ck / 2) + epsilon) |v|: attention of Gaussian queries, times what the key would add.

    m and C are mean and covariance of the queries at hand before rotation, then rotated as future queries will be: with
    R the mean of the rotations at the next `future` positions, R m and R C R'. s is `held.scaling`. For a Gaussian
    query, exp(s k.q) has the mean exp(s k.m + s^2 k'Ck / 2); the softmax divides the keys' shares. Keys that stay are
    left out of it, and query heads of a KV head are averaged after it.

    R C R' is the paper's. It is less than the spread of the queries to come: planes that turn often within `future`
    positions average to nothing, and what the rotations themselves add to the spread is not in it.

    future: positions to look ahead.
    skip: queries at the first positions that are not counted, as their vectors are far from all others; where there
        are no others they are.
    covariance: use C; without it every query is taken to be the mean one.
    most: queries that m and C are taken from: where there are more, every second, third, ... of them, the last included.
    epsilon: added to the attention, so that a large value counts also where attention is next to nothing.
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
        return which(count, most=self.most)

    def rank(self, held: ScoreInputs) -> Tensor:
        assert held.rotation is not None
        mean, spread = self.future_queries(held, held.rotation)
        logits = logits_of(held.keys, mean, spread, held.scaling)
        expected = logits.masked_fill(held.others[:, :, None], -float("inf")).softmax(-1).mean(2)
        expected = expected + self.epsilon if self.epsilon else expected
        return expected * vector_norm(held.values, dim=-1, dtype=torch.float32) if self.value_norm else expected

    def future_queries(self, held: ScoreInputs, rotation: Rotation) -> tuple[Tensor, Tensor | None]:
        """Mean `[batch, kv_head, group, head_dim]` and covariance `[.., head_dim, head_dim]` of queries to come."""
        assert held.queries is not None
        some = self.looks_at(held.queries.shape[2])
        queries = held.queries[:, :, some]
        if held.asked is None:
            times = self.times(held.at[:, some], rotation, queries.shape[-1])
        else:
            times = known_times(self, held.asked[some], rotation, queries.shape[-1], queries.device)
        if held.asked is not None and score_launchers.can_launch(queries):
            queries = score_launchers.turned(queries, times.cos[0, 0], times.sin[0, 0])
        else:
            queries = rotation.turn_by(queries.float(), times.cos, times.sin)
        queries = queries.unflatten(1, (held.keys.shape[1], -1))
        mean = (times.share.mT @ queries)[:, :, :, 0]
        spread = None
        if self.covariance:
            half = held.queries.dtype == torch.bfloat16
            centred = torch.empty_like(queries, dtype=torch.bfloat16 if half else torch.float32)
            torch.mul(queries - mean[:, :, :, None], times.root, out=centred)
            spread = times.ahead.mT @ (centred.mT @ centred).float() @ times.ahead
        return (mean[..., None, :] @ times.ahead)[..., 0, :], spread

    def times(self, at: Tensor, rotation: Rotation, size: int) -> "Times":
        """What of all this the positions of the queries decide, `[batch or 1, query]`; `size` is head_dim."""
        counted = at >= self.skip
        counted = torch.where(counted.any(-1, keepdim=True), counted, at >= 0)
        share = (counted / counted.sum(-1, keepdim=True).clamp_min(1))[:, None, None, :, None]
        ahead = mean_turn(rotation, size, self.future, at.device)
        following = at.amax(-1, keepdim=True) + 1  # [batch or 1, 1]
        ahead = rotation.turn(ahead.expand(len(following), -1, -1), following)[:, None, None]
        return Times(*rotation.cos_sin(-at[:, None, :]), share, share.sqrt(), ahead)


class Times(NamedTuple):
    """cos, sin `[batch or 1, 1, query, plane]` turn queries back; share `[batch or 1, 1, 1, query, 1]` is what each counts,
    root its square root; ahead `[batch or 1, 1, 1, head_dim, head_dim]` turns to where queries will stand."""

    cos: Tensor
    sin: Tensor
    share: Tensor
    root: Tensor
    ahead: Tensor


@lru_cache(maxsize=4)
def known_times(score: ExpectedAttention, at: range, rotation: Rotation, size: int, device: torch.device) -> Times:
    """The same of one row whose positions are known, as they are in every layer that reads a prompt."""
    return score.times(torch.arange(at.start, at.stop, at.step, device=device)[None], rotation, size)


def logits_of(keys: Tensor, mean: Tensor, spread: Tensor | None, scaling: float) -> Tensor:
    """s k.m + s^2 k'Ck / 2 of keys `[batch, kv_head, key, head_dim]`, float32 `[batch, kv_head, group, key]`."""
    if spread is not None and keys.dtype == torch.bfloat16 and score_launchers.can_launch(keys):
        return score_launchers.gaussian_logits(keys, mean, spread, scaling)
    logits = torch.einsum("bhnd,bhgd->bhgn", keys.float(), mean * scaling)
    if spread is not None:
        # In the precision of the keys, where that has the range; float16 has not.
        keys = (keys.float() if keys.dtype == torch.float16 else keys).contiguous()
        spread = (spread * (scaling**2 / 2)).to(keys.dtype)
        for i in range(mean.shape[2]):  # one query head at a time: [.., group, key, head_dim] may be large
            logits[:, :, i] += (keys @ spread[:, :, i]).mul_(keys).sum(-1, dtype=torch.float32)
    return logits


@lru_cache(maxsize=8)
def mean_turn(rotation: Rotation, size: int, positions: int, device: torch.device) -> Tensor:
    """What the mean of the rotations for 0 ... positions - 1 makes of each unit vector, `[head_dim, head_dim]`, row by row.

    Rotations commute, so the mean over other positions that follow each other is this one turned by the first of them.
    """
    unit = torch.eye(size)[:, None].expand(size, positions, size)
    return rotation.turn(unit, torch.arange(positions)).mean(1).to(device)
