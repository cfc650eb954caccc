"""What a head's output loses under every way of using its slots that is priced: windows, and windows beside chosen keys."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompress.sensitivity.selection_outputs import Choice, Chosen, chosen_sums
from kvcompress.sensitivity.window_outputs import change, mixed, past_weights, window_sums


def slot_changes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    windows: Sequence[int],
    choices: Sequence[Choice],
    chosen: Sequence[Chosen],
    step: int,
    sinks: int,
    scaling: float,
    limit: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(changes `[window or choice, kv_head, group, query, value_dim]`, full output without the first axis), float32.

    As `window_changes`, and `chosen` are the keys of every choice, one moment for `step` queries. Windows come first.
    """
    weights, value = past_weights(query, key, scaling, limit), value.float()
    full = mixed(weights, value)
    every = sorted({*windows, *(choice.window for choice in choices)})
    near = dict(zip(every, window_sums(weights, value, every, sinks), strict=True))
    found = [change(near[window], full) for window in windows]
    for choice, keys in zip(choices, chosen, strict=True):
        kept, mass = near[choice.window]
        more, its_mass = chosen_sums(weights, value, keys, choice.window, step)
        found.append(change((kept + more, mass + its_mass), full))
    return torch.stack(found), full
