"""Property: a head that selects holds min(seen, s + w + k) different keys, its sinks and last w always among them."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompress.cache.layer import CacheState
from kvcompress.cache.select.layer import SelectLayer
from kvcompress.core.retention import Retention
from kvcompress.scores.selection_rule import SelectionRule

SCORES = st.sampled_from(["key_norm", "key_diff", "snapkv", "accumulated_attention"])
chosen = st.builds(Retention, st.integers(0, 4), st.integers(1, 8), st.integers(1, 9), SCORES)
windows = st.builds(Retention, st.integers(0, 4), st.integers(1, 8), st.just(0), st.just(""))
heads = st.lists(st.one_of(chosen, windows), min_size=1, max_size=3).filter(lambda kept: any(k.chosen for k in kept))
chunks = st.lists(st.integers(1, 20), min_size=1, max_size=7)


@settings(max_examples=80, deadline=None)
@given(
    heads=heads,
    chunks=chunks,
    pads=st.lists(st.integers(0, 25), min_size=1, max_size=3),
    prefill=st.sampled_from(["exact", "streaming"]),
    rule=st.builds(SelectionRule, st.integers(1, 9), st.integers(1, 5)),
)
def test_positions_held(heads, chunks, pads, prefill, rule):
    shared = CacheState(prefill, selection_rule=rule)
    shared.padding.set(torch.tensor(pads) if any(pads) else None)
    layer = SelectLayer(heads, shared)
    generator = torch.Generator().manual_seed(sum(chunks))
    batch, seen = len(pads), 0
    for new in chunks:
        # Next to random numbers a key holds its own position: what lies in the storage can then be read off.
        place = (torch.arange(seen, seen + new) - torch.tensor(pads)[:, None]).float()
        keys = torch.randn(batch, len(heads), new, 4, generator=generator)
        keys[..., 0] = place[:, None] / 64
        layer.attend(torch.randn(batch, len(heads), new, 4, generator=generator), keys, -keys, None, 0.0)
        seen += new
        for row, pad in enumerate(pads):
            real = max(seen - pad, 0)
            found = layer.positions(row)
            for kept, held, stored in zip(heads, found, stored_in(layer, row), strict=True):
                assert stored == held
                assert len(set(held)) == len(held) == min(real, kept.capacity)
                assert set(kept.positions(real)) <= set(held) <= set(range(real))
    assert layer.held() == [kept.held(seen) for kept in heads]
    assert all(group.block.slots <= group.capacity for group in layer.groups)


def stored_in(layer, row):
    """The positions of the keys that lie in the slots that count, read from the storage, ascending, head by head."""
    found = [[] for _ in range(layer.heads)]
    for group in layer.groups:
        keys, values = group.read()
        counts = group.positions(layer.shared.padding, torch.device("cpu"))
        assert torch.equal(keys, -values)
        for index, head in enumerate(group.heads):
            found[head] = sorted((64 * keys[row, index, counts[row if len(counts) > 1 else 0] >= 0, 0]).int().tolist())
    return found
