"""What strategy select promises besides being right: limits, bytes, the same answer twice, and keys that are worth it."""

import pytest
import torch
from transformers import DynamicCache

from kvcompress.cache.layer import CacheState
from kvcompress.cache.ragged_layer import RaggedLayer
from kvcompress.cache.select.layer import SelectLayer
from kvcompress.cache.storage import Block, allocated_slots
from kvcompress.core.errors import CacheUseError, InputError, UnsupportedModelError
from kvcompress.core.retention import Retention
from kvcompress.methods import HeadAwareCompressor
from kvcompress.methods.compressor import UniformCompressor
from kvcompress.scores.registry import SCORES
from kvcompress.scores.selection_rule import SelectionRule
from kvcompress.scores.snapkv import SnapKV
from tests.cache.cache_tools import LAYERS, feed, model_of, padded, tokens
from tests.cache.select.select_tools import CHOOSING, furthest, select_compressor, select_layers, uniform
from tests.cache.test_bytes import head_size, tensors_alive_in
from tests.reference.oracle import judged

LENGTH = 40


@pytest.fixture
def model():
    return model_of("llama")


def run(model, compressor, ids, chunks, prefill="streaming", mask=None):
    with compressor.attached(model):
        cache = compressor.new_cache(model.config, prefill)
        return feed(model, cache, ids, chunks, mask), cache


@pytest.mark.parametrize("prefill", ["exact", "streaming"])
def test_choosing_nothing_is_the_window_plan_bit_for_bit(model, prefill):
    ids = tokens(2, LENGTH)
    sizes = {"sink_size": 2, "window_size": 5}
    none = HeadAwareCompressor.from_model_config(model.config, "select", **sizes, select_size=0, score="snapkv")
    window = HeadAwareCompressor.from_model_config(model.config, "sink_window", **sizes)
    for chunks in ([LENGTH], [17, 9, 1, 13], [1]):
        (found, cache), (expected, other) = (run(model, one, ids, chunks, prefill) for one in (none, window))
        assert torch.equal(found, expected)
        assert all(type(layer) is RaggedLayer for layer in cache.layers)
        assert cache.nbytes == other.nbytes
        assert cache.evidence_nbytes == 0


@pytest.mark.parametrize("prefill", ["exact", "streaming"])
@pytest.mark.parametrize("score", SCORES)
def test_room_for_everything_is_the_full_cache(model, score, prefill):
    ids, mask = padded(3, LENGTH)
    for kept in (Retention(2, 5, LENGTH - 7, score), Retention(0, 3, 100, score)):
        for chunks in ([22, 1], [17, 9, 1, 13]):
            expected = feed(model, DynamicCache(), ids, chunks, mask)
            found, _ = run(model, uniform(model, kept), ids, chunks, prefill, mask)
            assert (found - expected)[mask.bool()].abs().max() < 1e-5


@pytest.mark.parametrize("score", SCORES)
def test_bytes_are_the_formula_and_the_real_storage(model, score):
    compressor = select_compressor(model, select_layers(model, score))
    for length, batch in ((9, 1), (LENGTH, 1), (LENGTH, 3)):
        for prefill, chunks in (("streaming", [length]), ("streaming", [7, 1]), ("exact", [length])):
            _, cache = run(model, compressor, tokens(batch, length), chunks, prefill)
            wanted = [kept for layer in compressor.retention for kept in layer]
            slots = sum(allocated_slots(kept, length) for kept in wanted)
            assert cache.nbytes == 2 * 4 * batch * head_size(model) * slots
            assert cache.nbytes == cache.peak_nbytes or (length, chunks) != (LENGTH, [LENGTH])
            assert cache.held() == [[kept.held(length) for kept in layer] for layer in compressor.retention]
            asking = sum(any(kept.score == score for kept in layer) for layer in compressor.retention)
            queries = asking * batch * CHOOSING.observe * model.config.hidden_size * 4 if score not in NO_QUERIES else 0
            chose = [kept for kept in wanted if kept.chosen and length > kept.capacity]
            sums = sum(kept.capacity * 8 * batch for kept in chose if kept.score == "accumulated_attention")
            places = sum(kept.capacity * 4 * batch for kept in chose)
            if length == LENGTH:
                assert cache.evidence_nbytes == queries + sums + places
            assert tensors_alive_in(cache) == cache.nbytes + queries + sums


NO_QUERIES = ("key_norm", "key_diff")


@pytest.mark.parametrize("score", SCORES)
def test_the_same_run_twice_is_the_same_bit_for_bit(model, score):
    ids = tokens(2, LENGTH)
    for prefill, chunks in (("exact", [30, 1]), ("streaming", [17, 9, 1, 13])):
        compressor = select_compressor(model, select_layers(model, score))
        (found, first), (again, second) = (run(model, compressor, ids, chunks, prefill) for _ in range(2))
        assert torch.equal(found, again)
        assert [layer.positions(1) for layer in first.layers] == [layer.positions(1) for layer in second.layers]


@pytest.mark.parametrize("prefill", ["exact", "streaming"])
@pytest.mark.parametrize("score", ["snapkv", "accumulated_attention", "key_diff"])
def test_a_key_that_matches_the_queries_survives(score, prefill):
    """400 keys alike and one, at 30, that is what all queries look for; 12 slots of which 4 are chosen."""
    torch.manual_seed(0)
    sought = torch.nn.functional.normalize(torch.randn(16), dim=0)
    keys = torch.randn(2, 1, 400, 16) * 0.2 - sought
    keys[:, :, 30] = 6 * sought
    query = 4 * sought + 0.1 * torch.randn(2, 3, 400, 16)
    for kept, expected in ((Retention(2, 6, 4, score), True), (Retention(2, 10), False)):
        shared = CacheState(prefill, selection_rule=SelectionRule(every=4, observe=8))
        layer = SelectLayer([kept], shared)
        for begin, end in ((0, 150), (150, 151), (151, 300), *((i, i + 1) for i in range(300, 400))):
            layer.attend(query[:, :, begin:end], keys[:, :, begin:end], keys[:, :, begin:end], None, 0.0)
        assert layer.held() == [12]
        assert [30 in layer.positions(row)[0] for row in (0, 1)] == [expected, expected]


@pytest.mark.parametrize("score", SCORES)
def test_rows_are_exchanged_with_what_they_chose(model, score):
    ids, mask = padded(3, LENGTH)
    rows = torch.tensor([2, 0, 2])
    compressor = select_compressor(model, select_layers(model, score))
    for prefill in ("exact", "streaming"):
        expected, _ = run(model, compressor, ids[rows], [26, 1], prefill, mask[rows])
        with compressor.attached(model):
            cache = compressor.new_cache(model.config, prefill)
            first = feed(model, cache, ids[:, :26], [26], mask[:, :26])
            cache.reorder_cache(rows)
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(torch.tensor([0, 2, 4]))
            more = torch.cat([feed_one(model, cache, ids[rows], mask[rows], i) for i in range(26, LENGTH)], dim=1)
        found = torch.cat((first[rows], more), dim=1)
        assert (found - expected)[mask[rows].bool()].abs().max() < 1e-5


@pytest.mark.parametrize("score", SCORES)
def test_rows_are_exchanged_in_the_middle_of_a_prompt(model, score):
    ids, rows = tokens(3, LENGTH), torch.tensor([2, 0, 2])
    compressor = select_compressor(model, select_layers(model, score))
    with compressor.attached(model):
        whole = compressor.new_cache(model.config, prompt_length=26)
        expected = feed(model, whole, ids[rows], [12, 14, 1])
        cache = compressor.new_cache(model.config, prompt_length=26)
        first = feed(model, cache, ids[:, :12], [12])
        cache.reorder_cache(rows)
        found = torch.cat((first[rows], feed(model, cache, ids[rows][:, 12:], [14, 1])), dim=1)
    assert (found - expected).abs().max() < 1e-5
    assert [layer.positions(0) for layer in cache.layers] == [layer.positions(0) for layer in whole.layers]


def feed_one(model, cache, ids, mask, column):
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, column : column + 1]
    kwargs = {"attention_mask": mask[:, : column + 1], "position_ids": positions}
    return model(ids[:, column : column + 1], past_key_values=cache, use_cache=True, **kwargs).logits


def test_reset_starts_as_new_and_frees(model):
    compressor = select_compressor(model, select_layers(model, "accumulated_attention"))
    expected, cache = run(model, compressor, tokens(3, LENGTH), [25, 1], "exact")
    cache.reset()
    assert cache.nbytes == cache.evidence_nbytes == tensors_alive_in(cache) == 0
    with compressor.attached(model):
        assert torch.equal(feed(model, cache, tokens(3, LENGTH), [25, 1]), expected)


def test_crop_is_exact_or_refused(model):
    ids = tokens(1, LENGTH)
    compressor = uniform(model, Retention(2, 5, 4, "snapkv"))
    expected, _ = run(model, compressor, ids, [1])
    with compressor.attached(model):
        cache = compressor.new_cache(model.config, "streaming")
        feed(model, cache, tokens(1, 10, seed=3), [10])
        cache.crop(-10)
        feed(model, cache, torch.cat((ids[:, :7], tokens(1, 4, seed=5)), dim=1), [4, 7])
        cache.crop(7)  # all slots were in use, and nothing was chosen yet
        found = feed(model, cache, ids[:, 7:], [6, 1])
        assert (found - expected[:, 7:]).abs().max() < 1e-5
        before = cache.layers[0].positions()
        for tokens_back in (-1, -6):
            with pytest.raises(CacheUseError, match="layer 0 has evicted keys"):
                cache.crop(tokens_back)
        with pytest.raises(CacheUseError, match="strategy select cannot take back a selection"):
            cache.activate_past_recording()
        assert not any(layer.record_past for layer in cache.layers)
        assert cache.layers[0].positions() == before


def test_crop_in_the_middle_of_a_prompt(model):
    ids = tokens(1, 30)
    for score, choosing in (
        ("accumulated_attention", CHOOSING),
        ("snapkv", SelectionRule(3, 7, {"snapkv": SnapKV(5)})),
    ):
        compressor = uniform(model, Retention(2, 5, 4, score), choosing)
        with compressor.attached(model):
            expected = feed(model, compressor.new_cache(model.config, prompt_length=20), ids, [30])
            cache = compressor.new_cache(model.config, prompt_length=20)
            feed(model, cache, ids[:, :12], [7, 5])
            if score == "snapkv":  # of whose queries only the last five were kept
                with pytest.raises(CacheUseError, match="evicted keys"):
                    cache.crop(-4)
                found = feed(model, cache, ids[:, 12:], [4])
            else:
                cache.crop(-4)
                found = feed(model, cache, ids[:, 8:], [4])
        assert (found - expected[:, 30 - found.shape[1] :]).abs().max() < 1e-5


def test_a_sliding_window_is_served_where_nothing_chosen_leaves_it():
    model, ids = model_of("mistral"), tokens(2, LENGTH)  # which sees 20 keys
    roomy = uniform(model, Retention(3, 8, 9, "snapkv"))
    with judged(model, [[Retention(0, 20)] * 2] * 2):
        expected = model(ids, use_cache=False).logits
    assert (run(model, roomy, ids, [11, 1])[0] - expected).abs().max() < 1e-5
    with pytest.raises(
        UnsupportedModelError, match="sliding window of 20: strategy select needs at least as many slots"
    ):
        uniform(model, Retention(3, 8, 8, "snapkv")).new_cache(model.config)
    late = uniform(model, Retention(3, 8, 8, "key_diff"))
    plain = DynamicCache()
    model(ids, past_key_values=plain)
    with (
        judged(model, [[Retention(0, 20)] * 2] * 2),
        pytest.raises(UnsupportedModelError, match="sliding window of 20"),
    ):
        late.compress(plain).layers[0].learn_sliding_window(20)


def test_what_cannot_be_served_is_refused_by_name(model):
    with pytest.raises(UnsupportedModelError, match='positions="cache" cannot serve strategy select'):
        UniformCompressor(Retention(2, 5, 4, "key_diff"), positions="cache").new_cache(model.config)
    with pytest.raises(InputError, match="unknown score 'magic', expected one of key_norm"):
        uniform(model, Retention(2, 5, 4, "magic"))
    with pytest.raises(UnsupportedModelError, match="score 'expected_attention' knows the rotary embedding of"):
        uniform(model_of("gpt2"), Retention(2, 5, 4, "expected_attention")).new_cache(model_of("gpt2").config)
    with pytest.raises(InputError, match="every is 0, expected a whole number of at least 1"):
        SelectionRule(every=0)
    with (
        pytest.raises(InputError, match="heads of this plan select keys"),
        judged(model, select_layers(model, "snapkv")),
    ):
        pass


def test_a_model_without_rotation_chooses_by_scores_that_need_none():
    model = model_of("gpt2")
    for score in ("key_diff", "snapkv"):
        compressor = select_compressor(model, select_layers(model, score))
        with compressor.attached(model):
            assert furthest(model, compressor, tokens(2, LENGTH), [17, 1])[0] < 1e-5


@pytest.mark.parametrize("score", SCORES)
def test_a_cache_filled_elsewhere_is_compressed_by_scores_that_need_no_queries(model, score):
    ids = tokens(2, LENGTH)
    compressor = select_compressor(model, [[Retention(2, 5, 4, score)] * 3] * LAYERS)
    with compressor.attached(model):
        source = model(ids[:, :30], use_cache=True).past_key_values
        if score not in NO_QUERIES:
            with pytest.raises(InputError, match=f"score '{score}' ranks keys by queries, and a cache .* has none"):
                compressor.compress(source)
            return
        cache = compressor.compress(source)
        assert compressor.compress(cache) is cache
        found = feed(model, cache, ids[:, 30:], [1])
        expected, other = run(model, compressor, ids, [30, 1], "exact")
    assert (found - expected[:, 30:]).abs().max() < 1e-5
    assert cache.layers[1].positions() == other.layers[1].positions()
    same, others = (
        select_compressor(model, compressor.retention, choosing) for choosing in (CHOOSING, SelectionRule())
    )
    assert same.compress(cache) is cache
    with pytest.raises(CacheUseError, match="already compressed by another method"):
        others.compress(cache)


@pytest.mark.parametrize("score", ["key_diff", "leverage"])
@pytest.mark.parametrize("prefill", ["exact", "streaming"])
def test_no_slot_is_written_twice_by_one_exchange(model, monkeypatch, prefill, score):
    exchanges = []
    move = Block.move

    def watched(self, source, into):
        exchanges.append(torch.equal(into.sort(-1).values.diff(dim=-1) > 0, torch.ones_like(into[..., 1:]).bool()))
        move(self, source, into)

    monkeypatch.setattr(Block, "move", watched)
    ids, mask = padded(3, LENGTH)
    run(model, select_compressor(model, select_layers(model, score), CHOOSING), ids, [18, *[1] * 22], prefill, mask)
    assert len(exchanges) > 8
    assert all(exchanges)
