"""Attention among neighbours, regardless of order: half of Compactor's score (arXiv 2507.08143).

In a text whose queries are all at hand every query attends, without a causal mask, to the keys of its own chunk: late
keys are judged by as many queries as early ones. While streaming, keys older than the queries have none of their own;
they are attended by all queries at hand, together.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvcompress.ops import score_launchers
from kvcompress.scores.attention_received import MASKED, block_size
from kvcompress.scores.inputs import ScoreInputs

FEW = 64  # queries that are looked at without waiting for an accelerator, as those of a choice while decoding
OLD, ABSENT = -1, -2  # in place of a chunk's number: keys older than all queries; pads, empty slots, keys that stay


def non_causal(held: ScoreInputs, chunk: int, scale: float) -> Tensor:
    """Attention that each candidate received, in multiples of the mean over its chunk; float32 `[batch, kv_head, key]`.

    Chunks are `chunk` positions long, counted from the first query's. With n keys and m queries in a chunk the mean is
    m / n, which is 1 in a text without holes: there this is the plain sum over queries. Keys that stay are taken to be
    absent. Candidates in a chunk without queries get 0.
    """
    if held.whole:
        assert held.queries is not None
        if chunk <= score_launchers.LARGEST_CHUNK and score_launchers.can_launch(held.queries, held.keys):
            return score_launchers.among_neighbours(held.queries, held.keys, held.candidates, chunk, scale)
        return _of_a_text(held, chunk, scale)
    batch, heads, count = held.keys.shape[:3]
    queries, at = held.grouped_queries, held.at
    first = torch.where(at >= 0, at, at.amax()).amin(-1, keepdim=True)  # [batch or 1, 1]
    of_query = torch.where(at >= 0, (at - first).div(chunk, rounding_mode="floor"), ABSENT)
    of_key = (held.positions - first[:, None]).div(chunk, rounding_mode="floor").clamp_min(OLD)
    of_key = torch.where(held.candidates, of_key, ABSENT)
    if at.shape[1] <= FEW:
        return _of_few_queries(held, of_query, of_key, scale)
    scores = torch.zeros(batch, heads, count, dtype=torch.float32, device=held.keys.device)
    for part in of_key.unique().tolist():
        if part == ABSENT:
            continue
        chosen_keys = of_key == part
        chosen_queries = of_query >= 0 if part == OLD else of_query == part
        columns, rows = chosen_keys.any(0).any(0).nonzero()[:, 0], chosen_queries.any(0).nonzero()[:, 0]
        keys = held.keys[:, :, columns].float()
        scores[:, :, columns] += _received(
            queries[:, :, :, rows], keys, chosen_queries[:, rows], chosen_keys[:, :, columns], scale
        )
    return scores


def _of_few_queries(held: ScoreInputs, of_query: Tensor, of_key: Tensor, scale: float) -> Tensor:
    """The same without a look at which chunks there are, which would wait for the device: every query once among the old
    keys and once in its own chunk. of_query `[batch or 1, query]` and of_key `[batch, kv_head, key]` name chunks."""
    voting = of_query >= 0
    near = (of_query[:, None, :, None] == of_key[:, :, None]) & voting[:, None, :, None]
    old = (of_key == OLD)[:, :, None] & voting[:, None, :, None]
    allowed = torch.stack((old, near), 2)  # [batch, kv_head, 2, query, key]
    peers = torch.stack((voting[:, None].expand(-1, voting.shape[-1], -1), of_query[:, None] == of_query[..., None]), 1)
    share = allowed.sum(-1) / peers.sum(-1).clamp_min(1)[:, None]  # keys for each query that votes on them
    products = (held.grouped_queries * scale).flatten(2, 3) @ held.keys.float().mT
    products = products.unflatten(2, (-1, 1, voting.shape[-1]))  # [batch, kv_head, group, 1, query, key]
    weights = products.masked_fill(~allowed[:, :, None], MASKED).softmax(-1)
    votes = share.flatten(2).repeat(1, 1, products.shape[2])[:, :, None] / products.shape[2]
    return (votes @ weights.flatten(2, 4))[:, :, 0]


def _of_a_text(held: ScoreInputs, chunk: int, scale: float) -> Tensor:
    """The same for a text without holes, as many chunks at a time as a block may hold."""
    batch, count = held.keys.shape[0], held.keys.shape[2]
    more = -count % chunk
    queries, keys = (
        pad(tensor, (0, 0, 0, more)).unflatten(-2, (-1, chunk)).movedim(-3, 1)
        for tensor in (held.grouped_queries, held.keys.float())
    )  # [batch, chunk's number, kv_head, group, chunk, head_dim], and without group
    asks = (torch.arange(count + more, device=keys.device) < count).unflatten(0, (-1, chunk))
    there = pad(held.candidates, (0, more)).unflatten(-1, (-1, chunk)).movedim(-2, 1)  # [batch, number, kv_head, chunk]
    step = max(1, block_size(batch * queries.shape[2] * queries.shape[3] * chunk, keys.device) // chunk)
    found = []
    for begin in range(0, keys.shape[1], step):
        part = slice(begin, begin + step)
        found.append(
            _received(
                queries[:, part].flatten(0, 1),
                keys[:, part].flatten(0, 1),
                asks[part].repeat(batch, 1),
                there[:, part].flatten(0, 1),
                scale,
            ).unflatten(0, (batch, -1))
        )
    return torch.cat(found, 1).movedim(1, 2).flatten(2)[..., :count]


def _received(queries: Tensor, keys: Tensor, asks: Tensor, there: Tensor, scale: float) -> Tensor:
    """Mean attention of the queries that ask, `[batch or 1, query]`, on the keys that are there, times their number."""
    total = torch.zeros(keys.shape[:3], device=keys.device)
    group, hidden = queries.shape[2], ~there
    asking = asks[:, None, None].float() / group
    step = block_size(queries.shape[0] * queries.shape[1] * group * keys.shape[2], keys.device)
    for begin in range(0, queries.shape[3], step):
        part = slice(begin, begin + step)
        scores = (queries[:, :, :, part] * scale).flatten(2, 3) @ keys.transpose(2, 3)
        weights = scores.masked_fill_(hidden[:, :, None], MASKED).softmax(-1)
        total += (asking[..., part].repeat(1, 1, 1, group) @ weights)[:, :, 0]
    return total.masked_fill(hidden, 0) * there.sum(-1, keepdim=True) / asks.sum(-1).clamp_min(1)[:, None, None]
