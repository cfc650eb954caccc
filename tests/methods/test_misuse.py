"""Wrong use ends in an error that names what was found and what was expected, and harms nothing."""

import pytest
import torch
from transformers import (
    BertConfig,
    DynamicCache,
    EncoderDecoderCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    StaticCache,
    T5Config,
)
from transformers.cache_utils import Cache, QuantizedLayer

from kvcompress.core.errors import CacheUseError, InputError, UnsupportedModelError
from kvcompress.core.plan import RetentionPlan
from kvcompress.core.retention import Retention
from kvcompress.methods import HeadAwareCompressor, RecentOnlyCompressor, StreamingLLMCompressor, head_aware_compress
from tests.cache.cache_tools import compressor_for, feed, inputs_for, model_of, padded, tokens


@pytest.fixture
def model():
    return model_of("llama")


@pytest.fixture
def compressor(model):
    return compressor_for(model, "mixed")


@pytest.mark.parametrize("own", ["sdpa", "eager"])
@pytest.mark.parametrize("tokens_before", [0, 20])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2", "mistral"])
def test_a_model_that_is_not_attached(family, tokens_before, own):
    model = model_of(family)
    compressor = compressor_for(model, "mixed")
    ids = tokens(1, 30)
    cache = compressor.new_cache(model.config)
    with compressor.attached(model):
        if tokens_before:
            feed(model, cache, ids[:, :20], [20])
        expected = feed(model, compressor.new_cache(model.config), ids, [tokens_before or 30, 10])[:, tokens_before:]
    model.set_attn_implementation(own)
    try:
        for rest in (ids[:, tokens_before:], ids[:, :1]):
            with pytest.raises(CacheUseError, match=r"with compressor\.attached\(model\)"):
                model(rest, past_key_values=cache, use_cache=True)
    finally:
        model.set_attn_implementation("sdpa")
    # Nothing was stored: the cache goes on where it was.
    assert cache.get_seq_length() == tokens_before
    with compressor.attached(model):
        assert torch.equal(feed(model, cache, ids[:, tokens_before:], [30]), expected)


def test_sdpa_forced_while_attached(model, compressor):
    with compressor.attached(model):
        model.set_attn_implementation("sdpa")
        with pytest.raises(CacheUseError, match="leave its attn_implementation alone"):
            model.generate(tokens(1, 5), past_key_values=compressor.new_cache(model.config), max_new_tokens=2)
    assert model.config._attn_implementation == "sdpa"


def test_a_plan_of_another_architecture(model):
    deeper = HeadAwareCompressor.from_plan(RetentionPlan.uniform(Retention(4, 8), 5, 3, 6))
    wider = HeadAwareCompressor.from_plan(RetentionPlan.uniform(Retention(4, 8), 2, 6, 6))
    classes = HeadAwareCompressor([[Retention(4, 8)] * 12] * 2)
    filled = model(tokens(1, 5), use_cache=True).past_key_values
    for wrong, message in (
        (deeper, "made for 5 layers, not 2"),
        (wider, "made for 6 KV heads a layer, not 3"),
        (classes, "made for 12 query heads a layer, not 6"),
    ):
        with pytest.raises(InputError, match=message):
            wrong.new_cache(model.config)
        with pytest.raises(InputError, match=message), wrong.attached(model):
            pass
        if wrong is not classes:  # a cache does not tell how many query heads there are
            with pytest.raises(InputError, match=message):
                wrong.compress(filled)
    with pytest.raises(InputError, match="made for 32 layers, not 2"):
        head_aware_compress(filled)
    with pytest.raises(InputError, match="skip_layers names layer 7"):
        HeadAwareCompressor.from_model_config(model.config, skip_layers=[7]).new_cache(model.config)


def test_a_cache_of_another_architecture(model):
    other = model_of("qwen3")  # two KV heads a layer, not three
    cache = compressor_for(other, "mixed").new_cache(other.config)
    with compressor_for(model, "mixed").attached(model), pytest.raises(CacheUseError, match="2 KV heads a layer"):
        model(tokens(1, 5), past_key_values=cache)
    shallow = HeadAwareCompressor([[Retention(4, 8)] * 6], query_heads=True)
    cache = compressor_for(model, "mixed").new_cache(model.config)
    del cache.layers[1]
    with shallow_attached(model), pytest.raises(CacheUseError, match="made for 1 layers; the model has a layer 1"):
        model(tokens(1, 5), past_key_values=cache)
    with pytest.raises(InputError, match="made for 1 layers, not 2"):
        shallow.new_cache(model.config)


def shallow_attached(model):
    return compressor_for(model, "mixed").attached(model)


def quantised():
    class Layer(QuantizedLayer):
        def _quantize(self, tensor, axis):
            return tensor

        def _dequantize(self, tensor):
            return tensor

    return Cache(layers=[Layer(), Layer()])  # what QuantizedCache is, without a quantisation library


def test_caches_that_cannot_be_compressed(model, compressor):
    offloaded = model(tokens(1, 5), use_cache=True).past_key_values
    offloaded.offloading = True
    filled = model(tokens(1, 5), use_cache=True).past_key_values
    for cache, message in (
        (offloaded, "offloaded cache cannot be compressed"),
        (quantised(), "layer 0 of the cache is a Layer, expected a plain DynamicCache"),
        (StaticCache(config=model.config, max_cache_len=9), "is a StaticLayer, expected a plain DynamicCache"),
        (EncoderDecoderCache(filled, DynamicCache()), "EncoderDecoderCache"),
        (DynamicCache(), "holds no tokens yet"),
        (DynamicCache(config=model.config), "layer 0 of the cache holds no tokens yet"),
        (((torch.zeros(1, 3, 4, 8),) * 2,) * 2, "takes a transformers Cache, got a tuple"),
        (None, "got a NoneType"),
    ):
        with pytest.raises(CacheUseError, match=message):
            compressor.compress(cache)


def test_a_cache_that_another_method_compressed(model, compressor):
    past = compressor.compress(model(tokens(1, 20), use_cache=True).past_key_values)
    for other in (RecentOnlyCompressor(7), compressor_for(model, "no_sinks")):
        with pytest.raises(CacheUseError, match="already compressed by another method"):
            other.compress(past)


@pytest.mark.parametrize("prefill", ["exact", "streaming"])
def test_padding_that_is_not_left_padding(model, compressor, prefill):
    ids, ones = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    right, hole = ones.clone(), ones.clone()
    right[1, 9:] = 0
    hole[0, 4] = 0
    with compressor.attached(model):
        for mask in (right, hole):
            cache = compressor.new_cache(model.config, prefill=prefill)
            with pytest.raises(CacheUseError, match="only left padding can be compressed"):
                model(ids, attention_mask=mask, past_key_values=cache)
        cache = compressor.new_cache(model.config, prefill=prefill)
        with pytest.raises(CacheUseError, match="has 12 columns; expected 0 seen \\+ 10"):
            model(ids[:, :10], attention_mask=ones, past_key_values=cache)
        with pytest.raises(CacheUseError, match="got a ready-made mask"):
            model(ids, attention_mask=torch.ones(2, 1, 12, 12, dtype=torch.bool), past_key_values=cache)
    source = model(ids, attention_mask=right, use_cache=True).past_key_values
    with pytest.raises(CacheUseError, match="only left padding"):
        compressor.compress(source, attention_mask=right)


def test_padding_that_changes_on_the_way(model, compressor):
    ids, mask = padded(3, 30)
    with compressor.attached(model):
        cache = compressor.new_cache(model.config)
        feed(model, cache, ids[:, :20], [20], mask[:, :20])
        with pytest.raises(CacheUseError, match="the pass has no attention_mask"):
            model(ids[:, 20:], past_key_values=cache)
        with pytest.raises(CacheUseError, match="disagrees with the padding"):
            model(ids[:, 20:], past_key_values=cache, attention_mask=torch.ones(3, 30))
        unpadded = compressor.new_cache(model.config)
        feed(model, unpadded, ids[:, :20], [20])
        with pytest.raises(CacheUseError, match="disagrees with the padding"):
            model(ids[:, 20:], past_key_values=unpadded, **inputs_for(mask, 20, 30))
        with pytest.raises(CacheUseError, match=r"holds batch 3.* but got batch 2"):
            model(ids[:2, 20:], past_key_values=unpadded)


def test_numbers_and_words_that_make_no_sense(model):
    for build, message in (
        (lambda: HeadAwareCompressor.from_model_config(model.config, window_size=-2), "window_size is -2"),
        (lambda: HeadAwareCompressor.from_model_config(model.config, window_size=0), "window_size is 0"),
        (lambda: HeadAwareCompressor.from_model_config(model.config, sink_size=-1), "sink_size is -1"),
        (lambda: HeadAwareCompressor.from_model_config(model.config, "sparse"), "unknown strategy 'sparse'"),
        (lambda: HeadAwareCompressor([[Retention(4, 8)]], join="mean"), "unknown rule 'mean'"),
        (lambda: HeadAwareCompressor([]), "at least one layer"),
        (lambda: RecentOnlyCompressor(0), "window_size is 0"),
        (lambda: StreamingLLMCompressor(start_size=-1), "start_size is -1"),
        (lambda: StreamingLLMCompressor(recent_size=2.5), "recent_size is 2.5"),
        (lambda: StreamingLLMCompressor(positions="inside"), "positions is 'inside'"),
    ):
        with pytest.raises(InputError, match=message):
            build()
    compressor = compressor_for(model, "mixed")
    with pytest.raises(InputError, match="prefill is 'lazy'"):
        compressor.new_cache(model.config, prefill="lazy")
    with pytest.raises(InputError, match=r"prompt_length is 5; expected .* only with exact prefill"):
        compressor.new_cache(model.config, prefill="streaming", prompt_length=5)


def test_models_without_an_ordinary_cache():
    compressor = StreamingLLMCompressor()
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        compressor.new_cache(T5Config())
    config = BertConfig(num_hidden_layers=2)
    config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(UnsupportedModelError, match="layer 1 of bert is linear_attention"):
        compressor.new_cache(config)


def test_attention_with_terms_of_its_own():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": 96}
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, num_attention_heads=2, num_key_value_heads=1)).eval()
    compressor = StreamingLLMCompressor()
    cache = compressor.new_cache(model.config)
    with (
        compressor.attached(model),
        pytest.raises(UnsupportedModelError, match="a compressed cache does not know the softcap"),
    ):
        model(tokens(1, 5), past_key_values=cache)
