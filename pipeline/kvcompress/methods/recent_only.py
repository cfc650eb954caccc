"""Recent keys only: the control that shows what attention sinks are worth."""

from collections.abc import Iterable

from transformers.cache_utils import Cache

from kvcompress.cache.ragged_cache import RaggedCache
from kvcompress.core.retention import Retention
from kvcompress.methods.compressor import UniformCompressor, require_count


class RecentOnlyCompressor(UniformCompressor):
    """Keep the last `window_size` keys. Raises `InputError` for an empty window."""

    def __init__(self, window_size: int = 512, skip_layers: Iterable[int] = ()) -> None:
        super().__init__(Retention(0, require_count("window_size", window_size, 1)), skip_layers)


def recent_only(past_key_values: Cache, window_size: int = 512, skip_layers: Iterable[int] = ()) -> RaggedCache:
    """Compress a cache in one call."""
    return RecentOnlyCompressor(window_size, skip_layers).compress(past_key_values)
