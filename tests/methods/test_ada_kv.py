"""Budgets that follow the prompt: divided as a plain loop over a layer's keys would, held for real, judged by the oracle."""

import pytest
import torch
from transformers import DynamicCache

from kvcompress.cache.layer import CacheState
from kvcompress.cache.select.ada_kv import AdaptiveBudgets, divided
from kvcompress.cache.select.layer import SelectLayer
from kvcompress.core.errors import CacheUseError, InputError, UnsupportedModelError
from kvcompress.core.retention import Retention
from kvcompress.methods import AdaptiveCompressor
from kvcompress.scores.inputs import ScoreInputs
from kvcompress.scores.registry import SCORES
from kvcompress.scores.selection_rule import SelectionRule
from kvcompress.scores.snapkv import SnapKV
from tests.cache.cache_tools import feed, model_of, padded, tokens
from tests.cache.select.select_tools import CHOOSING, replayed, uniform
from tests.cache.test_bytes import head_size, tensors_alive_in
from tests.reference.recorded_selections import recorded_choices

LENGTH, PROMPT = 60, 44
SIZES = {"slots": 14, "sinks": 2, "window": 5, "selection_rule": CHOOSING}


@pytest.fixture
def model():
    return model_of("llama")


def run(model, compressor, ids, chunks, prompt_length=None):
    with compressor.attached(model):
        cache = compressor.new_cache(model.config, prompt_length=prompt_length)
        with recorded_choices(cache) as choices:
            return feed(model, cache, ids, chunks), cache, choices


def kept_by(cache):
    return [layer.retention for layer in cache.compressed_layers]


@pytest.mark.parametrize("chunks", [[PROMPT, 1], [PROMPT, 9, 1], [20, 24, 16]])
@pytest.mark.parametrize("score", SCORES)
def test_cache_is_the_mask_of_what_it_chose(model, score, chunks):
    ids = tokens(1, LENGTH)
    found, cache, choices = run(model, AdaptiveCompressor(score=score, **SIZES), ids, chunks, PROMPT)
    expected = replayed(model, kept_by(cache), choices, ids, prompt_length=PROMPT)
    assert (found - expected).abs().max() < 1e-5
    assert all(choices)
    assert len({kept for layer in kept_by(cache) for kept in layer}) > 1  # else nothing was divided


@pytest.mark.parametrize("score", SCORES)
def test_bytes_are_those_of_equal_heads_and_no_head_exceeds_its_slots(model, score):
    _, cache, _ = run(model, AdaptiveCompressor(score=score, **SIZES), tokens(1, LENGTH), [PROMPT, 1])
    width = cache.compressed_layers[0].heads
    for layer, held in zip(cache.compressed_layers, cache.held(), strict=True):
        assert sum(held) == SIZES["slots"] * width
        assert held == [kept.capacity for kept in layer.retention]
        assert layer.positions() == [sorted(set(places)) for places in layer.positions()]
        assert [len(places) for places in layer.positions()] == held
    assert cache.nbytes == cache.peak_nbytes == 2 * 4 * head_size(model) * SIZES["slots"] * width * len(cache.layers)
    assert tensors_alive_in(cache) <= cache.held_nbytes


@pytest.mark.parametrize("score", SCORES)
def test_a_floor_of_all_slots_is_the_uniform_plan_bit_for_bit(model, score):
    ids = tokens(1, LENGTH)
    found, cache, _ = run(model, AdaptiveCompressor(score=score, floor=1.0, **SIZES), ids, [PROMPT, 1])
    expected, other, _ = run(model, uniform(model, Retention(2, 5, 7, score)), ids, [PROMPT, 1])
    assert torch.equal(found, expected)
    assert [layer.positions() for layer in cache.layers] == [layer.positions() for layer in other.layers]


def test_division_is_that_of_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    for heads, keys, each, least in ((3, 20, 6, 2), (5, 9, 4, 0), (2, 7, 7, 3), (4, 30, 1, 1), (1, 8, 3, 0)):
        scores = torch.rand(heads, keys, generator=generator) ** 3
        scores[:, keys // 2] = 0.5  # as good in every head
        left = {(head, key) for head in range(heads) for key in range(keys)}
        taken = []
        for head in range(heads):
            own = sorted((float(-scores[head, key]), key) for key in range(keys))[:least]
            taken += [(head, key) for _, key in own]
        for _, head, key in sorted((float(-scores[head, key]), head, key) for head, key in left - set(taken)):
            if len(taken) < heads * each:
                taken.append((head, key))
        counts = divided(scores, each, least)
        assert counts == [sum(head == of for of, _ in taken) for head in range(heads)]
        assert sum(counts) == heads * each
        assert min(counts) >= least


def test_what_a_layer_keeps_are_its_best_keys_whichever_head_they_belong_to():
    """Two heads, one looking at three keys and one at all alike: by snapkv's own shares of attention."""
    torch.manual_seed(1)
    heads, columns, size, kept = 2, 80, 16, Retention(2, 8, 10, "snapkv")
    keys, query = torch.randn(1, heads, columns, size), torch.randn(1, heads, columns, size)
    keys[:, 0] *= 0.05  # looks at all alike
    keys[0, 1, 20:23] = 3 * query[0, 1].mean(0) + 4
    query[0, 1] += 4
    rule = SelectionRule(every=4, scores={"snapkv": SnapKV(window=8, kernel=1)})
    layer = SelectLayer([kept] * heads, CacheState(selection_rule=rule), None, AdaptiveBudgets(0))
    layer.attend(query, keys, keys, None, 0.0)
    places = torch.arange(columns)
    held = ScoreInputs(keys, keys, places[None, None], size**-0.5, query[:, :, -8:], places[None, -8:])
    scores = SnapKV(window=8, kernel=1).rank(held)[0, :, 2 : columns - 8]
    best = scores.flatten().sort(descending=True).indices[:20]
    wanted = [int((best // scores.shape[1] == head).sum()) for head in range(heads)]
    assert layer.held() == [10 + count for count in wanted]
    assert wanted[0] > wanted[1]
    assert {20, 21, 22} <= set(layer.positions()[1])


def test_every_prompt_is_divided_anew(model):
    compressor = AdaptiveCompressor(score="snapkv", **SIZES)
    first, second = tokens(1, LENGTH), tokens(1, LENGTH).flip(1)
    _, cache, _ = run(model, compressor, first, [PROMPT, 1])
    before = cache.held()
    cache.reset()
    assert cache.nbytes == cache.evidence_nbytes == tensors_alive_in(cache) == 0
    with compressor.attached(model):
        found = feed(model, cache, second, [PROMPT, 1])
    expected, fresh, _ = run(model, compressor, second, [PROMPT, 1])
    assert torch.equal(found, expected)
    assert cache.held() == fresh.held() != before


def test_a_prompt_that_fits_is_kept_whole_and_heads_stay_alike(model):
    ids = tokens(1, LENGTH)
    found, cache, _ = run(model, AdaptiveCompressor(score="key_norm", **SIZES), ids, [SIZES["slots"], 1])
    expected, _, _ = run(model, uniform(model, Retention(2, 5, 7, "key_norm")), ids, [SIZES["slots"], 1])
    assert torch.equal(found, expected)
    assert {held for layer in cache.held() for held in layer} == {SIZES["slots"]}


def test_a_full_cache_is_compressed_by_scores_that_need_no_queries(model):
    ids, compressor = tokens(1, PROMPT), AdaptiveCompressor(score="key_diff", **SIZES)
    full = DynamicCache(config=model.config)
    model(ids, past_key_values=full, use_cache=True)
    with compressor.attached(model):
        cache = compressor.compress(full, config=model.config)
    _, expected, _ = run(model, compressor, ids, [PROMPT])
    assert cache.held() == expected.held()
    assert [layer.positions() for layer in cache.layers] == [layer.positions() for layer in expected.layers]
    assert compressor.compress(cache) is cache
    with pytest.raises(CacheUseError, match="another method"):
        AdaptiveCompressor(score="key_diff", floor=0.5, **SIZES).compress(cache)


def test_skipped_layers_stay_full(model):
    _, cache, _ = run(model, AdaptiveCompressor(skip_layers=[1], **SIZES), tokens(1, LENGTH), [PROMPT, 1])
    assert set(cache.held()[1]) == {LENGTH}
    assert all(sum(held) == SIZES["slots"] * len(held) for i, held in enumerate(cache.held()) if i != 1)


def test_what_cannot_be_is_refused(model):
    compressor = AdaptiveCompressor(**SIZES)
    with compressor.attached(model):
        with pytest.raises(CacheUseError, match="one text at a time, without padding; got 2 rows"):
            feed(model, compressor.new_cache(model.config), tokens(2, PROMPT), [PROMPT])
        ids, mask = padded(3, PROMPT)
        row = int((mask == 0).any(1).nonzero()[0])
        with pytest.raises(CacheUseError, match="1 rows with at most [1-9]"):
            feed(model, compressor.new_cache(model.config), ids[row : row + 1], [PROMPT], mask[row : row + 1])
        with pytest.raises(InputError, match="prefill is 'streaming', expected 'exact'"):
            compressor.new_cache(model.config, "streaming")
    for sizes, message in (
        ({"slots": 68}, "slots is 68, expected a whole number of at least 69"),
        ({"slots": 100, "window": 0}, "window is 0"),
        ({"slots": 100, "floor": 1.5}, "floor is 1.5"),
        ({"slots": 100, "score": "magic"}, "magic"),
    ):
        with pytest.raises(InputError, match=message):
            AdaptiveCompressor(**sizes)
    windowed = model_of("mistral")
    with pytest.raises(UnsupportedModelError, match="sliding window"):
        AdaptiveCompressor(**{**SIZES, "slots": 8, "window": 2}).new_cache(windowed.config)
