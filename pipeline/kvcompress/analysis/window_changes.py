"""What a head's output loses when it sees only sinks and a window: for many windows at once, block by block.

With p the attention weights over the whole past and S_w the keys that window w leaves (its last w keys and the sinks),
the windowed output is sum_{k in S_w} p_k v_k / sum_{k in S_w} p_k: softmax over fewer keys is the same softmax, rescaled.
The sets are nested, so one pass adds the keys ring by ring, from the nearest outwards, and every window costs only its
own ring.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompress.analysis.observe import hide

TINY = torch.finfo(torch.float32).tiny


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
    kv_heads, group, length, _ = query.shape
    keys = key.shape[1]
    first = keys - length
    scores = torch.bmm(query.float().flatten(1, 2) * scaling, key.float().transpose(1, 2))
    hide(scores.view(kv_heads * group, length, keys), first, limit)
    weights = torch.softmax(scores, -1).view(kv_heads, group, length, keys)
    value = value.float()
    full = mixed(weights, value)
    kept, mass = mixed(weights[..., :sinks], value[:, :sinks]), weights[..., :sinks].sum(-1)
    position = torch.arange(first, keys, device=key.device)
    changes, inner = [], 0
    for outer in windows:
        low, high = max(sinks, first - outer + 1), keys - inner  # keys at distances inner ... outer - 1 of any query
        if low < high:
            distance = position[:, None] - torch.arange(low, high, device=key.device)
            ring = weights[..., low:high] * ((distance >= inner) & (distance < outer))
            kept = kept + mixed(ring, value[:, low:high])
            mass = mass + ring.sum(-1)
        changes.append(kept / mass.clamp_min(TINY)[..., None] - full)
        inner = outer
    return torch.stack(changes), full


def mixed(weights: Tensor, value: Tensor) -> Tensor:
    """Weights `[kv_head, group, query, key]` times values `[kv_head, key, dim]`: `[kv_head, group, query, dim]`."""
    return torch.bmm(weights.flatten(1, 2), value).unflatten(1, weights.shape[1:3])
