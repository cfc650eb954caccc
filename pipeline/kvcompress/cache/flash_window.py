"""A long input over bounded heads on a GPU: two calls of flash attention, however long it is, and no mask.

Sinks and window are read apart. The window's keys, those held put into text order and the new ones after them, go to
flash attention with a sliding window (FlashAttention-2, arXiv 2307.08691), whose cost is the input's length times the
window; the sinks to a second call without one. Both return the logarithm of their sum of weights, by which the two
results are joined into one softmax (as in Flash-Decoding).

Shapes are those of `reading`.
"""

import torch
from torch import Tensor

from kvcompress.cache.head_group import Group


def flash(
    query: Tensor, keys: Tensor, values: Tensor, left: int, right: int, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attention of `[batch, query, query_head, head_dim]` over `[batch, key, kv_head, head_dim]`, and log-sum-exp.

    The last query stands at the last key; each sees the keys from `left` before its own place to `right` after it,
    without a bound where one is -1. The log-sum-exp is `[batch, query_head, query]`.
    """
    out, total, *_ = torch.ops.aten._flash_attention_forward(
        query, keys, values, None, None, query.shape[1], keys.shape[1], 0.0, False, False,
        scale=scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    return out, total


def attend_windowed(group: Group, query: Tensor, keys: Tensor, values: Tensor, scale: float | None) -> Tensor:
    """The next queries over what a bounded group of unpadded rows holds and over themselves; nothing is stored.

    All sinks have to be held already.
    """
    batch, heads, of_head, new, size = query.shape
    rows = query.reshape(batch, heads * of_head, new, size).transpose(1, 2)
    held_keys, held_values = group.read() if group.seen else (keys[:, :, :0], values[:, :, :0])
    recent = _recent(held_keys, keys, group), _recent(held_values, values, group)
    out, total = flash(rows, *recent, group.kept.window - 1, 0, scale)
    if group.kept.sinks:
        front = slice(group.kept.sinks)
        sinks = held_keys[:, :, front].transpose(1, 2), held_values[:, :, front].transpose(1, 2)
        sink_out, sink_total = flash(rows, *sinks, -1, -1, scale)
        share = torch.sigmoid(total - sink_total).transpose(1, 2)[..., None]
        out = torch.lerp(sink_out.float(), out.float(), share).to(out.dtype)
    return out.transpose(1, 2).reshape(batch, heads, of_head, new, -1)


def _recent(held: Tensor, fresh: Tensor, group: Group) -> Tensor:
    """All columns in a new query's window, those of the ring in text order, `[batch, key, kv_head, head_dim]`."""
    (sinks, window), seen = group.kept[:2], group.seen
    pieces = [fresh]
    if max(seen - window + 1, sinks) < seen:
        begin, end = (max(seen - window + 1, sinks) - sinks) % window, (seen - 1 - sinks) % window + 1  # in the ring
        ring = held[:, :, sinks:]
        pieces = [ring[:, :, begin:end], fresh] if begin < end else [ring[:, :, begin:], ring[:, :, :end], fresh]
    return torch.cat(pieces, dim=2).transpose(1, 2)
