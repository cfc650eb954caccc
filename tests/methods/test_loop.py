"""The seed's own loop: a pass, then `compress` what came out of it, as often as one likes."""

import pytest
import torch
from transformers import DynamicCache

from kvcompress.core.retention import Retention
from kvcompress.methods import HeadAwareCompressor, head_aware_compress
from tests.cache.cache_tools import FAMILIES, PLANS, compressor_for, feed, inputs_for, model_of, padded, tokens

NEW = 12


def seeds_loop(model, compressor, ids, mask=None, repeats=1):
    """Step 5 of the seed's README, greedy; `compress` may be called more than once a pass."""
    past, out = None, ids
    mask = torch.ones_like(ids) if mask is None else mask
    for _ in range(NEW):
        seen = 0 if past is None else past.get_seq_length()
        kwargs = inputs_for(mask, seen, out.shape[1])
        outputs = model(out[:, seen:], past_key_values=past, use_cache=True, **kwargs)
        past = outputs.past_key_values
        for _ in range(repeats):
            past = compressor.compress(past, attention_mask=mask)
        out = torch.cat((out, outputs.logits[:, -1:].argmax(-1)), dim=1)
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
    return out, past


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loop_gives_the_tokens_of_generate(family, plan, batch):
    model = model_of(family)
    ids, mask = (tokens(1, 25), None) if batch == 1 else padded(3, 25)
    compressor = compressor_for(model, plan)
    with compressor.attached(model):
        new = compressor.new_cache(model.config)
        expected = model.generate(
            ids, attention_mask=mask, past_key_values=new, max_new_tokens=NEW, do_sample=False, pad_token_id=0
        )
        found, past = seeds_loop(model, compressor, ids, mask, repeats=2)
    assert torch.equal(found, expected)
    assert past.held() == new.held()


@pytest.mark.parametrize("family", FAMILIES)
def test_compressing_a_dynamic_cache_equals_exact_prefill(family):
    model = model_of(family)
    ids, mask = padded(3, 40)
    compressor = compressor_for(model, "mixed")
    with compressor.attached(model):
        source = DynamicCache(config=model.config)
        feed(model, source, ids[:, :28], [28], mask[:, :28])
        before = [layer.keys.clone() for layer in source.layers]
        past = compressor.compress(source, attention_mask=mask[:, :28])
        # Compressing leaves the source alone, and what came out of it comes back as it is.
        assert all(torch.equal(layer.keys, keys) for layer, keys in zip(source.layers, before, strict=True))
        assert compressor.compress(past) is past
        assert compressor_for(model, "mixed").compress(past) is past
        kwargs = inputs_for(mask, 28, 40)
        found = model(ids[:, 28:], past_key_values=past, use_cache=True, **kwargs).logits
        expected = feed(model, compressor.new_cache(model.config), ids, [28, 12], mask)[:, 28:]
    assert (found - expected).abs().max() < 1e-5


def test_a_cache_made_without_the_config_of_a_sliding_model():
    model = model_of("mistral")
    ids = tokens(1, 45)
    for plan in ("all_full", "mixed"):
        compressor = compressor_for(model, plan)
        with compressor.attached(model):
            source = DynamicCache()  # knows nothing of the model's sliding window
            feed(model, source, ids[:, :28], [28])
            found = feed(model, compressor.compress(source), ids[:, 28:], [5, 1])
            expected = feed(model, compressor.new_cache(model.config), ids, [28, 5, 1])[:, 28:]
        assert (found - expected).abs().max() < 1e-5


def test_skipped_layers_stay_full_and_count():
    model = model_of("llama")
    compressor = HeadAwareCompressor([[Retention(2, 5)] * 6] * 2, skip_layers=[0])
    with compressor.attached(model):
        past = compressor.compress(model(tokens(1, 30), use_cache=True).past_key_values)
    assert past.held() == [[30] * 3, [7] * 3]
    assert past.nbytes == 2 * 4 * 8 * 3 * (32 + 7)
    assert compressor.get_compression_summary()["compressible_heads"] == 6


def test_the_function_form(tmp_path):
    model = model_of("llama")
    source = model(tokens(1, 30), use_cache=True).past_key_values
    uniform = head_aware_compress(source, num_layers=2, num_heads=6, default_sink_size=3, default_window_size=4)
    assert uniform.held() == [[7] * 3] * 2
    skipping = head_aware_compress(source, num_layers=2, num_heads=6, skip_layers=[1])
    assert skipping.held() == [[12] * 3, [30] * 3]
    given = head_aware_compress(source, compressor=compressor_for(model, "no_sinks"), num_layers=99)
    assert given.held() == [[7] * 3] * 2
    assert head_aware_compress(given, compressor=compressor_for(model, "no_sinks")) is given
