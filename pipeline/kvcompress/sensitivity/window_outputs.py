"""What a head's output loses when it sees only sinks and a window: for many windows at once, block by block.

With p the attention weights over the whole past and S_w the keys that window w leaves (its last w keys and the sinks),
the windowed output is sum_{k in S_w} p_k v_k / sum_{k in S_w} p_k: softmax over fewer keys is the same softmax, rescaled.
The sets are nested, so one pass adds the keys ring by ring, from the nearest outwards, and every window costs only its
own ring.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompress.collect.observer import hide

TINY = torch.finfo(torch.float32).tiny

Sums = tuple[Tensor, Tensor]  # sum of p_k v_k `[kv_head, group, query, value_dim]` and of p_k, over the same keys


def window_changes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    windows: Sequence[int],
    sinks: int,
    scaling: float,
    limit: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(changes `[window, kv_head, group, query, value_dim]`, full output without the first axis), float32.

    query: `[kv_head, group, query, head_dim]`, the last queries of the text; key, value: `[kv_head, key, dim]`, the whole
    text. A change is windowed minus full output. `windows` ascend; `limit` is the model's own sliding window.
    """
    weights, value = past_weights(query, key, scaling, limit), value.float()
    full = mixed(weights, value)
    return torch.stack([change(sums, full) for sums in window_sums(weights, value, windows, sinks)]), full


def past_weights(query: Tensor, key: Tensor, scaling: float, limit: int | None = None) -> Tensor:
    """Attention weights of the last queries of a text on all of it, float32 `[kv_head, group, query, key]`."""
    kv_heads, group, length, _ = query.shape
    keys = key.shape[1]
    scores = torch.bmm(query.float().flatten(1, 2) * scaling, key.float().transpose(1, 2))
    hide(scores.view(kv_heads * group, length, keys), keys - length, limit)
    return torch.softmax(scores, -1).view(kv_heads, group, length, keys)


def window_sums(weights: Tensor, value: Tensor, windows: Sequence[int], sinks: int) -> list[Sums]:
    """The sums over sinks and window, for every window; `windows` ascend."""
    length, keys = weights.shape[2:]
    first = keys - length
    kept, mass = mixed(weights[..., :sinks], value[:, :sinks]), weights[..., :sinks].sum(-1)
    position = torch.arange(first, keys, device=weights.device)
    found, inner = [], 0
    for outer in windows:
        low, high = max(sinks, first - outer + 1), keys - inner  # keys at distances inner ... outer - 1 of any query
        if low < high:
            distance = position[:, None] - torch.arange(low, high, device=weights.device)
            ring = weights[..., low:high] * ((distance >= inner) & (distance < outer))
            kept = kept + mixed(ring, value[:, low:high])
            mass = mass + ring.sum(-1)
        found.append((kept, mass))
        inner = outer
    return found


def change(sums: Sums, full: Tensor) -> Tensor:
    """Output over the keys that are left, minus the full output."""
    return sums[0] / sums[1].clamp_min(TINY)[..., None] - full


def mixed(weights: Tensor, value: Tensor) -> Tensor:
    """Weights `[kv_head, group, query, key]` times values `[kv_head, key, dim]`: `[kv_head, group, query, dim]`."""
    return torch.bmm(weights.flatten(1, 2), value).unflatten(1, weights.shape[1:3])
