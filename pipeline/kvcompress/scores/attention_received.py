"""Attention weights that queries give to keys, block by block, and their pooling over neighbours in the text.

A block is the largest tensor that exists at a time, so memory does not grow with the number of queries. Positions alone
decide which keys a query sees, whatever the order of the slots and the gaps between them. A query's weights are divided
among the keys that are still held.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from kvcompress.ops import score_launchers
from kvcompress.scores.inputs import AttentionTotals, ScoreInputs

# device -> weights in a block: a CPU's cache, against few large launches on a GPU
BLOCK_LIMITS = {"cpu": 2**20, "cuda": 2**26}
MASKED = torch.finfo(torch.float32).min  # finite: a query that sees nothing (a pad) must not give NaN

Pooling = Literal["mean", "max"]


def received(inputs: ScoreInputs, last: int | None = None, most: int | None = None) -> AttentionTotals:
    """Sum the attention that keys receive from all queries, added to `inputs.earlier`, or from the `last` queries only.

    With more than `most` queries, every second, third, ... is used, the last one included.
    """
    assert inputs.queries is not None
    sample = query_sample(inputs.queries.shape[2], last, most)
    if inputs.whole and score_launchers.can_launch(inputs.queries, inputs.keys):
        found = received_by_kernel(inputs, sample)
    else:
        batch, heads, count = inputs.keys.shape[:3]
        total = torch.zeros(batch, heads, count, dtype=torch.float32, device=inputs.keys.device)
        queries = torch.zeros_like(total)
        for weights, visible in weight_blocks(inputs, sample):
            end = weights.shape[-1]
            total[..., :end] += weights.sum(3).mean(2)
            queries[..., :end] += visible.sum(2)
        found = AttentionTotals(total, queries)
    return found if inputs.earlier is None or last is not None else inputs.earlier + found


def query_sample(count: int, last: int | None = None, most: int | None = None) -> slice:
    """Slice the `last` of `count` queries, at most `most` of them at equal distances, the last one included."""
    among = count if last is None else min(last, count)
    step = 1 if most is None else -(-among // most)
    return slice(count - among + (among - 1) % step, count, step)


def received_by_kernel(inputs: ScoreInputs, sample: slice) -> AttentionTotals:
    """Sum, by a kernel, the attention from a sample of a text's queries, the last query among them."""
    assert inputs.queries is not None
    count, step = inputs.keys.shape[2], sample.step
    total = score_launchers.received_by_keys(inputs.queries[:, :, sample], inputs.keys, inputs.scaling, step)
    asking = len(range(count)[sample])
    after = torch.arange(count, device=total.device).neg_().add_(count - 1).div_(step, rounding_mode="floor")
    return AttentionTotals(total, (after + 1).clamp_max(asking).float().expand_as(total))


def weight_blocks(inputs: ScoreInputs, sample: slice) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield weights and visibility of the sampled queries, a block of queries at a time.

    Weights are `[batch, kv_head, group, query, key]`, visibility bool `[batch or 1, kv_head or 1, query, key]`.

    The keys of a block end after the last one that any of its queries sees; the last block has all keys.
    """
    queries, at = inputs.grouped_queries[:, :, :, sample], inputs.at[:, sample]
    batch, heads, group, length, _ = queries.shape
    keys = inputs.keys.float().transpose(2, 3)  # [batch, kv_head, head_dim, key]
    step = block_size(batch * heads * group * keys.shape[-1], keys.device)
    for begin in range(0, length, step):
        query, key = at[:, None, begin : begin + step, None], inputs.positions[:, :, None, :]
        visible = (key <= query) & (key >= 0)
        end = inputs.positions.shape[-1]
        if inputs.whole:
            end = range(end)[sample][min(begin + step, length) - 1] + 1
        elif begin + step < length:  # the last queries see almost all keys, and a look would wait for the device
            end = last_true(visible)
        visible, rows = visible[..., :end], queries[:, :, :, begin : begin + step]
        scores = ((rows * inputs.scaling).flatten(2, 3) @ keys[..., :end]).unflatten(2, (group, -1))
        hidden = ~visible[:, :, None]
        weights = scores.masked_fill_(hidden, MASKED).softmax(-1).masked_fill_(hidden, 0)
        yield weights, visible


def block_size(weights: int, device: torch.device) -> int:
    """Number of queries in a block if one query has so many `weights`."""
    return max(16, BLOCK_LIMITS.get(device.type, BLOCK_LIMITS["cpu"]) // max(weights, 1))


def last_true(mask: Tensor) -> int:
    """Index after the last one in the last dimension at which anything is true; at least 1."""
    found = mask.flatten(0, -2).any(0).nonzero()
    return int(found[-1]) + 1 if len(found) else 1


def pool(scores: Tensor, positions: Tensor, radius: int, how: Pooling, in_order: bool = False) -> Tensor:
    """Pool every score `[batch, kv_head, key]` with those of keys at most `radius` positions away; empty slots give 0.

    Only keys that are held count: the mean of a key without neighbours is its own score. Slots may be in any order.

    positions: `[batch, kv_head, key]`, -1 in an empty slot, otherwise all different within a head.
    in_order: a slot that is not empty holds the position of its own number, so nothing has to be sorted.
    """
    if in_order:
        return _pool_in_order(scores, positions < 0, radius, how)
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


def _pool_in_order(scores: Tensor, absent: Tensor, radius: int, how: Pooling) -> Tensor:
    size = 2 * radius + 1
    if how == "max":
        return max_pool1d(scores.masked_fill(absent, -float("inf")), size, 1, radius).masked_fill(absent, 0)
    total, number = (
        avg_pool1d(sums, size, 1, radius) for sums in (scores.masked_fill(absent, 0), (~absent).to(scores.dtype))
    )
    return (total / number).masked_fill(absent, 0)
