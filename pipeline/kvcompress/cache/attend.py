"""Attention over the contents of one head group. Knows no model.

The query heads of a KV head are laid out as additional query rows, so grouped-query attention needs no copy of K and V
for each query head. A decode step in which every slot is visible needs no mask. A longer input goes block by block: a
block sees the held keys and itself, then its keys are stored and the ring evicts. Memory is bounded by a block times the
capacity, whatever the length of the input. On a GPU, in half precision and without padding, flash attention computes
both patterns without a mask and takes the input whole.

Shapes in this file: query `[batch, kv_head, group, query, head_dim]`, new keys and values `[batch, kv_head, query,
head_dim]`, result as the query with the head size of the values.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from kvcompress.cache.flash_window import attend_window
from kvcompress.cache.head_group import HeadGroup
from kvcompress.cache.padding import Padding
from kvcompress.core.retention import FULL, Retention
from kvcompress.models.rotary import Rotation

BLOCK = 256  # queries in a block: bounds the mask and the copy of the held keys
LARGE_BLOCK = 1024  # on a GPU, where a block costs about thirty launches and all rows share one mask


@dataclass(frozen=True)
class AttendOptions:
    """Inputs of a layer's attention other than its groups.

    Parameters
    ----------
    padding : left padding of the batch
    scale : factor of the scores, None for head_dim ** -0.5
    dropout : dropout probability of the weights
    sliding_window : the model's own window; a query at p sees nothing before p - sliding_window + 1 [default: None]
    rotation : renumbers positions inside the cache; None keeps the positions of the text [default: None]
    """

    padding: Padding
    scale: float | None
    dropout: float = 0.0
    sliding_window: int | None = None
    rotation: Rotation | None = None

    def positions(self, start: int, end: int, device: torch.device) -> Tensor:
        """Return the real positions of the columns start...end, `[batch or 1, column]`; negative at pads."""
        columns = torch.arange(start, end, device=device)[None]
        pads = self.padding.on(device)
        return columns if pads is None else columns - pads


def sees(query: Tensor, key: Tensor, retention: Retention, sliding_window: int | None) -> Tensor:
    """Return the visible keys, bool `[..., query, key]`, from positions `[batch or 1, query]` and `[batch or 1, key]`.

    A key position of -1 is an empty slot. `Retention.sees` is the definition for a single pair.
    """
    query, key = query[:, :, None], key[:, None, :]
    visible = (key <= query) & (key >= 0)
    if not retention.unbounded:
        visible = visible & ((key < retention.sinks) | (key > query - retention.window))
    return visible if sliding_window is None else visible & (key > query - sliding_window)


def attend(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None, options: AttendOptions) -> Tensor:
    """Return the softmax attention of a group; `visible` is bool `[batch or 1, query, slot]`, None for all slots."""
    batch, heads, group, new, size = query.shape
    rows = query.reshape(batch, heads, group * new, size)
    mask = None if visible is None else _without_empty_rows(visible).repeat(1, group, 1)[:, None]
    out = scaled_dot_product_attention(
        rows, keys, values, attn_mask=mask, dropout_p=options.dropout, scale=options.scale
    )
    return out.view(batch, heads, group, new, -1)


def flash_serves(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Return whether flash attention can compute causal attention of the last columns without a mask."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    return query.is_cuda and half and keys.shape[-1] == values.shape[-1] <= 256 and keys.shape[-1] % 8 == 0


def attend_full(query: Tensor, keys: Tensor, values: Tensor, held: int, options: AttendOptions) -> Tensor:
    """Return the causal attention of the last columns of `keys`, `[batch, kv_head, held + query, head_dim]`."""
    batch, heads, group, new, size = query.shape
    plain, window = not options.padding.longest, options.sliding_window
    whole = plain and not held and (window is None or new <= window)
    if whole or (plain and window is None and flash_serves(query, keys, values)):
        out = scaled_dot_product_attention(
            query.reshape(batch, heads * group, new, size),
            keys,
            values,
            attn_mask=None if whole else causal_lower_right(new, held + new),
            dropout_p=options.dropout,
            scale=options.scale,
            is_causal=whole,
            enable_gqa=group > 1,
        )
        return out.view(batch, heads, group, new, -1)
    positions = options.positions(0, held + new, keys.device)
    pieces = []
    for begin in range(0, new, BLOCK):
        end = min(begin + BLOCK, new)
        visible = sees(positions[:, held + begin : held + end], positions[:, : held + end], FULL, window)
        block = query[:, :, :, begin:end]
        pieces.append(attend(block, keys[:, :, : held + end], values[:, :, : held + end], visible, options))
    return torch.cat(pieces, dim=3)


def attend_group(group: HeadGroup, query: Tensor, keys: Tensor, values: Tensor, options: AttendOptions) -> Tensor:
    """Attend from the next queries to the held keys and their own, store their keys, and evict."""
    new = query.shape[3]
    if new == 1:
        return _decode(group, query, keys, values, options)
    capacity, padding = group.capacity, options.padding
    if capacity is None or (group.seen + new <= capacity and not padding.longest):
        # Nothing is evicted on the way and the slots are in text order: store first, then attend in place.
        held = group.seen
        group.append(keys, values, padding)
        return attend_full(query, *((keys, values) if not held else group.read()), held, options)
    if _sees_one_window(group, keys, options) and flash_serves(query, keys, values):
        return _flash_window(group, query, keys, values, options)
    step = LARGE_BLOCK if query.is_cuda and not padding.longest else BLOCK
    # While the ring's writes are recorded, no two columns of one block may share a slot.
    step = min(step, group.retention.window) if group.recording else step
    pieces = []
    for begin in range(0, new, step):
        end = min(begin + step, new)
        block = query[:, :, :, begin:end], keys[:, :, begin:end], values[:, :, begin:end]
        pieces.append(_block(group, *block, options))
    return torch.cat(pieces, dim=3)


def _sees_one_window(group: HeadGroup, keys: Tensor, options: AttendOptions) -> bool:
    """Return whether every next query after the sinks sees exactly sinks and window, the same in all rows."""
    plain = options.sliding_window is None and options.rotation is None
    plain = plain and not options.padding.longest and not options.dropout
    return plain and not group.recording and group.seen + keys.shape[2] > group.retention.sinks


def _flash_window(group: HeadGroup, query: Tensor, keys: Tensor, values: Tensor, options: AttendOptions) -> Tensor:
    """Attend from the columns that are sinks as a block, then from all others at once."""
    pieces, front = [], max(group.retention.sinks - group.seen, 0)
    if front:
        pieces.append(_block(group, query[:, :, :, :front], keys[:, :, :front], values[:, :, :front], options))
        query, keys, values = query[:, :, :, front:], keys[:, :, front:], values[:, :, front:]
    pieces.append(attend_window(group, query, keys, values, options.scale))
    group.append(keys, values, options.padding)
    return torch.cat(pieces, dim=3) if front else pieces[0]


def sees_all(group: HeadGroup, position: int, options: AttendOptions) -> bool:
    """Return whether the query at column `position` sees every key its row holds, at the key's own rotation."""
    if options.rotation is not None and _renumbers(group, position):
        return False
    window, retention = options.sliding_window, group.retention
    if window is None or position < window:
        return True
    return not retention.sinks and not retention.unbounded and retention.window <= window


def _decode(group: HeadGroup, query: Tensor, keys: Tensor, values: Tensor, options: AttendOptions) -> Tensor:
    """Attend from one query: its key replaces the one that leaves the window, so every slot is visible."""
    padding, position = options.padding, group.seen
    group.append(keys, values, padding)
    if sees_all(group, position, options) and not group.needs_mask(padding):
        return attend(query, *group.read(), None, options)
    held_keys, held_values = group.read()
    at = options.positions(position, position + 1, keys.device)
    held_at = group.positions(padding, keys.device)
    return _attend_masked(group, position, query, held_keys, held_values, at, held_at, options)


def _block(group: HeadGroup, query: Tensor, keys: Tensor, values: Tensor, options: AttendOptions) -> Tensor:
    """Attend from a block of queries to the held keys and their own, before any held key is overwritten."""
    seen, end = group.seen, group.seen + keys.shape[2]
    at = options.positions(seen, end, keys.device)
    all_keys, all_values, all_at = keys, values, at
    if seen:
        held_keys, held_values = group.read()
        held_at = group.positions(options.padding, keys.device)
        all_keys, all_values = torch.cat((held_keys, keys), dim=2), torch.cat((held_values, values), dim=2)
        all_at = torch.cat((held_at.expand(at.shape[0], -1), at), dim=1)
    out = _attend_masked(group, end - 1, query, all_keys, all_values, at, all_at, options)
    group.append(keys, values, options.padding)
    return out


def _renumbers(group: HeadGroup, last: int) -> bool:
    """Return whether a query at column `last` is farther from the sinks in the text than in the cache."""
    return group.retention.sinks > 0 and group.capacity is not None and last >= group.capacity


def _attend_masked(
    group: HeadGroup,
    last: int,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    at: Tensor,
    keys_at: Tensor,
    options: AttendOptions,
) -> Tensor:
    """Attend from queries at positions `at` to keys at positions `keys_at`; `last` is the last query's column.

    With `options.rotation` positions are counted inside the cache (StreamingLLM, arXiv 2309.17453, section 3.2). Inside
    the window this changes no distance. Only the sinks come nearer: the query at p has the position
    c = min(p, capacity - 1) in the cache, so for the sinks it is rotated back by p - c.
    """
    visible = sees(at, keys_at, group.retention, options.sliding_window)
    if options.rotation is None or not _renumbers(group, last):
        return attend(query, keys, values, visible, options)
    assert group.capacity is not None
    batch, heads, of_head, new, size = query.shape
    nearer = options.rotation.turn(query, (group.capacity - 1 - at).clamp(max=0)[:, None, None, :])
    scale = size**-0.5 if options.scale is None else options.scale

    def scores(rows: Tensor) -> Tensor:
        return torch.matmul(rows.reshape(batch, heads, of_head * new, size), keys.transpose(2, 3)) * scale

    sink = (keys_at < group.retention.sinks)[:, None, None, :]
    hidden = ~_without_empty_rows(visible).repeat(1, of_head, 1)[:, None]
    weights = torch.where(sink, scores(nearer), scores(query)).masked_fill(hidden, float("-inf"))
    weights = torch.softmax(weights, dim=-1, dtype=torch.float32).to(values.dtype)
    return torch.matmul(weights, values).view(batch, heads, of_head, new, -1)


def _without_empty_rows(visible: Tensor) -> Tensor:
    """Show all keys to a query that sees none (a pad): its output is unused, but must not be NaN."""
    return visible | ~visible.any(dim=-1, keepdim=True)
