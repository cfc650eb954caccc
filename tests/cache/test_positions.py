"""Property: whatever the plan and the chunking, a head holds {0 ... s-1} and the last w positions, and their keys."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompress.cache.layer import CacheState
from kvcompress.cache.ragged_layer import RaggedLayer
from kvcompress.core.retention import FULL, PRUNED, Retention

bounded = st.builds(Retention, st.integers(0, 6), st.integers(1, 12), st.just(0), st.just(""))
heads = st.lists(st.one_of(bounded, st.just(FULL), st.just(PRUNED)), min_size=1, max_size=4)
chunks = st.lists(st.integers(1, 15), min_size=1, max_size=8)


def by_definition(kept: Retention, seen: int) -> list[int]:
    """The definition, one position at a time."""
    if kept.pruned:
        return []
    return [p for p in range(seen) if kept.unbounded or p < kept.sinks or p > seen - 1 - kept.window]


@settings(max_examples=200, deadline=None)
@given(heads=heads, chunks=chunks, pads=st.lists(st.integers(0, 20), min_size=1, max_size=3), recording=st.booleans())
def test_positions_held_are_the_definition(heads, chunks, pads, recording):
    shared = CacheState("streaming")
    shared.padding.set(torch.tensor(pads) if any(pads) else None)
    layer = RaggedLayer(heads, shared)
    layer.record_past = recording
    batch, seen = len(pads), 0
    for new in chunks:
        # A key is its own position: what the storage holds can then be read off.
        column = torch.arange(seen, seen + new).float()
        keys = (column - torch.tensor(pads)[:, None])[:, None, :, None].expand(batch, len(heads), new, 1)
        layer.attend(torch.zeros(batch, len(heads), new, 1), keys, -keys, None, 0.0)
        seen += new
        for row, pad in enumerate(pads):
            expected = [by_definition(kept, max(seen - pad, 0)) for kept in heads]
            assert layer.positions(row) == expected
            assert stored(layer, row) == expected
    assert layer.held() == [kept.held(seen) for kept in heads]
    assert layer.get_seq_length() == seen


def stored(layer: RaggedLayer, row: int) -> list[list[int]]:
    """The keys that really lie in the slots that count, read from the storage, ascending."""
    found: list[list[int]] = [[] for _ in range(layer.heads)]
    for group in layer.groups:
        if group.filled:
            keys, values = group.read()
            at = group.positions(layer.shared.padding, torch.device("cpu"))
            counts = at[row if len(at) > 1 else 0] >= 0
            assert torch.equal(keys, -values)
            for index, head in enumerate(group.heads):
                found[head] = sorted(int(key) for key in keys[row, index, counts, 0])
    return found
