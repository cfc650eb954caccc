"""Slots of the largest scores."""

import torch
from torch import Tensor

from kvcompress.core.errors import InputError

WORST = torch.finfo(torch.float32).min


def best(scores: Tensor, count: int, exclude: Tensor | None = None) -> Tensor:
    """Return the slots of the `count` largest scores, ascending, int64 `[batch, kv_head, count]`.

    Equal scores go to the lower slot, so the result is the same on every device. NaN ranks last. Empty slots (-inf) are
    taken only where nothing else is left.

    scores: `[batch, kv_head, key]`.
    exclude: bool `[batch or 1, kv_head or 1, key]`, slots not to take (sinks and window, which stay anyway).

    Raises `InputError` if fewer than `count` slots are available. `exclude` is not read for this on an accelerator,
    where that would wait for all work.
    """
    free = scores.shape[-1]
    if exclude is not None and exclude.numel() and exclude.device.type == "cpu":
        free -= int(exclude.sum(-1).max())
    if not 0 <= count <= free:
        raise InputError(f"{count} keys are to be selected, expected 0 to {free}, the number of candidates")
    return ranking(scores, exclude)[..., :count].sort(dim=-1).values


def ranking(scores: Tensor, exclude: Tensor | None = None) -> Tensor:
    """Return slots from the largest score to the smallest, int64 like `scores`, with the rules of `best`."""
    ranked = scores.float().nan_to_num(nan=WORST, neginf=WORST, posinf=float("inf"))
    if exclude is not None:
        ranked = ranked.masked_fill(exclude, -float("inf"))
    # torch.topk promises no order among equal scores, and is not faster.
    return ranked.sort(dim=-1, descending=True, stable=True).indices


def first(marked: Tensor, count: int) -> Tensor:
    """Return indices of the first `count` marks in the last dimension, ascending, then of unmarked entries."""
    return (~marked).byte().sort(dim=-1, stable=True).indices[..., :count]
