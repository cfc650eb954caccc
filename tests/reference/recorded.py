"""What the heads of a cache choose, noted for the oracle to go by."""

from collections.abc import Iterator
from contextlib import contextmanager

from kvcompress.cache.ragged_cache import RaggedCache
from kvcompress.cache.select.layer import ChoosingLayer
from kvcompress.cache.select.record import Choices


@contextmanager
def recorded_choices(cache: RaggedCache) -> Iterator[Choices]:
    """Note, layer by layer, what the heads of a cache choose inside this context, for the oracle to go by."""
    choices: Choices = [[] for _ in cache.compressed_layers]
    layers = [layer if isinstance(layer, ChoosingLayer) else None for layer in cache.compressed_layers]
    for layer, record in zip(layers, choices, strict=True):
        if layer is not None:
            layer.record_choices(record)
    try:
        yield choices
    finally:
        for layer in layers:
            if layer is not None:
                layer.record_choices(None)
