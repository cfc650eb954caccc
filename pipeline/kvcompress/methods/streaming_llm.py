"""StreamingLLM: attention sinks and a recent window, the same for every head (Xiao et al. 2024, arXiv 2309.17453)."""

from collections.abc import Iterable
from typing import Any

from transformers.cache_utils import Cache

from kvcompress.cache.ragged_cache import RaggedCache
from kvcompress.core.retention import Retention
from kvcompress.methods.compressor import Positions, UniformCompressor, require_count


class StreamingLLMCompressor(UniformCompressor):
    """Keep the first `start_size` and the last `recent_size` keys.

    The paper counts positions inside the cache (`positions="cache"`), so no distance exceeds the cache size and a model
    can run past its trained context. The default keeps the positions of the text, as the other methods do. Raises
    `InputError` for a negative start or an empty window.
    """

    def __init__(
        self,
        start_size: int = 4,
        recent_size: int = 508,
        positions: Positions = "original",
        skip_layers: Iterable[int] = (),
    ) -> None:
        sizes = require_count("start_size", start_size, 0), require_count("recent_size", recent_size, 1)
        super().__init__(Retention(*sizes), skip_layers, positions)


def streaming_llm(past_key_values: Cache, start_size: int = 4, recent_size: int = 508, **options: Any) -> RaggedCache:
    """Compress a cache in one call; `options` are those of `StreamingLLMCompressor`, and `config`."""
    config = options.pop("config", None)
    return StreamingLLMCompressor(start_size, recent_size, **options).compress(past_key_values, config=config)
