"""Operations between passes (crop, reset, rows of the batch), and inputs at the edge of what is served."""

import copy

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DynamicCache,
    Gemma3nTextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    SmolLM3Config,
)

from kvcompress.cache.head_group import RECORDED
from kvcompress.core.errors import CacheUseError, InputError, UnsupportedModelError
from kvcompress.core.plan import RetentionPlan
from kvcompress.core.retention import FULL, Retention
from kvcompress.methods import FixSizeL2Compressor, HeadAwareCompressor, StreamingLLMCompressor
from kvcompress.models.architecture import Architecture
from kvcompress.models.rotary import Rotation
from kvcompress.scores.key_diff import KeyDiff
from tests.cache.cache_tools import (
    LAYERS,
    VOCABULARY,
    compressor_for,
    feed,
    inputs_for,
    model_of,
    padded,
    plan_for,
    tokens,
)
from tests.reference.oracle import judged


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


LENGTH = 33


def oracle(model, ids, mask=None, prompt_length=None):
    with judged(model, plan_for(model, "mixed"), "exact" if prompt_length else "streaming", prompt_length):
        return model(ids, use_cache=False, **inputs_for(mask, 0, ids.shape[1])).logits


@pytest.mark.parametrize("chunks", [[LENGTH], [15, 18], [21, 12], [5, 5, 23], [1]])
def test_a_prompt_ends_where_it_was_said_to_end(chunks):
    model, ids = model_of("llama"), tokens(2, LENGTH)
    compressor = compressor_for(model, "mixed")
    with compressor.attached(model):
        found = feed(model, compressor.new_cache(model.config, prompt_length=21), ids, chunks)
    assert (found - oracle(model, ids, prompt_length=21)).abs().max() < 1e-5


def test_crop_after_a_prompt_in_pieces_and_in_the_middle_of_it():
    model, ids = model_of("llama"), tokens(1, LENGTH)
    compressor = compressor_for(model, "window_beyond_text")
    with compressor.attached(model):
        expected = feed(model, compressor.new_cache(model.config, prompt_length=20), ids, [8])
        for stop in (12, 24):  # inside the prompt, and after it
            cache = compressor.new_cache(model.config, prompt_length=20)
            feed(model, cache, ids[:, :stop], [8])
            cache.crop(-4)
            assert {held for layer in cache.held() for held in layer} == {stop - 4}
            found = feed(model, cache, ids[:, stop - 4 :], [1])
            assert (found - expected[:, stop - 4 :]).abs().max() < 1e-5


def test_crop_to_nothing_begins_anew_with_another_batch():
    model = model_of("llama")
    compressor = compressor_for(model, "mixed")
    with compressor.attached(model):
        cache = compressor.new_cache(model.config, prompt_length=8)
        feed(model, cache, tokens(1, 8), [8])
        cache.crop(-8)
        assert cache.nbytes == 0
        ids = tokens(3, 12, seed=4)
        found = feed(model, cache, ids, [8, 1])
    assert (found - oracle(model, ids, prompt_length=8)).abs().max() < 1e-5


def test_recording_is_bounded_and_ends_with_reset():
    model = model_of("llama")
    compressor = compressor_for(model, "no_sinks")
    with compressor.attached(model), torch.inference_mode():
        cache = compressor.new_cache(model.config, prefill="streaming")
        for layer in cache.layers:
            layer.activate_past_recording()
        sizes = []
        for _ in range(2 * RECORDED):
            model(tokens(1, 1), past_key_values=cache, position_ids=torch.tensor([[5]]))
            sizes.append(cache.nbytes)
        assert sizes[-1] == sizes[-100]
        cache.crop(-3)
        with pytest.raises(CacheUseError, match="evicted keys"):
            cache.crop(-3)
        cache.reset()
        feed(model, cache, tokens(1, 40), [1])
        assert cache.nbytes == compressor_bytes(model, compressor)


def compressor_bytes(model, compressor):
    cache = compressor.new_cache(model.config, prefill="streaming")
    feed(model, cache, tokens(1, 40), [1])
    return cache.nbytes


def test_a_window_learned_late_keeps_compress_idempotent():
    model, ids = model_of("mistral"), tokens(1, LENGTH)
    compressor, other = compressor_for(model, "mixed"), compressor_for(model, "mixed")
    with compressor.attached(model):
        plain = DynamicCache()
        model(ids, past_key_values=plain)
        cache = compressor.compress(plain)
        model(tokens(1, 1), past_key_values=cache)
        assert compressor.compress(cache) is cache
        assert other.compress(cache) is cache
        ranked = FixSizeL2Compressor(30, skip_layers=()).compress(plain)
        with pytest.raises(UnsupportedModelError, match="sliding window of 20"):
            model(tokens(1, 1), past_key_values=ranked)


def test_a_plan_for_other_query_heads():
    model = model_of("llama")
    plan = RetentionPlan(((FULL,) * 3,) * 2, 12)
    with pytest.raises(InputError, match="made for 12 query heads a layer, not 6"):
        HeadAwareCompressor.from_plan(plan).new_cache(model.config)


def test_a_pass_that_broke_off_between_two_layers_is_noticed():
    model, ids = model_of("llama"), tokens(1, LENGTH)
    compressor = compressor_for(model, "mixed")
    expected = oracle(model, ids)

    def fail(*args):
        raise InterruptedError

    with compressor.attached(model):
        cache = compressor.new_cache(model.config, prefill="streaming")
        feed(model, cache, ids[:, :20], [20])
        hook = model.model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(InterruptedError):
            feed(model, cache, ids[:, 20:], [13])
        hook.remove()
        with pytest.raises(CacheUseError, match="broke off: layer 0 saw 33 tokens and layer 1 20; `reset`"):
            feed(model, cache, ids[:, 20:], [13])
        cache.reset()
        assert (feed(model, cache, ids, [LENGTH]) - expected).abs().max() < 1e-5


@pytest.mark.parametrize(("prefill", "first"), [("exact", 0), ("streaming", 20)])
def test_a_pass_that_broke_off_within_the_first_layer_is_noticed(monkeypatch, prefill, first):
    model, ids = model_of("llama"), tokens(1, LENGTH)
    kept = [FULL, Retention(1, 4), Retention(1, 4, 4, "key_diff")]
    compressor = HeadAwareCompressor([kept] * LAYERS, query_heads=False)

    def fail(*args):
        raise torch.OutOfMemoryError

    with compressor.attached(model):
        expected = feed(model, compressor.new_cache(model.config, prefill), ids, [first or 32, LENGTH - (first or 32)])
        cache = compressor.new_cache(model.config, prefill)
        if first:
            feed(model, cache, ids[:, :first], [first])
        with monkeypatch.context() as patch:
            patch.setattr(KeyDiff, "rank", fail)
            with pytest.raises(torch.OutOfMemoryError):
                feed(model, cache, ids[:, first:32], [32 - first])
        with pytest.raises(
            CacheUseError, match=f"broke off within a layer that saw {first} tokens: heads .* have stored "
        ):
            feed(model, cache, ids[:, first:32], [32 - first])
        cache.reset()
        assert torch.equal(feed(model, cache, ids, [first or 32, LENGTH - (first or 32)]), expected)


def test_models_that_share_keys_between_layers_or_heads_or_do_not_rotate_are_refused():
    with pytest.raises(UnsupportedModelError, match="shares the keys of other layers in 2 layers"):
        Architecture.of_config(Gemma3nTextConfig(num_hidden_layers=4, num_kv_shared_layers=2))
    with pytest.raises(UnsupportedModelError, match="deepseek_v3 caches one latent for all its heads"):
        Architecture.of_config(DeepseekV3Config())
    with pytest.raises(UnsupportedModelError, match="smollm3"):
        Rotation.of(SmolLM3Config())


def test_attention_of_another_scale():
    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, attention_multiplier=0.9, initializer_range=0.1, pad_token_id=0,
    )  # fmt: skip
    model, ids = GraniteForCausalLM(config).eval(), tokens(2, LENGTH)
    compressor = compressor_for(model, "mixed")
    with torch.no_grad(), compressor.attached(model):
        found = feed(model, compressor.new_cache(model.config, prefill="streaming"), ids, [11, 1])
    with torch.no_grad():
        assert (found - oracle(model, ids)).abs().max() < 1e-5


def test_fewer_pads_than_sinks():
    model, ids = model_of("llama"), tokens(3, LENGTH)
    mask = torch.ones_like(ids)
    for row in (1, 2):
        ids[row, :row], mask[row, :row] = 0, 0
    compressor = compressor_for(model, "mixed")
    expected = oracle(model, ids, mask)
    with compressor.attached(model):
        for chunks in ([LENGTH], [3, 4, 1], [1]):
            found = feed(model, compressor.new_cache(model.config, prefill="streaming"), ids, chunks, mask)
            assert (found - expected)[mask.bool()].abs().max() < 1e-5


def test_prefill_in_inference_mode_and_decoding_outside():
    model, ids = model_of("llama"), tokens(1, LENGTH)
    compressor = compressor_for(model, "mixed")
    with compressor.attached(model):
        cache = compressor.new_cache(model.config, prefill="streaming")
        with torch.inference_mode():
            model(ids[:, :20], past_key_values=cache)
        with torch.no_grad():
            found = feed(model, cache, ids[:, 20:], [1])
        cache.reorder_cache(torch.tensor([0]))
        model(tokens(1, 1), past_key_values=cache)
    assert (found - oracle(model, ids)[:, 20:]).abs().max() < 1e-5


def test_contexts_may_end_in_any_order():
    model = model_of("llama")
    first, second = (StreamingLLMCompressor(1, size).attached(model) for size in (3, 5))
    before = model.config._attn_implementation
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert model.config._attn_implementation == "kvcompress"
    second.__exit__(None, None, None)
    assert model.config._attn_implementation == before


def test_training_is_refused():
    model = model_of("llama")
    compressor = StreamingLLMCompressor(1, 3)
    model.train().requires_grad_(True)
    try:
        with compressor.attached(model), pytest.raises(CacheUseError, match="is for inference"):
            model(tokens(1, 5), past_key_values=compressor.new_cache(model.config))
    finally:
        model.eval().requires_grad_(False)
