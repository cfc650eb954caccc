"""Pooling over neighbours in the text, where slots may be in any order and neighbours may be gone."""

from typing import Literal

import torch
from torch import Tensor

Pooling = Literal["mean", "max"]


def pool(scores: Tensor, positions: Tensor, radius: int, how: Pooling) -> Tensor:
    """Every score with those of keys at most `radius` positions away, `[batch, kv_head, key]`; empty slots give 0.

    positions: `[batch, kv_head, key]`, -1 for an empty slot, otherwise all different within a head. Only keys that are
    held count: the mean of a key without neighbours is its own score.
    """
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
