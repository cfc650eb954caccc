"""What transformers may do to a cache between passes: crop, reset, and exchanging rows of the batch."""

import copy

import pytest
import torch

from kvcompress.core.errors import CacheUseError
from tests.cache.cache_tools import compressor_for, feed, inputs_for, model_of, padded, tokens


@pytest.fixture
def model():
    return model_of("llama")


def streaming(model, plan):
    return compressor_for(model, plan).new_cache(model.config, prefill="streaming")


def attached(model):
    return compressor_for(model, "all_full").attached(model)


@pytest.mark.parametrize("plan", ["mixed", "window_1", "no_sinks", "all_full", "pruned_heads"])
@pytest.mark.parametrize("padding", [False, True])
def test_a_recorded_pass_can_be_taken_back_in_part(model, plan, padding):
    ids, mask = padded(3, 50) if padding else (tokens(2, 50), None)
    with attached(model):
        for kept in (0, 1, 7, 12):  # of the twelve tokens of the recorded pass
            cache = streaming(model, plan)
            feed(model, cache, ids[:, :25], [25], None if mask is None else mask[:, :25])
            cache.activate_past_recording()
            wrong = torch.cat((ids[:, 25 : 25 + kept], tokens(len(ids), 12 - kept, seed=9)), dim=1)
            model(wrong, past_key_values=cache, use_cache=True, **_inputs(mask, 25, 37))
            cache.crop(kept - 12)
            assert cache.get_seq_length() == 25 + kept
            rest = model(ids[:, 25 + kept :], past_key_values=cache, **_inputs(mask, 25 + kept, 50)).logits
            expected = feed(model, streaming(model, plan), ids, [50], mask)[:, 25 + kept :]
            assert (rest - expected).abs().max() < 1e-5


def _inputs(mask, start, end):
    return inputs_for(mask, start, end)


def test_crop_zero_lets_go_of_the_record(model):
    with attached(model):
        cache = streaming(model, "no_sinks")
        feed(model, cache, tokens(1, 30), [30])
        before = cache.nbytes
        cache.activate_past_recording()
        feed(model, cache, tokens(1, 5), [5])
        assert cache.nbytes > before
        cache.crop(0)
        assert cache.nbytes == before


def test_what_was_not_overwritten_can_be_taken_back_without_a_record(model):
    ids = tokens(1, 40)
    with attached(model):
        cache = streaming(model, "window_beyond_text")
        feed(model, cache, ids, [40])
        cache.crop(torch.tensor(-15))  # as transformers 5.17 does
        assert type(cache.get_seq_length()) is int
        rest = feed(model, cache, ids[:, 25:], [15])
        assert (rest - feed(model, streaming(model, "all_full"), ids, [40])[:, 25:]).abs().max() < 1e-5
        cache.crop(10)  # a positive number is the length to crop to
        assert cache.get_seq_length() == 10


def test_a_cache_cropped_to_nothing_takes_a_prompt_again(model):
    with attached(model):
        cache = compressor_for(model, "window_beyond_text").new_cache(model.config)
        feed(model, cache, tokens(1, 30), [30])
        cache.crop(-30)
        again = feed(model, cache, tokens(1, 20, seed=4), [12, 1])
        fresh = compressor_for(model, "window_beyond_text").new_cache(model.config)
        assert (again - feed(model, fresh, tokens(1, 20, seed=4), [12, 1])).abs().max() < 1e-5


@pytest.mark.parametrize("plan", ["mixed", "all_full"])
def test_a_copy_goes_its_own_way(model, plan):
    ids, mask = padded(3, 40)
    with attached(model):
        cache = streaming(model, plan)
        feed(model, cache, ids[:, :25], [25], mask[:, :25])
        copied = copy.deepcopy(cache)
        model(tokens(3, 9), past_key_values=cache, **inputs_for(torch.ones(3, 34).long() * mask[:, :34], 25, 34))
        found = model(ids[:, 25:], past_key_values=copied, **inputs_for(mask, 25, 40)).logits
        expected = feed(model, streaming(model, plan), ids, [40], mask)[:, 25:]
    assert (found - expected).abs().max() < 1e-5
    assert copied.nbytes == copied.shared.meter.held


def test_a_crop_that_cannot_be_exact_is_refused_and_changes_nothing(model):
    ids = tokens(1, 40)
    with attached(model):
        cache = streaming(model, "mixed")
        feed(model, cache, ids[:, :39], [39])
        with pytest.raises(CacheUseError, match="crop: layer 0 has evicted keys"):
            cache.crop(-3)
        with pytest.raises(CacheUseError, match="only 39 were seen"):
            cache.crop(-40)
        last = feed(model, cache, ids[:, 39:], [1])
        assert (last - feed(model, streaming(model, "mixed"), ids, [40])[:, 39:]).abs().max() < 1e-5


@pytest.mark.parametrize("plan", ["mixed", "all_full"])
def test_reset_starts_as_new_and_frees(model, plan):
    ids, mask = padded(3, 30)
    with attached(model):
        cache = compressor_for(model, plan).new_cache(model.config)
        feed(model, cache, ids, [30], mask)
        cache.reset()
        assert cache.nbytes == cache.peak_nbytes == cache.get_seq_length() == 0
        again = feed(model, cache, tokens(1, 20), [10, 1])
        fresh = feed(model, compressor_for(model, plan).new_cache(model.config), tokens(1, 20), [10, 1])
        assert torch.equal(again, fresh)


@pytest.mark.parametrize("change", ["reorder_cache", "batch_select_indices", "batch_repeat_interleave"])
def test_rows_are_exchanged_with_their_padding(model, change):
    ids, mask = padded(3, 40)
    rows = torch.tensor([2, 0, 2]) if change == "reorder_cache" else torch.tensor([1, 2])
    rows = torch.arange(3).repeat_interleave(2) if change == "batch_repeat_interleave" else rows
    with attached(model):
        for seen in (8, 31):  # while some sinks are still to come, and when all rings have turned
            cache = streaming(model, "mixed")
            feed(model, cache, ids[:, :seen], [seen], mask[:, :seen])
            getattr(cache, change)(2 if change == "batch_repeat_interleave" else rows)
            assert cache.batch_size == len(rows)
            kwargs = inputs_for(mask[rows], seen, 40)
            found = model(ids[rows, seen:], past_key_values=cache, use_cache=True, **kwargs).logits
            expected = feed(model, streaming(model, "mixed"), ids[rows], [40], mask[rows])[:, seen:]
            assert (found - expected)[mask[rows, seen:].bool()].abs().max() < 1e-5


def test_repr_says_what_is_held(model):
    with attached(model):
        cache = streaming(model, "no_sinks")
        assert "0 tokens seen" in repr(cache)
        feed(model, cache, tokens(1, 28), [28])
    text = repr(cache)
    assert "2 layers × 3 KV heads" in text
    assert "28 tokens seen, 7 held a head, 25.0% of a full cache" in text
