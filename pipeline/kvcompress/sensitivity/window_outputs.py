"""Attention output over sinks and a window instead of all keys, and outputs between full and windowed ones."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvcompress.sensitivity.attention_hook import LayerAttention

BLOCK = 128  # queries that attend together; each block reads its own sinks and window only


def windowed_output(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    sinks: int,
    scaling: float,
    sliding_window: int | None = None,
) -> Tensor:
    """Attention over the first `sinks` and last `window` keys, `[batch, query_head, query, value_dim]`; differentiable.

    query: `[batch, query_head, query, head_dim]`, the last queries of the text.
    key, value: `[batch, kv_head, key, dim]`, the whole text.
    sliding_window: the model's own [default: none].
    """
    keys, first = key.shape[2], key.shape[2] - query.shape[2]
    place = torch.arange(keys, device=query.device)
    found = []
    for start in range(first, keys, BLOCK):
        stop, low = min(start + BLOCK, keys), max(sinks, start - window + 1)
        near = torch.cat((place[:sinks], place[low:stop]))
        distance = place[start:stop, None] - near
        seen = (distance >= 0) & ((distance < window) | (near < sinks))
        if sliding_window is not None:
            seen &= distance < sliding_window
        keys_near, values_near = (torch.cat((one[:, :, :sinks], one[:, :, low:stop]), 2) for one in (key, value))
        rows = query[:, :, start - first : stop - first]
        grouped = query.shape[1] > key.shape[1]
        found.append(
            scaled_dot_product_attention(
                rows, keys_near, values_near, attn_mask=seen, scale=scaling, enable_gqa=grouped
            )
        )
    return torch.cat(found, 2)


def moved_output(attention: LayerAttention, window: int, sinks: int, gates: Tensor) -> Tensor:
    """Output moved from full (gate 0) to windowed (gate 1), `[batch, token, query_head, value_dim]`.

    gates: `[batch or 1, kv_head]`.
    """
    output, group = attention.output, attention.query.shape[1] // attention.key.shape[1]
    text = attention.query.float(), attention.key.float(), attention.value.float()
    settings = sinks, attention.scaling, attention.sliding_window
    # Below float32 the rounding of the output would exceed small changes.
    exact = output.dtype == torch.float32
    full = output.transpose(1, 2) if exact else windowed_output(*text, attention.key.shape[2], *settings)
    change = windowed_output(*text, window, *settings) - full
    gates = gates.to(output.device).repeat_interleave(group, 1)[:, :, None, None]
    return output + (gates * change).transpose(1, 2).to(output.dtype)
