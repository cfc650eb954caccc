"""Attention output over sinks and a window instead of all keys, for many windows at once.

With p the attention weights over the whole past and S_w the keys of window w (its last w keys and the sinks), the output
over S_w is sum_{k in S_w} p_k v_k / sum_{k in S_w} p_k: softmax over fewer keys is the same softmax, rescaled. The sets
are nested. Keys are added ring by ring from the nearest outwards, so every window costs only its own ring.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompress.collect.observer import hide

TINY = torch.finfo(torch.float32).tiny

Sums = tuple[Tensor, Tensor]  # over the same keys: sum of p_k v_k `[kv_head, group, query, value_dim]`, sum of p_k


def past_weights(query: Tensor, key: Tensor, scaling: float, sliding_window: int | None = None) -> Tensor:
    """Attention weights of the last queries of a text on all its keys, float32 `[kv_head, group, query, key]`.

    query: `[kv_head, group, query, head_dim]`; key: `[kv_head, key, head_dim]`.
    """
    kv_heads, group, length, _ = query.shape
    keys = key.shape[1]
    scores = torch.bmm(query.float().flatten(1, 2) * scaling, key.float().transpose(1, 2))
    hide(scores.view(kv_heads * group, length, keys), keys - length, sliding_window)
    return torch.softmax(scores, -1).view(kv_heads, group, length, keys)


def window_sums(weights: Tensor, value: Tensor, windows: Sequence[int], sinks: int) -> list[Sums]:
    """Sums over sinks and window, for every window in ascending order."""
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
    """Output over the keys of `sums` minus the full output."""
    return sums[0] / sums[1].clamp_min(TINY)[..., None] - full


def mixed(weights: Tensor, value: Tensor) -> Tensor:
    """Weights `[kv_head, group, query, key]` times values `[kv_head, key, dim]`: `[kv_head, group, query, dim]`."""
    return torch.bmm(weights.flatten(1, 2), value).unflatten(1, weights.shape[1:3])
