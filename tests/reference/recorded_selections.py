"""Selections of a cache, recorded for the oracle to replay."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from kvcompress.cache.ragged_cache import RaggedCache
from kvcompress.cache.select.layer import SelectLayer
from kvcompress.cache.select.records import SelectionRecord, SelectionRecords


@contextmanager
def recorded_choices(cache: RaggedCache) -> Iterator[SelectionRecords]:
    """Record, layer by layer, the selections of a cache in this context."""
    records: SelectionRecords = [[] for _ in cache.compressed_layers]
    layers = [layer for layer in cache.compressed_layers if isinstance(layer, SelectLayer)]
    for layer, record in zip(cache.compressed_layers, records, strict=True):
        if isinstance(layer, SelectLayer):
            layer.record_selections(record)
    try:
        yield records
    finally:
        for layer in layers:
            layer.record_selections(None)


def of_head(records: Sequence[SelectionRecord], head: int) -> list[tuple[int, Tensor, Tensor]]:
    """Return (column, chosen `[batch, k]`, leaving `[batch, r]`) of every selection of one KV head, in order of time."""
    return [
        (one.column, one.chosen[:, one.heads.index(head)], one.leaving[:, one.heads.index(head)])
        for one in records
        if head in one.heads
    ]
