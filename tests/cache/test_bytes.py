"""The bytes a cache reports: exactly what the plan's formula says, and exactly what it really keeps alive."""

import gc

import pytest
import torch

from kvcompress.cache.storage import allocated_slots
from kvcompress.core.plan import RetentionPlan
from kvcompress.core.retention import FULL, Retention
from kvcompress.methods import FixSizeL2Compressor, HeadAwareCompressor, L2Compressor
from tests.cache.cache_tools import (
    FAMILIES,
    LAYERS,
    PLANS,
    clipped_plan,
    compressor_for,
    feed,
    model_of,
    padded,
    plan_for,
    tokens,
)


def head_size(model):
    return getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads


def tensors_alive_in(cache):
    """Storage bytes of every floating tensor reachable from the cache, found by the garbage collector."""
    found, seen, stack = {}, set(), [cache]
    while stack:
        thing = stack.pop()
        if id(thing) in seen or isinstance(thing, type):
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor) and thing.is_floating_point():
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        stack += [other for other in gc.get_referents(thing) if not callable(other)]
    return sum(found.values())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_are_the_formula_and_the_real_storage(family, plan, batch):
    model = model_of(family)
    ids, mask = (tokens(1, 40), None) if batch == 1 else padded(3, 40)
    compressor = compressor_for(model, plan)
    with compressor.attached(model):
        for chunks in ([40], [22, 1], [7]):
            cache = compressor.new_cache(model.config, prefill="streaming")
            feed(model, cache, ids, chunks, mask)
            slots = sum(allocated_slots(kept, 40) for layer in clipped_plan(model, plan) for kept in layer)
            assert cache.nbytes == 2 * 4 * batch * head_size(model) * slots
            assert cache.nbytes == tensors_alive_in(cache) == cache.shared.meter.held


def test_slots_beyond_the_plan_are_few():
    for kept in (Retention(4, 8), Retention(0, 1), Retention(4, 3000), FULL):
        before = 0
        for seen in range(20_000):
            held, allocated = kept.held(seen), allocated_slots(kept, seen)
            assert held <= allocated <= held + min(max(15, held / 16), 255)
            assert allocated >= before  # storage grows and never shrinks
            before = allocated
            if kept.capacity is not None and seen >= kept.capacity:
                assert allocated == kept.capacity


def test_a_full_bounded_plan_holds_the_plans_own_bytes():
    model = model_of("llama")
    plan = RetentionPlan(tuple(tuple(layer) for layer in plan_for(model, "no_sinks")), 6)
    compressor = HeadAwareCompressor.from_plan(plan)
    with compressor.attached(model):
        cache = compressor.new_cache(model.config, prefill="exact")
        feed(model, cache, tokens(2, 30), [20, 1])
    assert cache.nbytes == plan.nbytes(30, head_dim=8, itemsize=4, batch=2)


@pytest.mark.parametrize("prefill", ["exact", "streaming"])
def test_the_peak_of_a_bounded_plan_is_what_it_holds(prefill):
    model = model_of("llama")
    compressor = compressor_for(model, "no_sinks")
    with compressor.attached(model):
        cache = compressor.new_cache(model.config, prefill=prefill)
        feed(model, cache, tokens(1, 60), [50, 1])
    assert cache.peak_nbytes == cache.nbytes  # also when the exact prompt was seven times as long


@pytest.mark.parametrize("method", [FixSizeL2Compressor(16, skip_layers=()), L2Compressor(0.25, 16, skip_layers=())])
def test_of_a_prompt_chosen_by_content_only_what_stays_was_ever_stored(method):
    model = model_of("llama")
    with method.attached(model):
        cache = method.new_cache(model.config)
        feed(model, cache, tokens(1, 64), [64])
    assert cache.peak_nbytes == cache.nbytes == 2 * 4 * 8 * LAYERS * 3 * 16


def test_the_peak_of_a_full_plan_counts_the_copy_that_growth_makes():
    model = model_of("llama_mqa")
    compressor = compressor_for(model, "all_full")
    with compressor.attached(model):
        cache = compressor.new_cache(model.config)
        feed(model, cache, tokens(1, 256), [256])
        before = cache.nbytes
        assert cache.peak_nbytes == before == 2 * 4 * 12 * LAYERS * 256
        feed(model, cache, tokens(1, 2), [1])
    assert cache.nbytes == before * 272 // 256
    # The last layer to grow held its old and its new block at once.
    assert cache.peak_nbytes == cache.nbytes + before // LAYERS


def test_a_prompt_in_chunks_is_held_until_its_end_and_freed():
    model = model_of("llama")
    compressor = compressor_for(model, "no_sinks")
    with compressor.attached(model):
        cache = compressor.new_cache(model.config, prompt_length=30)
        feed(model, cache, tokens(1, 20), [10])
        assert cache.held() == [[20] * 3] * LAYERS
        feed(model, cache, tokens(1, 10), [10])
    assert cache.held() == [[7] * 3] * LAYERS
    assert cache.nbytes == tensors_alive_in(cache) == 2 * 4 * 8 * 3 * LAYERS * 7


def test_compressing_keeps_nothing_of_the_source_alive():
    model = model_of("llama")
    compressor = compressor_for(model, "mixed")
    with compressor.attached(model):
        source = model(tokens(1, 200), use_cache=True).past_key_values
        cache = compressor.compress(source)
    slots = sum(allocated_slots(kept, 200) for layer in plan_for(model, "mixed") for kept in layer)
    assert cache.nbytes == tensors_alive_in(cache) == 2 * 4 * 8 * slots


def test_a_bounded_plan_decodes_thousands_of_tokens_in_the_same_storage():
    model = model_of("llama_mqa")
    compressor = compressor_for(model, "no_sinks")
    with compressor.attached(model):
        cache = compressor.new_cache(model.config, prefill="streaming")
        token = tokens(1, 1)
        addresses = None
        for step in range(1500):
            # The model's trained context is 128 tokens; rotary positions go on beyond it.
            logits = model(token, past_key_values=cache, use_cache=True).logits
            assert logits.isfinite().all()
            token = logits[:, -1:].argmax(-1)
            if step == 20:
                addresses = [group.read()[0].data_ptr() for layer in cache.layers for group in layer.groups]
                held = cache.nbytes
    assert [group.read()[0].data_ptr() for layer in cache.layers for group in layer.groups] == addresses
    assert cache.nbytes == cache.peak_nbytes == held
