"""Methods that choose keys by their content: the common part of the two L2 baselines."""

from collections.abc import Iterable, Sequence
from typing import Any

from kvcompress.cache.evicting_layer import Chooser, SelectingLayer
from kvcompress.cache.layer import CompressedLayer, Prefill, Shared
from kvcompress.cache.ragged_cache import RaggedCache
from kvcompress.cache.ragged_layer import RaggedLayer
from kvcompress.core.errors import InputError
from kvcompress.core.retention import FULL
from kvcompress.methods.compressor import Compressor
from kvcompress.models.architecture import Architecture


class SelectingCompressor(Compressor):
    """Keeps what `choose` picks after every forward pass, in all layers but `skip_layers`."""

    def __init__(self, choose: Chooser, skip_layers: Iterable[int]) -> None:
        super().__init__(skip_layers)
        self.choose = choose

    def layers(self, shape: Architecture, shared: Shared) -> Sequence[CompressedLayer]:
        heads = shape.num_key_value_heads // shared.shard.count
        return [
            RaggedLayer([FULL] * heads, shared, limit)
            if index in self.skip_layers
            else SelectingLayer(heads, shared, self.choose, limit)
            for index, limit in enumerate(shape.sliding_windows)
        ]

    def new_cache(self, config: Any, prefill: Prefill = "exact", prompt_length: int | None = None) -> RaggedCache:
        if prefill != "exact" or prompt_length is not None:
            raise InputError(
                "a method that ranks keys after every forward pass has no streaming prefill and no prompt_length:"
                f" expected prefill='exact' alone, got {prefill!r} and {prompt_length}"
            )
        return super().new_cache(config, prefill)
