"""Attention weights of the queries at hand on the keys held, block by block.

A block is the largest thing that exists at a time, so memory does not grow with the number of queries. Which key a query
sees is decided by positions alone, whatever the order of the slots and the holes between them; a query's weights are
divided among the keys that are still held.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kvcompress.scores import launches
from kvcompress.scores.held import Held
from kvcompress.scores.history import Received

# device -> weights a block may hold: as in observing attention, a CPU's cache against a GPU's few large launches
BLOCK_LIMITS = {"cpu": 2**20, "cuda": 2**26}
MASKED = torch.finfo(torch.float32).min  # finite: a query that sees nothing (a pad) must not give NaN


def received(held: Held, last: int | None = None) -> Received:
    """What the keys receive from all queries, or from the `last` of them, together with what they had before.

    With `last` earlier queries count for nothing.
    """
    assert held.queries is not None
    if held.in_order and held.limit is None and launches.can_launch(held.queries, held.keys):
        found = of_a_text(held.queries if last is None else held.queries[:, :, -last:], held)
    else:
        batch, heads, count = held.keys.shape[:3]
        total = torch.zeros(batch, heads, count, dtype=torch.float32, device=held.keys.device)
        queries = torch.zeros_like(total)
        for weights, visible in blocks(held, last):
            end = weights.shape[-1]
            total[..., :end] += weights.sum(3).mean(2)
            queries[..., :end] += visible.sum(2)
        found = Received(total, queries)
    return found if held.earlier is None or last is not None else held.earlier + found


def of_a_text(queries: Tensor, held: Held) -> Received:
    """The same by a kernel, from the queries of the last columns of a text."""
    total = launches.received_by_keys(queries, held.keys, held.scaling)
    asking, count = queries.shape[2], total.shape[2]
    before = (torch.arange(count, device=total.device) - (count - asking)).clamp_min(0)
    return Received(total, (asking - before).float().expand_as(total))


def blocks(held: Held, last: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """(weights `[batch, kv_head, group, query, key]`, visible `[batch or 1, kv_head or 1, query, key]`) of each block.

    The keys of a block end where none of its queries sees a further one; with `last` they are all.
    """
    queries, at = held.grouped_queries, held.at
    if last is not None:
        queries, at = queries[:, :, :, -last:], at[:, -last:]
    batch, heads, group, length, _ = queries.shape
    keys = held.keys.float().transpose(2, 3)  # [batch, kv_head, head_dim, key]
    step = block_size(batch * heads * group * keys.shape[-1], keys.device)
    for begin in range(0, length, step):
        visible = sees(at[:, begin : begin + step], held)
        # To look how far they see would wait for the device; the last few queries of a text see almost all of it.
        end = held.positions.shape[-1]
        if last is None:
            end = min(begin + step, end) if held.in_order else last_true(visible)
        visible, rows = visible[..., :end], queries[:, :, :, begin : begin + step]
        scores = ((rows * held.scaling).flatten(2, 3) @ keys[..., :end]).unflatten(2, (group, -1))
        hidden = ~visible[:, :, None]
        weights = scores.masked_fill_(hidden, MASKED).softmax(-1).masked_fill_(hidden, 0)
        yield weights, visible


def sees(at: Tensor, held: Held) -> Tensor:
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
