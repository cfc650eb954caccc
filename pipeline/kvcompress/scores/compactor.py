"""Compactor: leverage of keys, blended with attention inside chunks (Chari and Van Durme 2025, arXiv 2507.08143).

The leverage of a row of a matrix X is its entry on the diagonal of X (X'X)^-1 X', the influence of the row on its own
fit by all rows. It is 1 for a key in a direction of its own and small for a key with many similar ones. A random
projection of the head's dimensions to fewer approximates it and makes X'X smaller.

Attention inside a chunk has no causal mask, so late keys are seen by as many queries as early ones. In a text whose
queries are all available, every query attends to the keys of its own chunk. While streaming, keys older than the
queries form one chunk, which all queries attend to.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import pad

from kvcompress.core.errors import InputError
from kvcompress.ops import score_launchers
from kvcompress.scores.attention_received import MASKED, block_size, pool
from kvcompress.scores.base import Score, require_at_least, require_odd
from kvcompress.scores.inputs import ScoreInputs

PART = 512  # keys whose products one program sums
FEW = 64  # queries for which the device is not waited for, such as those of a selection while decoding
OLD, ABSENT = -1, -2  # chunk numbers of keys older than all queries, and of pads, empty slots and keys that stay


@dataclass(frozen=True)
class Leverage(Score):
    """blend z(leverage of k) + z(attention on k inside its chunk, times |v|), with z(x) = (x - mean) / deviation.

    Leverage is that of the keys before rotation, minus their mean, projected by a Gaussian matrix. Attention is that
    of `chunk_attention`, pooled over neighbours. z is taken within a KV head. Keys that stay are left out everywhere:
    vectors and attention of the sinks are so large that the other keys would hardly differ.

    Parameters
    ----------
    sketch: dimensions after projection. A head with no more dimensions is not projected, and its leverage is exact.
    ridge: added to the diagonal of X'X, so that it can be inverted where keys are few or alike.
    blend: weight of leverage against attention. The authors' engine uses 0.5; their reference implementation uses the
        share of keys to be removed.
    chunk: positions in a chunk.
    scale: multiplies the products of queries and keys inside a chunk. The authors' programs use 1, which is sharper
        than the model's own attention by head_dim ** 0.5; None takes the model's scaling.
    kernel: keys that attention is pooled over, odd.
    unrotate: use keys before rotation. Without it (for models whose rotary embedding is unknown, or that have none)
        keys are used as cached.
    seed: seed of the random projection, the same for all heads and layers.
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

    def rank(self, inputs: ScoreInputs) -> Tensor:
        return self.blended(inputs, self.attention(inputs))

    @torch.no_grad()
    def of_prefixes(self, inputs: ScoreInputs, lengths: Iterable[int]) -> Iterator[Tensor]:
        self.require_inputs(inputs)
        whole = self.attention(inputs)  # complete chunks do not depend on what follows
        for length in lengths:
            done = length // self.chunk * self.chunk
            attention = [whole[..., :done]]
            if done < length:
                attention.append(self.attention(inputs.between(done, length)))
            yield self.blended(inputs.between(0, length), torch.cat(attention, -1))

    def attention(self, inputs: ScoreInputs) -> Tensor:
        return chunk_attention(inputs, self.chunk, inputs.scaling if self.scale is None else self.scale)

    def blended(self, inputs: ScoreInputs, attention: Tensor) -> Tensor:
        """Blend of leverage and of `attention` inside the chunks, `[batch, kv_head, key]`."""
        attention = attention * vector_norm(inputs.values, dim=-1, dtype=torch.float32)
        places = inputs.positions.where(inputs.candidates, -1)
        attention = pool(attention, places, self.kernel // 2, "mean", inputs.in_order)
        leverage, attention = standardised(torch.stack((self.leverage(inputs), attention)), inputs.candidates)
        return self.blend * leverage + attention

    def leverage(self, inputs: ScoreInputs) -> Tensor:
        """Leverage of each candidate among the candidates, float32 `[batch, kv_head, key]`."""
        keys, number = self.projected(inputs), inputs.candidates.sum(-1).clamp_min(1)[..., None]
        # In float32 the factor of X'X loses directions that only a few unusual keys have, and those keys matter most.
        exact = keys.double()
        total, products = sums_and_products(exact)
        mean = total / number
        products -= number[..., None] * mean[..., None] * mean[..., None, :]
        unit = torch.eye(keys.shape[-1], dtype=exact.dtype, device=exact.device)
        # The ridge makes X'X positive definite for any finite keys; checking the result would wait for the device.
        factor = torch.linalg.cholesky_ex(products + self.ridge * unit).L
        inverse = torch.linalg.solve_triangular(factor.mT, unit, upper=True)
        if score_launchers.can_launch(inputs.keys):
            return score_launchers.squared_lengths(keys, mean.float(), inverse.float())
        return ((exact - mean[..., None, :]) @ inverse).square().sum(-1).float()

    def projected(self, inputs: ScoreInputs) -> Tensor:
        """Keys before rotation, projected, float32 `[batch, kv_head, key, sketch]`; 0 except for candidates."""
        size, turn = inputs.keys.shape[-1], inputs.rotation if self.unrotate else None
        matrix = gaussian(size, self.sketch, self.seed, inputs.keys.device) if self.sketch < size else None
        if turn and matrix is not None and inputs.in_order and score_launchers.can_launch(inputs.keys):
            return score_launchers.turned_back(inputs.keys, inputs.candidates, turn, matrix)
        keys = inputs.keys.float()
        keys = turn.turn(keys, -inputs.positions) if turn else keys
        keys = keys if matrix is None else keys @ matrix
        return keys.masked_fill(~inputs.candidates[..., None], 0)


def sums_and_products(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the rows of X `[.., row, size]`, and X'X.

    Both are summed in parts, because a GPU multiplies few long matrices on few of its processors.
    """
    parts = rows.shape[-2] // PART
    whole, rest = rows[..., : parts * PART, :].unflatten(-2, (parts, PART)), rows[..., parts * PART :, :]
    return whole.sum(-2).sum(-2) + rest.sum(-2), (whole.mT @ whole).sum(-3) + rest.mT @ rest


@lru_cache(maxsize=8)
def gaussian(size: int, sketch: int, seed: int, device: torch.device) -> Tensor:
    """Random projection, `[size, sketch]`."""
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that every device gets the same numbers
    return (torch.randn(size, sketch, generator=generator) / sketch**0.5).to(device)


def standardised(scores: Tensor, there: Tensor) -> Tensor:
    """Scale scores `[.., batch, kv_head, key]` to zero mean and unit deviation over the keys `there` in a head."""
    number = there.sum(-1, keepdim=True).clamp_min(1)
    centred = scores.masked_fill(~there, 0)
    centred = (centred - centred.sum(-1, keepdim=True) / number).masked_fill(~there, 0)
    deviation = (centred.square().sum(-1, keepdim=True) / number).sqrt()
    return centred / deviation.clamp_min(1e-6)


def chunk_attention(inputs: ScoreInputs, chunk: int, scale: float) -> Tensor:
    """Attention that each candidate receives, in multiples of the mean over its chunk; float32 `[batch, kv_head, key]`.

    Chunks are `chunk` positions long, counted from the first query's position. With n keys and m queries in a chunk
    the mean is m / n. In a text without gaps that is 1 and the result is the plain sum over queries. Keys that stay
    count as absent. Candidates in a chunk without queries get 0.
    """
    if inputs.whole:
        assert inputs.queries is not None
        if chunk <= score_launchers.LARGEST_CHUNK and score_launchers.can_launch(inputs.queries, inputs.keys):
            return score_launchers.among_neighbours(inputs.queries, inputs.keys, inputs.candidates, chunk, scale)
        return _in_text(inputs, chunk, scale)
    batch, heads, count = inputs.keys.shape[:3]
    queries, at = inputs.grouped_queries, inputs.at
    first = torch.where(at >= 0, at, at.amax()).amin(-1, keepdim=True)  # [batch or 1, 1]
    of_query = torch.where(at >= 0, (at - first).div(chunk, rounding_mode="floor"), ABSENT)
    of_key = (inputs.positions - first[:, None]).div(chunk, rounding_mode="floor").clamp_min(OLD)
    of_key = torch.where(inputs.candidates, of_key, ABSENT)
    if at.shape[1] <= FEW:
        return _of_few_queries(inputs, of_query, of_key, scale)
    scores = torch.zeros(batch, heads, count, dtype=torch.float32, device=inputs.keys.device)
    for number in of_key.unique().tolist():
        if number == ABSENT:
            continue
        there = of_key == number
        asks = of_query >= 0 if number == OLD else of_query == number
        columns, rows = there.any(0).any(0).nonzero()[:, 0], asks.any(0).nonzero()[:, 0]
        keys = inputs.keys[:, :, columns].float()
        scores[:, :, columns] += _received(queries[:, :, :, rows], keys, asks[:, rows], there[:, :, columns], scale)
    return scores


def _of_few_queries(inputs: ScoreInputs, of_query: Tensor, of_key: Tensor, scale: float) -> Tensor:
    """Attention without reading which chunks exist, which would wait for the device.

    Every query attends once to the old keys and once to its own chunk. of_query `[batch or 1, query]` and of_key
    `[batch, kv_head, key]` are chunk numbers.
    """
    asking = of_query >= 0
    near = (of_query[:, None, :, None] == of_key[:, :, None]) & asking[:, None, :, None]
    old = (of_key == OLD)[:, :, None] & asking[:, None, :, None]
    allowed = torch.stack((old, near), 2)  # [batch, kv_head, 2, query, key]
    peers = torch.stack((asking[:, None].expand(-1, asking.shape[-1], -1), of_query[:, None] == of_query[..., None]), 1)
    share = allowed.sum(-1) / peers.sum(-1).clamp_min(1)[:, None]  # keys for each query that attends to them
    products = (inputs.grouped_queries * scale).flatten(2, 3) @ inputs.keys.float().mT
    products = products.unflatten(2, (-1, 1, asking.shape[-1]))  # [batch, kv_head, group, 1, query, key]
    weights = products.masked_fill(~allowed[:, :, None], MASKED).softmax(-1)
    factors = share.flatten(2).repeat(1, 1, products.shape[2])[:, :, None] / products.shape[2]
    return (factors @ weights.flatten(2, 4))[:, :, 0]


def _in_text(inputs: ScoreInputs, chunk: int, scale: float) -> Tensor:
    """Attention in a text without gaps, as many chunks at a time as fit a block."""
    batch, count = inputs.keys.shape[0], inputs.keys.shape[2]
    more = -count % chunk
    queries, keys = (
        pad(tensor, (0, 0, 0, more)).unflatten(-2, (-1, chunk)).movedim(-3, 1)
        for tensor in (inputs.grouped_queries, inputs.keys.float())
    )  # [batch, chunk's number, kv_head, group, chunk, head_dim], and without group
    asks = (torch.arange(count + more, device=keys.device) < count).unflatten(0, (-1, chunk))
    there = (
        pad(inputs.candidates, (0, more)).unflatten(-1, (-1, chunk)).movedim(-2, 1)
    )  # [batch, number, kv_head, chunk]
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
    """Mean attention of the queries with `asks` `[batch or 1, query]` to the keys `there`, times their number."""
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
