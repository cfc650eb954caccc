"""Budgets of a layer's heads, divided by what their keys score in the prompt at hand.

After Feng et al. 2024, "Ada-KV", arXiv 2407.11550: of all older keys of a layer, those with the best scores are kept,
whichever head they belong to. A head whose attention is spread gets more slots than one that looks at a few keys. Every
head first gets a floor. Sinks and window are the same in all heads. Storage is ragged, so the layer holds exactly as
many slots as with equal budgets.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress.cache.select.head_group import SelectGroup
from kvcompress.cache.select.prefill import PromptSelection
from kvcompress.cache.select.records import SelectionInputs
from kvcompress.core.errors import CacheUseError
from kvcompress.core.retention import Retention
from kvcompress.scores.topk import ranking


@dataclass(frozen=True)
class AdaptiveBudgets:
    """Division of a layer's selected keys among its heads; `floor` is a share of a head's slots, sinks and window included.

    Scores of keys in different heads are compared, so they should mean the same in all heads. Shares of attention do
    (snapkv, expected_attention, accumulated_attention).
    """

    floor: float = 0.2

    def divide(self, group: SelectGroup, keys: Tensor, values: Tensor, inputs: SelectionInputs) -> list[Retention]:
        """Return the retention of every head of `group`, from their prompt `[1, kv_head, column, head_dim]`.

        Raises `CacheUseError` for more than one row or padding, because each row would be divided differently.
        """
        if keys.shape[0] > 1 or inputs.padding.longest:
            raise CacheUseError(
                "budgets that follow the prompt serve one text at a time, without padding; got"
                f" {keys.shape[0]} rows with at most {inputs.padding.longest} pads"
            )
        sinks, window, chosen, score = group.requested
        columns = torch.arange(keys.shape[2], device=keys.device)
        prompt = PromptSelection([group], group.heads, keys, values, inputs)
        # The window's keys are among those scored: they take their share of a head's attention.
        stays = (columns < sinks)[None, None]
        held = prompt.score_inputs(group.score, slice(None), columns[None, None], stays)
        scores = group.score.of_candidates(held)[0, :, sinks : keys.shape[2] - window]
        least = max(int(self.floor * (sinks + window + chosen)) - sinks - window, 0)
        counts = divided(scores, chosen, min(least, chosen))
        return [Retention(sinks, window, count, score) if count else Retention(sinks, window) for count in counts]


def divided(scores: Tensor, each: int, least: int) -> Sequence[int]:
    """Return how many keys each head gets if the best `each` x heads of all scores `[kv_head, key]` are kept.

    The best `least` of every head are kept in any case.
    """
    heads, keys = scores.shape
    own = torch.full_like(scores, -float("inf")).scatter(-1, ranking(scores)[:, :least], float("inf"))
    best = ranking(torch.maximum(scores, own).flatten())[: heads * each]
    counts: list[int] = (best // keys).bincount(minlength=heads).tolist()
    return counts
