"""Pooling over neighbours in the text, where slots may be in any order and neighbours may be gone."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

Pooling = Literal["mean", "max"]


def pool(scores: Tensor, positions: Tensor, radius: int, how: Pooling, in_order: bool = False) -> Tensor:
    """Every score with those of keys at most `radius` positions away, `[batch, kv_head, key]`; empty slots give 0.

    positions: `[batch, kv_head, key]`, -1 for an empty slot, otherwise all different within a head. Only keys that are
    held count: the mean of a key without neighbours is its own score. in_order: a slot that is not empty holds the
    position of its own number, so that nothing has to be sorted.
    """
    if in_order:
        return _of_a_text(scores, positions < 0, radius, how)
    order = positions.argsort(dim=-1)
    places = positions.gather(-1, order)
    ranked = scores.gather(-1, order).masked_fill(places < 0, 0)
    pooled, number = ranked.clone(), torch.ones_like(ranked)
    # Positions differ, so keys within `radius` positions are within `radius` ranks of each other.
    for shift in range(1, min(radius, scores.shape[-1] - 1) + 1):
        near = (places[..., shift:] - places[..., :-shift] <= radius) & (places[..., :-shift] >= 0)
        for here, there in ((slice(shift, None), slice(None, -shift)), (slice(None, -shift), slice(shift, None))):
            if how == "mean":
                pooled[..., here] += ranked[..., there] * near
                number[..., here] += near
            else:
                pooled[..., here] = torch.where(near, pooled[..., here].maximum(ranked[..., there]), pooled[..., here])
    return torch.empty_like(pooled).scatter_(-1, order, pooled / number)


def _of_a_text(scores: Tensor, absent: Tensor, radius: int, how: Pooling) -> Tensor:
    size = 2 * radius + 1
    if how == "max":
        return max_pool1d(scores.masked_fill(absent, -float("inf")), size, 1, radius).masked_fill(absent, 0)
    total, number = (
        avg_pool1d(sums, size, 1, radius) for sums in (scores.masked_fill(absent, 0), (~absent).to(scores.dtype))
    )
    return (total / number).masked_fill(absent, 0)
