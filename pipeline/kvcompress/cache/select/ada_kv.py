"""A layer that divides its chosen keys among its heads by what they score in the prompt at hand.

After Feng et al. 2024, "Ada-KV", arXiv 2407.11550: of all older keys of a layer, those with the best scores are kept,
whichever head they belong to, so a head whose attention is spread gets more slots than one that looks at a few keys. Every
head first gets a floor. Sinks and window are left to all heads alike. Storage is ragged, so what a head does not get is
not held by anyone: the layer holds as many slots as if all heads chose the same number.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompress.cache.layer import CompressedLayer, Shared
from kvcompress.cache.select.layer import ChoosingLayer
from kvcompress.cache.select.prefill import Prompt
from kvcompress.core.errors import CacheUseError
from kvcompress.core.retention import Retention
from kvcompress.scores.topk import ranking


class AdaptiveLayer(ChoosingLayer):
    """Heads begin with the same `kept`; `floor` is the part of its slots below which no head falls, sinks and window
    counted.

    The scores of a prompt compare keys of different heads, so they should mean the same in all: shares of attention do
    (snapkv, expected_attention, accumulated_attention). Raises `CacheUseError` for more than one text at a time, as each
    would divide otherwise.
    """

    def __init__(
        self, kept: Retention, heads: int, shared: Shared, limit: int | None = None, floor: float = 0.2
    ) -> None:
        self.floor = floor
        super().__init__([kept] * heads, shared, limit)

    def keeps_like(self, other: CompressedLayer) -> bool:
        return isinstance(other, AdaptiveLayer) and self.floor == other.floor and super().keeps_like(other)

    def reset(self) -> None:
        super().reset()
        self._divide(self.wanted)

    def _store(self, keys: Tensor, values: Tensor) -> None:
        if self._in_prompt and keys.shape[2] > self._choosers[0][1].due:
            if keys.shape[0] > 1 or self.shared.padding.longest:
                raise CacheUseError(
                    "budgets that follow the prompt serve one text at a time, without padding; got"
                    f" {keys.shape[0]} rows, of which the longest padding is {self.shared.padding.longest}"
                )
            self._divide(self._divided(keys, values))
        super()._store(keys, values)

    def _divide(self, kept: Sequence[Retention]) -> None:
        """Let the heads, which hold nothing, keep this, in place of what they were asked to."""
        wanted, record = self.wanted, self._choosers[0][1].record
        self._keep(kept)
        self.wanted = wanted
        self.record_choices(record)

    def _divided(self, keys: Tensor, values: Tensor) -> list[Retention]:
        """What every head keeps of this prompt, `[1, kv_head, column, head_dim]`."""
        sinks, window, chosen, score = self.wanted[0]
        (_, group), columns = self._choosers[0], torch.arange(keys.shape[2], device=keys.device)
        prompt = Prompt([group], group.heads, keys, values, self._evidence_of_prompt())
        # Also what the window will hold has its share of a head's attention, and so lessens that of the others.
        held = prompt.held(group.score, slice(None), columns[None, None], (columns < sinks)[None, None])
        scores = group.score.of_candidates(held)[0, :, sinks : keys.shape[2] - window]
        least = max(int(self.floor * (sinks + window + chosen)) - sinks - window, 0)
        counts = divided(scores, chosen, min(least, chosen))
        return [Retention(sinks, window, count, score) if count else Retention(sinks, window) for count in counts]


def divided(scores: Tensor, each: int, least: int) -> list[int]:
    """How many keys every head gets where the best `each` x heads of all are kept: `[kv_head, key]` -> one count a head.

    The best `least` of every head are kept in any case.
    """
    heads, keys = scores.shape
    own = torch.full_like(scores, -float("inf")).scatter(-1, ranking(scores)[:, :least], float("inf"))
    best = ranking(torch.maximum(scores, own).flatten())[: heads * each]
    counts: list[int] = (best // keys).bincount(minlength=heads).tolist()
    return counts
