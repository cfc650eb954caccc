"""Slots cut into parts for all cores give what torch's fused attention gives."""

import pytest
import torch

from kvcompress.cache.attend import Reading, attend
from kvcompress.cache.padding import Padding
from kvcompress.ops import cpu_split_kv
from kvcompress.ops.cpu_split_kv import attend_spread, parts_for
from tests.cache.cache_tools import compressor_for, model_of, plan_for, tokens
from tests.reference.oracle import judged


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(
    ("batch", "heads", "group", "slots", "filled"), [(1, 3, 3, 64, 64), (2, 1, 4, 96, 57), (1, 5, 1, 32, 1)]
)
def test_parts_agree_with_the_whole(batch, heads, group, slots, filled, scale):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(batch, heads, group, 1, 16, generator=generator)
    keys = torch.randn(batch, heads, slots, 16, generator=generator)
    values = torch.randn(batch, heads, slots, 24, generator=generator)
    reading = Reading(Padding(), scale)
    expected = attend(query, keys[:, :, :filled], values[:, :, :filled], None, reading)
    for parts in (1, 2, 4, 8):
        found = attend_spread(query, keys, values, filled, scale, parts)
        assert found.shape == expected.shape
        assert (found - expected).abs().max() < 1e-5


def test_only_idle_cores_make_parts(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    query = torch.zeros(1, 1, 2, 1, 8)

    def parts(rows, heads, slots, filled=10_000, dtype=torch.float32):
        return parts_for(query, torch.zeros(rows, heads, slots, 8, dtype=dtype), filled)

    assert parts(1, 3, 2000) == 4
    assert parts(1, 5, 2000) == 4  # two rounds for what five quarters would do
    assert parts(1, 4, 2000) == parts(4, 3, 2000) == 1  # busy
    assert parts(1, 3, 2001) == 1  # odd
    assert parts(1, 3, 2002) == 2
    assert parts(1, 3, 2000, filled=100) == 1  # short
    assert parts(1, 3, 2000, dtype=torch.bfloat16) == 1


@pytest.mark.parametrize("plan", ["all_full", "no_sinks", "mixed"])
def test_decoding_with_parts_agrees_with_the_oracle(monkeypatch, plan):
    model = model_of("llama")
    monkeypatch.setattr(cpu_split_kv, "WORTHWHILE", 6)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    ids = tokens(1, 40)
    compressor = compressor_for(model, plan)
    with judged(model, plan_for(model, plan)):
        expected = model(ids, use_cache=False).logits
    with compressor.attached(model):
        cache = compressor.new_cache(model.config, prefill="streaming")
        found = torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(40)], dim=1)
    assert (found - expected).abs().max() < 1e-5
