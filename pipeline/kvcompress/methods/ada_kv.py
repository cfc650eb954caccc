"""Budgets that follow the prompt: each layer keeps its best keys, whichever head they belong to (Feng et al. 2024, "Ada-KV",
arXiv 2407.11550).

Nothing has to be measured beforehand, but what a head gets is known only once the prompt has been read.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from kvcompress.cache.layer import CompressedLayer, Prefill, Shared
from kvcompress.cache.ragged_cache import RaggedCache
from kvcompress.cache.select.ada_kv import AdaptiveLayer
from kvcompress.core.errors import InputError
from kvcompress.core.retention import Retention
from kvcompress.methods.compressor import UniformCompressor, require_count, require_share
from kvcompress.scores.selection_rule import SelectionRule


class AdaptiveCompressor(UniformCompressor):
    """`slots` keys a KV head on average: sinks, the last `window`, and older ones by `score`, divided among a layer's heads
    at the end of a prompt.

    floor: part of `slots` below which no head falls, sinks and window counted (the paper's safeguard, 0.2 there).
    choosing: how chosen keys are chosen anew afterwards, as many in every head as it got.

    One text at a time, exact prefill. Raises `InputError` for sizes that leave no key to choose, an unknown score, and a
    streaming prefill.
    """

    def __init__(
        self,
        slots: int,
        score: str = "snapkv",
        sinks: int = 4,
        window: int = 64,
        floor: float = 0.2,
        skip_layers: Iterable[int] = (),
        choosing: SelectionRule | None = None,
    ) -> None:
        sizes = require_count("sinks", sinks, 0), require_count("window", window, 1)
        require_count("slots", slots, sum(sizes) + 1)
        super().__init__(Retention(*sizes, slots - sum(sizes), score), skip_layers)
        self.choosing, self.floor = choosing or SelectionRule(), require_share("floor", floor)
        self.choosing.score(score)

    def new_cache(self, config: Any, prefill: Prefill = "exact", prompt_length: int | None = None) -> RaggedCache:
        if prefill == "streaming":
            raise InputError(
                "prefill is 'streaming', expected 'exact': budgets follow a prompt that has been read to its end"
            )
        return super().new_cache(config, prefill, prompt_length)

    def layer(self, kept: Sequence[Retention], shared: Shared, limit: int | None) -> CompressedLayer:
        if kept[0] != self.uniform:  # a layer that is skipped
            return super().layer(kept, shared, limit)
        return AdaptiveLayer(self.uniform, len(kept), shared, limit, self.floor)
