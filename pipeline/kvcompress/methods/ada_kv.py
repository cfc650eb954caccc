"""Budgets that follow the prompt: each layer keeps its best keys, whichever head they belong to.

Feng et al. 2024, "Ada-KV", arXiv 2407.11550. Nothing is measured beforehand; a head's budget is known once the prompt has
been read.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from kvcompress.cache.layer import CacheState, CompressedLayer, Prefill
from kvcompress.cache.ragged_cache import RaggedCache
from kvcompress.cache.ragged_layer import RaggedLayer
from kvcompress.cache.select.ada_kv import AdaptiveBudgets
from kvcompress.cache.select.layer import SelectLayer
from kvcompress.core.errors import InputError
from kvcompress.core.retention import FULL, Retention
from kvcompress.methods.compressor import UniformCompressor, require_count, require_share
from kvcompress.models.architecture import Architecture
from kvcompress.scores.selection_rule import SelectionRule


class AdaptiveCompressor(UniformCompressor):
    """Select keys with budgets that each layer divides among its heads at the end of the prompt.

    Serves one text at a time, after an exact prefill.

    Parameters
    ----------
    slots : keys that a KV head holds on average
    score : score that ranks the older keys [default: "snapkv"]
    sinks, window : first and last keys that every head keeps [default: 4, 64]
    floor : share of `slots` below which no head falls, sinks and window included [default: 0.2, as in the paper]
    selection_rule : options of the selections after the prompt, in which each head keeps its number of keys

    Raises `InputError` for sizes that leave no key to select, an unknown score, and a streaming prefill.
    """

    def __init__(
        self,
        slots: int,
        score: str = "snapkv",
        sinks: int = 4,
        window: int = 64,
        floor: float = 0.2,
        skip_layers: Iterable[int] = (),
        selection_rule: SelectionRule | None = None,
    ) -> None:
        sizes = require_count("sinks", sinks, 0), require_count("window", window, 1)
        require_count("slots", slots, sum(sizes) + 1)
        super().__init__(Retention(*sizes, slots - sum(sizes), score), skip_layers)
        self.selection_rule, self.budgets = (
            selection_rule or SelectionRule(),
            AdaptiveBudgets(require_share("floor", floor)),
        )
        self.selection_rule.score(score)

    def new_cache(self, config: Any, prefill: Prefill = "exact", prompt_length: int | None = None) -> RaggedCache:
        if prefill == "streaming":
            raise InputError("prefill is 'streaming', expected 'exact': budgets follow a prompt read to its end")
        return super().new_cache(config, prefill, prompt_length)

    def build_layers(self, architecture: Architecture, shared: CacheState) -> Sequence[CompressedLayer]:
        heads = architecture.num_key_value_heads // shared.shard.count
        return [
            RaggedLayer([FULL] * heads, shared, window)
            if index in self.skip_layers
            else SelectLayer([self.uniform] * heads, shared, window, self.budgets)
            for index, window in enumerate(architecture.sliding_windows)
        ]
