"""Attention of a long input over bounded heads on a GPU: two calls of flash attention, without a mask.

Sinks and window are read separately. The window's keys, held ones in text order and new ones after them, go to flash
attention with a sliding window (FlashAttention-2, arXiv 2307.08691), which costs the length of the input times the
window. The sinks go to a second call without a window. Both calls return the log-sum-exp of their scores, which merges
the two results into one softmax (as in Flash-Decoding).

Shapes are those of `attend`.
"""

import torch
from torch import Tensor

from kvcompress.cache.head_group import HeadGroup


def flash(
    query: Tensor, keys: Tensor, values: Tensor, left: int, right: int, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Return attention and log-sum-exp of `[batch, query, query_head, head_dim]` over `[batch, key, kv_head, head_dim]`.

    The last query is aligned with the last key. Each query sees the keys from `left` before its own place to `right`
    after it; -1 removes a bound. The log-sum-exp is `[batch, query_head, query]`.
    """
    out, total, *_ = torch.ops.aten._flash_attention_forward(
        query, keys, values, None, None, query.shape[1], keys.shape[1], 0.0, False, False,
        scale=scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    return out, total


def attend_window(group: HeadGroup, query: Tensor, keys: Tensor, values: Tensor, scale: float | None) -> Tensor:
    """Attend from the next queries to the keys of a bounded group without padding and to their own; stores nothing.

    The group must hold all its sinks.
    """
    batch, heads, of_head, new, size = query.shape
    rows = query.reshape(batch, heads * of_head, new, size).transpose(1, 2)
    held_keys, held_values = group.read() if group.seen else (keys[:, :, :0], values[:, :, :0])
    recent = _recent(held_keys, keys, group), _recent(held_values, values, group)
    out, total = flash(rows, *recent, group.retention.window - 1, 0, scale)
    if group.retention.sinks:
        front = slice(group.retention.sinks)
        sinks = held_keys[:, :, front].transpose(1, 2), held_values[:, :, front].transpose(1, 2)
        sink_out, sink_total = flash(rows, *sinks, -1, -1, scale)
        share = torch.sigmoid(total - sink_total).transpose(1, 2)[..., None]
        out = torch.lerp(sink_out.float(), out.float(), share).to(out.dtype)
    return out.transpose(1, 2).reshape(batch, heads, of_head, new, -1)


def _recent(held: Tensor, fresh: Tensor, group: HeadGroup) -> Tensor:
    """Return all columns in the window of a new query, in text order, `[batch, key, kv_head, head_dim]`."""
    (sinks, window), seen = group.retention[:2], group.seen
    pieces = [fresh]
    if max(seen - window + 1, sinks) < seen:
        begin, end = (max(seen - window + 1, sinks) - sinks) % window, (seen - 1 - sinks) % window + 1  # in the ring
        ring = held[:, :, sinks:]
        pieces = [ring[:, :, begin:end], fresh] if begin < end else [ring[:, :, begin:], ring[:, :, :end], fresh]
    return torch.cat(pieces, dim=2).transpose(1, 2)
