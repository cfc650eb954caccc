"""From scores to slots."""

import torch
from torch import Tensor

from kvcompress.core.errors import InputError

WORST = torch.finfo(torch.float32).min


def best(scores: Tensor, count: int, exclude: Tensor | None = None) -> Tensor:
    """The slots of the `count` largest scores, ascending, int64 `[batch, kv_head, count]`.

    scores: `[batch, kv_head, key]`; exclude: bool `[batch or 1, kv_head or 1, key]`, slots not to choose (sinks and
    window, which stay anyway). Equal scores go to the lower slot, so the choice is the same everywhere; NaN is worst.
    Empty slots (-inf) are chosen only where nothing else is left. Raises `InputError` where fewer than `count` slots may
    be chosen; of what is excluded on an accelerator nothing is checked, as looking would wait for all of its work.
    """
    free = scores.shape[-1]
    if exclude is not None and exclude.numel() and exclude.device.type == "cpu":
        free -= int(exclude.sum(-1).max())
    if not 0 <= count <= free:
        raise InputError(f"{count} keys are to be chosen, expected 0 to {free}, the number there is to choose from")
    return ranking(scores, exclude)[..., :count].sort(dim=-1).values


def ranking(scores: Tensor, exclude: Tensor | None = None) -> Tensor:
    """The slots from the largest score to the smallest, int64 like `scores`; order and arguments as of `best`."""
    ranked = scores.float().nan_to_num(nan=WORST, neginf=WORST, posinf=float("inf"))
    if exclude is not None:
        ranked = ranked.masked_fill(exclude, -float("inf"))
    return ranked.sort(
        dim=-1, descending=True, stable=True
    ).indices  # topk promises no order among equals, nor is faster


def first(marked: Tensor, count: int) -> Tensor:
    """Indices of the first `count` marks along the last dimension, ascending; unmarked ones where there are fewer."""
    return (~marked).byte().sort(dim=-1, stable=True).indices[..., :count]
