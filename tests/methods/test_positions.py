"""`positions="cache"`: against attention over unrotated keys that are rotated for their place in the cache."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama

from kvcompress.core.errors import InputError, UnsupportedModelError
from kvcompress.methods import StreamingLLMCompressor, streaming_llm
from tests.cache.cache_tools import feed, model_of, padded, tokens

START, RECENT = 3, 9


def slow(model, ids):
    """The last token's logits after every prefix, each from scratch, as the paper defines streaming.

    Query by query: the keys of the first START and last RECENT tokens, none rotated yet, get the positions 0, 1, 2, ...
    in the order in which they lie in the cache, and the query the last of them. Hidden states of all tokens are needed
    in every layer, so the layers are walked by hand.
    """
    neox = model.config.model_type == "gpt_neox"
    base = model.gpt_neox if neox else model.model
    rotate = modeling_gpt_neox.apply_rotary_pos_emb if neox else modeling_llama.apply_rotary_pos_emb
    hidden = base.embed_in(ids) if neox else base.embed_tokens(ids)
    length = ids.shape[1]
    for layer in base.layers:
        normed = layer.input_layernorm(hidden)
        if neox:
            size = layer.attention.head_size
            fused = layer.attention.query_key_value(normed).view(1, length, -1, 3 * size).transpose(1, 2)
            query, key, value = fused.chunk(3, dim=-1)
        else:
            size, attention = layer.self_attn.head_dim, layer.self_attn
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            query, key, value = (p(normed).view(1, length, -1, size).transpose(1, 2) for p in projections)
            key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
        rows = []
        for p in range(length):
            held = [k for k in range(p + 1) if k < START or k > p - RECENT]
            cos, sin = base.rotary_emb(hidden, torch.arange(len(held))[None])
            _, keys = rotate(key[:, :, held], key[:, :, held], cos, sin)
            _, turned = rotate(query[:, :, p : p + 1], query[:, :, p : p + 1], cos[:, -1:], sin[:, -1:])
            weights = (turned @ keys.transpose(2, 3) * size**-0.5).softmax(-1)
            rows.append((weights @ value[:, :, held]).transpose(1, 2).reshape(1, 1, -1))
        out = torch.cat(rows, dim=1)
        if neox:
            hidden = layer.attention.dense(out) + layer.mlp(layer.post_attention_layernorm(hidden)) + hidden
        else:
            hidden = hidden + layer.self_attn.o_proj(out)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.get_output_embeddings()(base.final_layer_norm(hidden)) if neox else model.lm_head(base.norm(hidden))


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "llama_mqa"])
def test_positions_inside_the_cache_follow_the_paper(family):
    model = model_of(family)
    assert family != "gpt_neox" or model.config.rope_parameters["partial_rotary_factor"] == 0.25
    ids = tokens(1, 45)
    expected = slow(model, ids)
    compressor = StreamingLLMCompressor(START, RECENT, positions="cache")
    with compressor.attached(model):
        for chunks in ([45], [1], [17, 11, 1, 9], [2, 30, 1]):
            cache = compressor.new_cache(model.config, prefill="streaming")
            assert (feed(model, cache, ids, chunks) - expected).abs().max() < 1e-5
    plain = StreamingLLMCompressor(START, RECENT)
    with plain.attached(model):
        other = feed(model, plain.new_cache(model.config, prefill="streaming"), ids, [45])
    assert (other - expected)[:, : START + RECENT].abs().max() < 1e-5
    assert (other - expected)[:, START + RECENT :].abs().max() > 1e-3  # the two do differ where it matters


def test_a_padded_row_is_renumbered_by_its_own_length():
    model = model_of("gpt_neox")
    ids, mask = padded(3, 45)
    compressor = StreamingLLMCompressor(START, RECENT, positions="cache")
    with compressor.attached(model):
        for chunks in ([45], [8, 20, 1]):
            found = feed(model, compressor.new_cache(model.config, prefill="streaming"), ids, chunks, mask)
            for row in range(3):
                assert (found[row, 5 * row :] - slow(model, ids[row : row + 1, 5 * row :])[0]).abs().max() < 1e-5


def test_compress_renumbers_from_its_first_token_on():
    model = model_of("llama")
    ids = tokens(1, 45)
    compressor = StreamingLLMCompressor(START, RECENT, positions="cache")
    with compressor.attached(model):
        expected = feed(model, compressor.new_cache(model.config), ids, [30, 1])[:, 30:]
        source = DynamicCache(config=model.config)
        feed(model, source, ids[:, :30], [30])
        with pytest.raises(InputError, match=r"pass config=model\.config"):
            compressor.compress(source)
        past = streaming_llm(source, START, RECENT, positions="cache", config=model.config)
        assert torch.allclose(feed(model, past, ids[:, 30:], [1]), expected, atol=1e-6)


def test_no_distance_ever_exceeds_the_cache_far_beyond_the_trained_context():
    """A text that repeats with period 12 looks the same from everywhere once the cache has turned over."""
    model = model_of("llama")  # trained context: 128 positions
    period = tokens(1, RECENT)
    ids = torch.cat((tokens(1, START, seed=8), period.repeat(1, 400)), dim=1)
    compressor = StreamingLLMCompressor(START, RECENT, positions="cache")
    with compressor.attached(model):
        cache = compressor.new_cache(model.config, prefill="streaming")
        logits = feed(model, cache, ids, [256])
    assert logits.isfinite().all()
    early, late = logits[:, START + 20 * RECENT :][:, :RECENT], logits[:, -RECENT:]
    assert (early - late).abs().max() < 2e-3
    plain = StreamingLLMCompressor(START, RECENT)
    with plain.attached(model):
        logits = feed(model, plain.new_cache(model.config, prefill="streaming"), ids, [256])
    early, late = logits[:, START + 20 * RECENT :][:, :RECENT], logits[:, -RECENT:]
    assert (early - late).abs().max() > 2e-2  # with positions of the text the sinks drift away


def test_models_whose_rotation_is_not_known():
    compressor = StreamingLLMCompressor(positions="cache")
    with pytest.raises(UnsupportedModelError, match="not of 'gpt2'"):
        compressor.new_cache(model_of("gpt2").config)
    scaled = LlamaConfig(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    with pytest.raises(UnsupportedModelError, match="this model's is 'dynamic'"):
        compressor.new_cache(scaled)
