"""The baselines against slow references that follow their definitions word for word."""

import math

import pytest
import torch
from transformers import DynamicCache

from kvcompress.core.errors import CacheUseError, InputError, UnsupportedModelError
from kvcompress.core.retention import Retention
from kvcompress.methods import (
    FixSizeL2Compressor,
    L2Compressor,
    RecentOnlyCompressor,
    StreamingLLMCompressor,
    fix_size_l2,
    l2_compress,
    recent_only,
    streaming_llm,
)
from tests.cache.cache_tools import compressor_for, feed, model_of, padded, tokens
from tests.reference.oracle import judged


@pytest.fixture
def model():
    return model_of("llama")


def smallest(keys, keep_ratio, prune_after):
    """Slots of one head that l2_compress keeps, by sorting: `keys [slot, head_dim]`."""
    held = len(keys)
    if held <= prune_after:
        return list(range(held))
    by_norm = sorted(range(held), key=lambda slot: float(keys[slot].norm()))
    return sorted(by_norm[: math.ceil(keep_ratio * held)])


def fixed(keys, size, keep_ratio, strategy):
    """Slots of one head that fix_size_l2 keeps."""
    held = len(keys)
    if held <= size:
        return list(range(held))
    recent = int(size * keep_ratio)
    older = sorted(range(held - recent), key=lambda slot: float(keys[slot].norm()), reverse=strategy == "keep_high")
    return sorted(older[: size - recent]) + list(range(held - recent, held))


METHODS = {
    "l2_half": (lambda: L2Compressor(0.5, 20, skip_layers=[1]), lambda k: smallest(k, 0.5, 20)),
    "l2_tenth": (lambda: L2Compressor(0.1, 20, skip_layers=[1]), lambda k: smallest(k, 0.1, 20)),
    "l2_all": (lambda: L2Compressor(1.0, 20, skip_layers=[1]), lambda k: smallest(k, 1.0, 20)),
    "low": (lambda: FixSizeL2Compressor(16, 0.0, skip_layers=[1]), lambda k: fixed(k, 16, 0.0, "keep_low")),
    "low_recent": (lambda: FixSizeL2Compressor(16, 0.4, skip_layers=[1]), lambda k: fixed(k, 16, 0.4, "keep_low")),
    "high_recent": (
        lambda: FixSizeL2Compressor(16, 0.5, "keep_high", skip_layers=[1]),
        lambda k: fixed(k, 16, 0.5, "keep_high"),
    ),
    "recent_alone": (lambda: FixSizeL2Compressor(16, 1.0, skip_layers=[1]), lambda k: fixed(k, 16, 1.0, "keep_low")),
}


def slow_run(model, rule, ids, chunks):
    """The method with one dense cache whose layer 0 is thinned head by head after every pass; layer 1 is skipped."""
    cache, out, start = DynamicCache(config=model.config), [], 0
    seen = 0
    for new in chunks:
        positions = torch.arange(seen, seen + new)[None].expand(len(ids), -1)
        # A dense cache needs no mask for one token; longer passes come first, while nothing has been thinned.
        assert new == 1 or seen == 0
        out.append(model(ids[:, start : start + new], position_ids=positions, past_key_values=cache).logits)
        start, seen = start + new, seen + new
        layer = cache.layers[0]
        slots = torch.tensor([[rule(head) for head in row] for row in layer.keys])[..., None]
        layer.keys = layer.keys.gather(2, slots.expand(-1, -1, -1, layer.keys.shape[-1]))
        layer.values = layer.values.gather(2, slots.expand(-1, -1, -1, layer.values.shape[-1]))
    return torch.cat(out, dim=1), cache


@pytest.mark.parametrize("name", METHODS)
def test_l2_methods_follow_their_definition(model, name):
    make, rule = METHODS[name]
    # In layer 0 a token's key has the same norm wherever it stands, so no token may come twice: ties have no order.
    ids, chunks = (
        torch.stack([torch.randperm(95, generator=torch.Generator().manual_seed(row))[:45] + 1 for row in range(2)]),
        [30] + [1] * 15,
    )
    expected, reference = slow_run(model, rule, ids, chunks)
    compressor = make()
    with compressor.attached(model):
        cache = compressor.new_cache(model.config)
        found = feed(model, cache, ids, chunks)
        past = compressor.compress(feed_dense(model, ids[:, :30]))
        again = feed(model, past, ids[:, 30:], [1])
    assert (found - expected).abs().max() < 1e-5
    assert (again - expected[:, 30:]).abs().max() < 1e-5
    for layer, slow in zip(cache.layers, reference.layers, strict=True):
        keys, values = layer.groups[0].read()  # in time order
        assert torch.allclose(keys, slow.keys, atol=1e-5)
        assert torch.allclose(values, slow.values, atol=1e-5)
    assert cache.held() == [[reference.layers[0].keys.shape[2]] * 3, [45] * 3]
    assert cache.get_seq_length() == 45


def feed_dense(model, ids):
    return model(ids, use_cache=True).past_key_values


def test_random_choice_reproduces_keeps_the_recent_and_differs_between_steps(model):
    ids = tokens(1, 60)

    def kept(seed):
        compressor = FixSizeL2Compressor(16, 0.5, "random", skip_layers=[], seed=seed)
        with compressor.attached(model):
            cache = compressor.new_cache(model.config)
            feed(model, cache, ids, [30, 1])
        return cache.layers[0].groups[0].read()[0]

    dense = feed_dense(model, ids).layers[0].keys
    assert torch.equal(kept(1), kept(1))
    assert not torch.equal(kept(1), kept(2))
    assert torch.allclose(kept(1)[:, :, -8:], dense[:, :, -8:], atol=1e-6)
    # Were the same slot drawn at every step, seven of the eight older keys could never change again.
    distances = (kept(1)[:, :, :8, None] - dense[:, :, None]).norm(dim=-1)
    assert (distances.argmin(-1) >= 30).sum() > 8


def test_selecting_methods_free_what_they_drop(model):
    compressor = FixSizeL2Compressor(100, skip_layers=[1])
    with compressor.attached(model):
        cache = compressor.new_cache(model.config)
        feed(model, cache, tokens(1, 2000), [2000])
    a_slot = 2 * 4 * 8 * 3  # K and V, fp32, head size 8, three KV heads
    assert cache.layers[0].nbytes == 112 * a_slot
    assert cache.layers[1].nbytes == 2048 * a_slot
    assert cache.nbytes == cache.shared.meter.held == (112 + 2048) * a_slot


def test_selecting_methods_refuse_what_they_cannot_do(model):
    compressor = L2Compressor(0.5, 10)
    ids, mask = padded(2, 20)
    cache = compressor.new_cache(model.config)
    l2_all = L2Compressor(0.5, 10, skip_layers=[])
    with l2_all.attached(model):
        with pytest.raises(CacheUseError, match="needs rows of equal length"):
            feed(model, l2_all.new_cache(model.config), ids, [20], mask)
        cache = l2_all.new_cache(model.config)
        feed(model, cache, tokens(1, 20), [20])
        cache.crop(0)
        with pytest.raises(CacheUseError, match="layer 0 has evicted keys"):
            cache.crop(-1)
    with pytest.raises(InputError, match="has no streaming prefill"):
        compressor.new_cache(model.config, prefill="streaming")
    with pytest.raises(UnsupportedModelError, match="sliding window of 20"):
        l2_all.new_cache(model_of("mistral").config)
    for build in (lambda: L2Compressor(1.5), lambda: FixSizeL2Compressor(0), lambda: FixSizeL2Compressor(strategy="x")):
        with pytest.raises(InputError):
            build()


@pytest.mark.parametrize(
    ("make", "kept"),
    [
        (lambda: StreamingLLMCompressor(3, 9), Retention(3, 9)),
        (lambda: StreamingLLMCompressor(0, 9), Retention(0, 9)),
        (lambda: RecentOnlyCompressor(11), Retention(0, 11)),
    ],
)
def test_static_baselines_are_uniform_plans(model, make, kept):
    ids = tokens(1, 40)
    with judged(model, [[kept] * 3] * 2):
        expected = model(ids, use_cache=False).logits
    compressor = make()
    with compressor.attached(model):
        found = feed(model, compressor.new_cache(model.config, prefill="streaming"), ids, [25, 1])
    assert (found - expected).abs().max() < 1e-5


def test_the_function_forms_and_their_defaults(model):
    source = feed_dense(model, tokens(1, 1200))
    assert streaming_llm(source).held() == [[512] * 3] * 2
    assert streaming_llm(source, 2, 10, skip_layers=[0]).held() == [[1200] * 3, [12] * 3]
    assert recent_only(source).held() == [[512] * 3] * 2
    assert l2_compress(source).held() == [[1200] * 3] * 2
    assert l2_compress(source, 0.5, skip_layers=[1]).held() == [[600] * 3, [1200] * 3]
    assert l2_compress(source, 0.5, prune_after=1200, skip_layers=[]).held() == [[1200] * 3] * 2
    assert fix_size_l2(source).held() == [[1200] * 3] * 2  # both layers are skipped by default
    assert fix_size_l2(source, skip_layers=[0]).held() == [[1200] * 3, [1024] * 3]
    for compress in (streaming_llm, recent_only, l2_compress, fix_size_l2):
        past = compress(source, skip_layers=[])
        assert compress(past, skip_layers=[]) is past
        assert past.get_seq_length() == 1200


def test_the_loop_with_a_selecting_method_gives_the_tokens_of_generate(model):
    compressor = FixSizeL2Compressor(16, 0.5, skip_layers=[1])
    ids = tokens(1, 25)
    with compressor.attached(model):
        expected = model.generate(
            ids, past_key_values=compressor.new_cache(model.config), max_new_tokens=10, do_sample=False, pad_token_id=0
        )
        past, out = None, ids
        for _ in range(10):
            new = out if past is None else out[:, -1:]
            outputs = model(new, past_key_values=past, use_cache=True)
            past = compressor.compress(outputs.past_key_values)
            out = torch.cat((out, outputs.logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(out, expected)
    with pytest.raises(CacheUseError, match="another method"):
        compressor_for(model, "mixed").compress(past)
