"""Attention weights of the queries at hand on the keys held, block by block.

A block is the largest thing that exists at a time, so memory does not grow with the number of queries. Which key a query
sees is decided by positions alone, whatever the order of the slots and the holes between them; a query's weights are
divided among the keys that are still held.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kvcompress.ops import score_launchers
from kvcompress.scores.inputs import AttentionTotals, ScoreInputs

# device -> weights a block may hold: as in observing attention, a CPU's cache against a GPU's few large launches
BLOCK_LIMITS = {"cpu": 2**20, "cuda": 2**26}
MASKED = torch.finfo(torch.float32).min  # finite: a query that sees nothing (a pad) must not give NaN


def received(held: ScoreInputs, last: int | None = None, most: int | None = None) -> AttentionTotals:
    """What the keys receive from all queries, or from the `last` of them, together with what they had before.

    With `last` earlier queries count for nothing. Where there are more than `most`, every second, third, ... query is
    looked at, the last included.
    """
    assert held.queries is not None
    some = which(held.queries.shape[2], last, most)
    if held.whole and held.limit is None and score_launchers.can_launch(held.queries, held.keys):
        found = of_a_text(held, some)
    else:
        batch, heads, count = held.keys.shape[:3]
        total = torch.zeros(batch, heads, count, dtype=torch.float32, device=held.keys.device)
        queries = torch.zeros_like(total)
        for weights, visible in blocks(held, some):
            end = weights.shape[-1]
            total[..., :end] += weights.sum(3).mean(2)
            queries[..., :end] += visible.sum(2)
        found = AttentionTotals(total, queries)
    return found if held.earlier is None or last is not None else held.earlier + found


def which(count: int, last: int | None = None, most: int | None = None) -> slice:
    """Of `count` queries the `last`, and of these at most `most` at equal distances, the last one included."""
    among = count if last is None else min(last, count)
    step = 1 if most is None else -(-among // most)
    return slice(count - among + (among - 1) % step, count, step)


def of_a_text(held: ScoreInputs, some: slice) -> AttentionTotals:
    """The same by a kernel, from some queries of a text, the last among them."""
    assert held.queries is not None
    count, step = held.keys.shape[2], some.step
    total = score_launchers.received_by_keys(held.queries[:, :, some], held.keys, held.scaling, step)
    asking = len(range(count)[some])
    after = torch.arange(count, device=total.device).neg_().add_(count - 1).div_(step, rounding_mode="floor")
    return AttentionTotals(total, (after + 1).clamp_max(asking).float().expand_as(total))


def blocks(held: ScoreInputs, some: slice = slice(None)) -> Iterator[tuple[Tensor, Tensor]]:
    """(weights `[batch, kv_head, group, query, key]`, visible `[batch or 1, kv_head or 1, query, key]`) of each block of
    some of the queries.

    The keys of a block end where none of its queries sees a further one; of the last few queries they are all.
    """
    queries, at = held.grouped_queries[:, :, :, some], held.at[:, some]
    batch, heads, group, length, _ = queries.shape
    keys = held.keys.float().transpose(2, 3)  # [batch, kv_head, head_dim, key]
    step = block_size(batch * heads * group * keys.shape[-1], keys.device)
    for begin in range(0, length, step):
        visible = sees(at[:, begin : begin + step], held)
        end = held.positions.shape[-1]
        if held.whole:
            end = range(end)[some][min(begin + step, length) - 1] + 1
        elif begin + step < length:  # the last ones see almost all, and to look would wait for the device
            end = last_true(visible)
        visible, rows = visible[..., :end], queries[:, :, :, begin : begin + step]
        scores = ((rows * held.scaling).flatten(2, 3) @ keys[..., :end]).unflatten(2, (group, -1))
        hidden = ~visible[:, :, None]
        weights = scores.masked_fill_(hidden, MASKED).softmax(-1).masked_fill_(hidden, 0)
        yield weights, visible


def sees(at: Tensor, held: ScoreInputs) -> Tensor:
    """Which keys the queries at positions `at` see, bool `[batch or 1, kv_head or 1, query, key]`."""
    query, key = at[:, None, :, None], held.positions[:, :, None, :]
    visible = (key <= query) & (key >= 0)
    return visible if held.limit is None else visible & (key > query - held.limit)


def block_size(weights: int, device: torch.device) -> int:
    """Queries in a block, where one query has so many `weights`."""
    return max(16, BLOCK_LIMITS.get(device.type, BLOCK_LIMITS["cpu"]) // max(weights, 1))


def last_true(mask: Tensor) -> int:
    """One after the last index of the last dimension at which anything is true; at least 1."""
    found = mask.flatten(0, -2).any(0).nonzero()
    return int(found[-1]) + 1 if len(found) else 1
