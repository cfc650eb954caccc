"""Attention over what a group of KV heads holds: the arithmetic, free of any model.

The query heads of a KV head are laid out as more query rows of it, so grouped-query attention needs no copy of K and V
a query head. A decode step that finds every slot visible needs no mask. Longer inputs go block by block: a block sees
what is held and itself, then it is stored and the ring forgets, so memory is bounded by a block times the capacity
whatever the length of the input. On a GPU, in half precision and without padding, flash attention knows both patterns
and takes the input whole.

Shapes here: query `[batch, kv_head, group, query, head_dim]`, new keys and values `[batch, kv_head, query, head_dim]`,
result as query with the values' head size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from kvcompress.cache.flash_window import attend_windowed
from kvcompress.cache.head_group import Group
from kvcompress.cache.padding import Padding
from kvcompress.core.retention import FULL, Retention
from kvcompress.models.rotary import Rotation

BLOCK = 256  # queries a block: a mask of 256 rows, and at most 256 keys beside those held
LARGE_BLOCK = 1024  # on a GPU, where a block is some thirty launches, and one mask serves all rows of the batch


@dataclass(frozen=True)
class Reading:
    """What reading a layer depends on besides its groups.

    `limit` is the model's own sliding window (a query at p sees nothing before p - limit + 1), None without one;
    `rotation` renumbers positions inside the cache, None keeps those of the text; `scale` multiplies the scores.
    """

    padding: Padding
    scale: float | None
    dropout: float = 0.0
    limit: int | None = None
    rotation: Rotation | None = None

    def real(self, start: int, end: int, device: torch.device) -> Tensor:
        """Real positions of the columns start...end, `[batch or 1, column]`, negative at pads."""
        columns = torch.arange(start, end, device=device)[None]
        pads = self.padding.on(device)
        return columns if pads is None else columns - pads


def sees(query: Tensor, key: Tensor, kept: Retention, limit: int | None) -> Tensor:
    """Which keys a query sees: positions `[batch or 1, query]` and `[batch or 1, key]` -> bool `[.., query, key]`.

    A key position of -1 is an empty slot. `Retention.sees` says the same for one pair.
    """
    query, key = query[:, :, None], key[:, None, :]
    visible = (key <= query) & (key >= 0)
    if not kept.unbounded:
        visible = visible & ((key < kept.sinks) | (key > query - kept.window))
    return visible if limit is None else visible & (key > query - limit)


def attend(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None, reading: Reading) -> Tensor:
    """Softmax attention of every query head of a group; `visible` is bool `[batch or 1, query, slot]`, None for all."""
    batch, heads, group, new, size = query.shape
    rows = query.reshape(batch, heads, group * new, size)
    mask = None if visible is None else _finite(visible).repeat(1, group, 1)[:, None]
    out = scaled_dot_product_attention(
        rows, keys, values, attn_mask=mask, dropout_p=reading.dropout, scale=reading.scale
    )
    return out.view(batch, heads, group, new, -1)


def needs_no_mask(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether the device's flash attention knows causal attention of the last columns alone, and never makes a mask."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    return query.is_cuda and half and keys.shape[-1] == values.shape[-1] <= 256 and keys.shape[-1] % 8 == 0


def attend_all(query: Tensor, keys: Tensor, values: Tensor, held: int, reading: Reading) -> Tensor:
    """Causal attention of the last columns of `keys`, `[batch, kv_head, held + query, head_dim]` in text order."""
    batch, heads, group, new, size = query.shape
    if not held and not reading.padding.longest and (reading.limit is None or new <= reading.limit):
        out = scaled_dot_product_attention(
            query.reshape(batch, heads * group, new, size),
            keys,
            values,
            dropout_p=reading.dropout,
            scale=reading.scale,
            is_causal=True,
            enable_gqa=group > 1,
        )
        return out.view(batch, heads, group, new, -1)
    if not reading.padding.longest and reading.limit is None and needs_no_mask(query, keys, values):
        out = scaled_dot_product_attention(
            query.reshape(batch, heads * group, new, size),
            keys,
            values,
            attn_mask=causal_lower_right(new, held + new),
            dropout_p=reading.dropout,
            scale=reading.scale,
            enable_gqa=group > 1,
        )
        return out.view(batch, heads, group, new, -1)
    positions = reading.real(0, held + new, keys.device)
    pieces = []
    for begin in range(0, new, BLOCK):
        end = min(begin + BLOCK, new)
        visible = sees(positions[:, held + begin : held + end], positions[:, : held + end], FULL, reading.limit)
        block = query[:, :, :, begin:end]
        pieces.append(attend(block, keys[:, :, : held + end], values[:, :, : held + end], visible, reading))
    return torch.cat(pieces, dim=3)


def read(group: Group, query: Tensor, keys: Tensor, values: Tensor, reading: Reading) -> Tensor:
    """Let the next queries see what `group` holds and themselves, store their keys, and forget what leaves."""
    new = query.shape[3]
    if new == 1:
        return _decode(group, query, keys, values, reading)
    capacity, padding = group.capacity, reading.padding
    if capacity is None or (group.seen + new <= capacity and not padding.longest):
        # Nothing is forgotten on the way and the slots are in text order: store first, then read in place.
        held = group.seen
        group.append(keys, values, padding)
        return attend_all(query, *((keys, values) if not held else group.read()), held, reading)
    # While the ring's writes are recorded, no two columns of one block may share a slot.
    if _has_one_window(group, keys, reading) and needs_no_mask(query, keys, values):
        return _windowed(group, query, keys, values, reading)
    step = LARGE_BLOCK if query.is_cuda and not padding.longest else BLOCK
    step = min(step, group.kept.window) if group.recording else step
    pieces = []
    for begin in range(0, new, step):
        end = min(begin + step, new)
        block = query[:, :, :, begin:end], keys[:, :, begin:end], values[:, :, begin:end]
        pieces.append(_block(group, *block, reading))
    return torch.cat(pieces, dim=3)


def _has_one_window(group: Group, keys: Tensor, reading: Reading) -> bool:
    """Whether the next queries, beyond the sinks, see nothing but sinks and a window, the same in all rows."""
    plain = reading.limit is None and reading.rotation is None and not reading.padding.longest and not reading.dropout
    return plain and not group.recording and group.seen + keys.shape[2] > group.kept.sinks


def _windowed(group: Group, query: Tensor, keys: Tensor, values: Tensor, reading: Reading) -> Tensor:
    """The columns that are sinks first, as a block, then all others at once."""
    pieces, front = [], max(group.kept.sinks - group.seen, 0)
    if front:
        pieces.append(_block(group, query[:, :, :, :front], keys[:, :, :front], values[:, :, :front], reading))
        query, keys, values = query[:, :, :, front:], keys[:, :, front:], values[:, :, front:]
    pieces.append(attend_windowed(group, query, keys, values, reading.scale))
    group.append(keys, values, reading.padding)
    return torch.cat(pieces, dim=3) if front else pieces[0]


def sees_all(group: Group, position: int, reading: Reading) -> bool:
    """Whether the query at column `position` sees every key of its own row that the group then holds, unturned."""
    renumbered = reading.rotation is not None and _renumbers(group, position)
    return not renumbered and not _hides(group.kept, position, reading.limit)


def _decode(group: Group, query: Tensor, keys: Tensor, values: Tensor, reading: Reading) -> Tensor:
    """One query: its key takes the place of the one that leaves the window, and every slot is then visible."""
    padding, position = reading.padding, group.seen
    group.append(keys, values, padding)
    if sees_all(group, position, reading) and group.settled(padding):
        return attend(query, *group.read(), None, reading)
    held_keys, held_values = group.read()
    at = reading.real(position, position + 1, keys.device)
    held_at = group.positions(padding, keys.device)
    visible = sees(at, held_at, group.kept, reading.limit)
    if reading.rotation is not None and _renumbers(group, position):
        return _attend_renumbered(group.kept, query, held_keys, held_values, at, held_at, visible, reading)
    return attend(query, held_keys, held_values, visible, reading)


def _block(group: Group, query: Tensor, keys: Tensor, values: Tensor, reading: Reading) -> Tensor:
    """A block of queries over the held keys and their own, before any of the held are overwritten."""
    seen, end = group.seen, group.seen + keys.shape[2]
    at = reading.real(seen, end, keys.device)
    all_keys, all_values, all_at = keys, values, at
    if seen:
        held_keys, held_values = group.read()
        held_at = group.positions(reading.padding, keys.device)
        all_keys, all_values = torch.cat((held_keys, keys), dim=2), torch.cat((held_values, values), dim=2)
        all_at = torch.cat((held_at.expand(at.shape[0], -1), at), dim=1)
    visible = sees(at, all_at, group.kept, reading.limit)
    if reading.rotation is not None and _renumbers(group, end - 1):
        out = _attend_renumbered(group.kept, query, all_keys, all_values, at, all_at, visible, reading)
    else:
        out = attend(query, all_keys, all_values, visible, reading)
    group.append(keys, values, reading.padding)
    return out


def _hides(kept: Retention, position: int, limit: int | None) -> bool:
    """Whether the model's own sliding window may hide a key that the head holds from the query at `position`."""
    return limit is not None and position >= limit and (kept.sinks > 0 or kept.unbounded or kept.window > limit)


def _renumbers(group: Group, last: int) -> bool:
    """Whether a query at column `last` is farther from the sinks in the text than in the cache."""
    return group.kept.sinks > 0 and group.capacity is not None and last >= group.capacity


def _attend_renumbered(
    kept: Retention,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    at: Tensor,
    keys_at: Tensor,
    visible: Tensor,
    reading: Reading,
) -> Tensor:
    """As `attend`, with positions counted inside the cache (StreamingLLM, arXiv 2309.17453, section 3.2).

    Inside the window that changes no distance. Only the sinks come nearer: the query at p stands at
    c = min(p, capacity - 1) in the cache, so before it meets the sinks it is turned back by p - c. Scores are made with
    both queries and each key takes the one it is due.
    """
    assert reading.rotation is not None
    assert kept.capacity is not None
    batch, heads, group, new, size = query.shape
    nearer = reading.rotation.turn(query, (kept.capacity - 1 - at).clamp(max=0)[:, None, None, :])
    scale = size**-0.5 if reading.scale is None else reading.scale

    def scores(rows: Tensor) -> Tensor:
        return torch.matmul(rows.reshape(batch, heads, group * new, size), keys.transpose(2, 3)) * scale

    sink = (keys_at < kept.sinks)[:, None, None, :]
    hidden = ~_finite(visible).repeat(1, group, 1)[:, None]
    weights = torch.where(sink, scores(nearer), scores(query)).masked_fill(hidden, float("-inf"))
    weights = torch.softmax(weights, dim=-1, dtype=torch.float32).to(values.dtype)
    return torch.matmul(weights, values).view(batch, heads, group, new, -1)


def _finite(visible: Tensor) -> Tensor:
    """Let a query that sees nothing (a pad) see everything: its output is never read, but it must not be NaN."""
    return visible | ~visible.any(dim=-1, keepdim=True)
