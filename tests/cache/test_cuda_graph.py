"""Decoding by replays of one captured step gives what ordinary decoding gives, and the cache can go on after it.

Every test runs with steps as they are, with a stand-in for kernel and capture, and on a CUDA device.
"""

import copy

import pytest
import torch
from transformers import StaticCache

from kvcompress.cache.cuda_graph import GraphedDecoder
from kvcompress.core.errors import CacheUseError, InputError, UnsupportedModelError
from kvcompress.methods import StreamingLLMCompressor
from tests.cache.cache_tools import compressor_for, feed, inputs_for, model_of, padded, tokens
from tests.cache.graph_stand_in import stand_in

PROMPT, NEW = 9, 16  # rings fill and turn while steps are replayed
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


@pytest.fixture(params=["as it is", "stand-in", CUDA])
def way(request, monkeypatch):
    if request.param == "stand-in":
        stand_in(monkeypatch)
    return request.param


def moved(family, way, dtype=torch.float32):
    """A tiny model where this way needs it."""
    return copy.deepcopy(model_of(family)).to("cuda" if way == "cuda" else "cpu", dtype)


def texts(way, pads, length=PROMPT + NEW, batch=3):
    """Ids `[batch, length]` and their mask or None."""
    ids, mask = padded(batch, length) if pads else (tokens(batch, length), None)
    if way == "cuda":
        ids, mask = ids.cuda(), None if mask is None else mask.cuda()
    return ids, mask


def begin(model, compressor, ids, mask, prefill="streaming"):
    """A cache with a prompt, `[batch, column]`, and the logits after it."""
    cache = compressor.new_cache(model.config, prefill)
    with torch.inference_mode():
        out = feed(model, cache, ids, [ids.shape[1]], mask)
    return cache, out[:, -1]


CASES = [
    ("gpt_neox", "mixed", False),
    ("gpt_neox", "all_full", False),
    ("llama", "mixed", False),
    ("llama", "pruned_heads", False),
    ("llama", "pruned_layer", False),
    ("llama", "window_1", False),
    ("llama", "window_beyond_text", False),
    ("llama_mqa", "all_full", False),
    ("llama", "mixed", True),
    ("gpt_neox", "no_sinks", True),
    ("llama", "all_full", True),
]


def ordinary(model, cache, ids, mask, column):
    """Logits after an ordinary pass over one column."""
    kwargs = inputs_for(mask, column, column + 1)
    with torch.inference_mode():
        return model(ids[:, column : column + 1], past_key_values=cache, use_cache=True, **kwargs).logits[:, -1]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("family", "plan", "pads"), CASES)
def test_steps_have_the_logits_of_ordinary_passes(way, family, plan, pads, dtype):
    """With an ordinary pass before the capture, one between replays and one after them."""
    model, (ids, mask) = moved(family, way, dtype), texts(way, pads)
    prompt, compressor = PROMPT + (6 if pads else 0), compressor_for(model, plan)
    columns = range(prompt, ids.shape[1])
    with compressor.attached(model):
        cache, _ = begin(model, compressor, ids[:, :prompt], mask)
        decoder, found = GraphedDecoder(model, cache, NEW), []
        for column in columns:
            if column in (prompt + 1, prompt + 5, columns[-1]):
                found.append(ordinary(model, cache, ids, mask, column))
            else:
                decoder.step(ids[:, column])
                found.append(decoder.logits.clone())
            assert all(layer.seen == column + 1 for layer in cache.layers)
        with torch.inference_mode():
            other = compressor.new_cache(model.config, "streaming")
            expected = feed(model, other, ids, [prompt, 1], mask)[:, prompt:]
    head_bytes = model.config.hidden_size // model.config.num_attention_heads * dtype.itemsize
    served = way == "stand-in" or (way == "cuda" and head_bytes % 16 == 0)
    assert decoder.captured == served
    assert cache.held() == other.held()
    assert [cache.layers[0].positions(row) for row in range(3)] == [other.layers[0].positions(row) for row in range(3)]
    found = torch.stack(found, dim=1)
    assert ((found - expected).float().norm(dim=-1) / expected.float().norm(dim=-1)).max() < TOLERANCE[dtype]


@pytest.mark.parametrize("prefill", ["exact", "streaming"])
@pytest.mark.parametrize(("family", "plan", "pads"), CASES)
def test_the_tokens_are_those_of_generate(way, family, plan, pads, prefill):
    model, (ids, mask) = moved(family, way), texts(way, pads)
    compressor = compressor_for(model, plan)
    with compressor.attached(model):
        other = compressor.new_cache(model.config, prefill)
        ones = torch.ones_like(ids) if mask is None else mask  # or generate would take the pad's id for one
        options = {"do_sample": False, "attention_mask": ones}
        more = model.generate(ids, past_key_values=other, max_new_tokens=NEW + 4, **options)
        cache, logits = begin(model, compressor, ids, mask, prefill)
        first = logits.argmax(-1)
        decoder = GraphedDecoder(model, cache, NEW)
        found = decoder.decode(first, NEW)
        assert torch.equal(torch.cat((first[:, None], found), dim=1), more[:, ids.shape[1] : -3])
        # generate goes on where the decoder left off.
        text = torch.cat((ids, first[:, None], found), dim=1)
        options["attention_mask"] = torch.cat((ones, ones.new_ones(3, NEW + 1)), dim=1)
        again = model.generate(text, past_key_values=cache, max_new_tokens=3, **options)
    assert torch.equal(again, more)


def test_what_is_taken_back_is_decoded_again(way):
    model, (ids, mask) = moved("llama", way), texts(way, pads=False)
    compressor = compressor_for(model, "all_full")
    with compressor.attached(model):
        cache, logits = begin(model, compressor, ids, mask)
        decoder = GraphedDecoder(model, cache, NEW)
        found = decoder.decode(logits.argmax(-1), 8)
        cache.crop(-5)
        assert torch.equal(decoder.decode(found[:, 2], 5), found[:, 3:])
        assert decoder.captured == (way != "as it is")


def test_a_recorded_past_is_taken_back_exactly(way):
    """While the past is recorded steps are not replayed, or what a ring overwrites would be lost."""
    model, (ids, mask) = moved("llama", way), texts(way, pads=False)
    compressor = compressor_for(model, "mixed")
    with compressor.attached(model):
        cache, logits = begin(model, compressor, ids, mask)
        decoder = GraphedDecoder(model, cache, NEW)
        found = decoder.decode(logits.argmax(-1), 4)
        cache.activate_past_recording()
        more = decoder.decode(found[:, -1], 5)
        cache.crop(-5)
        assert torch.equal(decoder.decode(found[:, -1], 5), more)


def test_the_full_cache_has_a_twin(way):
    """A `StaticCache` under the same loop chooses what a compressed cache that keeps all chooses."""
    model, (ids, _) = moved("llama", way), texts(way, pads=False)
    static = StaticCache(config=model.config, max_cache_len=ids.shape[1] + NEW)
    with torch.no_grad():
        first = model(ids, past_key_values=static, use_cache=True).logits[:, -1].argmax(-1)
    dense = GraphedDecoder(model, static, NEW)
    found = dense.decode(first, NEW)
    assert dense.captured == (way != "as it is")
    assert int(static.get_seq_length()) == dense.past.seen == ids.shape[1] + NEW
    compressor = compressor_for(model, "all_full")
    with compressor.attached(model):
        cache, _ = begin(model, compressor, ids, None)
        assert torch.equal(GraphedDecoder(model, cache, NEW).decode(first, NEW), found)
    with pytest.raises(CacheUseError, match="has room for 41 tokens and saw 41"):
        dense.step(first)


def test_a_static_cache_that_cannot_be_served_is_refused(way):
    model, (ids, _) = moved("llama", way), texts(way, pads=False)
    static = StaticCache(config=model.config, max_cache_len=40)
    with pytest.raises(CacheUseError, match="holds no tokens yet"):
        GraphedDecoder(model, static, 4)
    with torch.inference_mode():
        model(ids, past_key_values=static, use_cache=True)
    with pytest.raises(CacheUseError, match="filled in inference mode"):
        GraphedDecoder(model, static, 4)
    sliding = moved("mistral", way)
    with pytest.raises(CacheUseError, match="layers of StaticSlidingWindowLayer; expected StaticLayer"):
        GraphedDecoder(sliding, StaticCache(config=sliding.config, max_cache_len=40), 4)


def test_a_reserved_cache_neither_grows_nor_moves(way):
    model, (ids, mask) = moved("llama", way), texts(way, pads=False)
    compressor = compressor_for(model, "mixed")
    with compressor.attached(model):
        cache, _ = begin(model, compressor, ids[:, :PROMPT], mask)
        cache.reserve(PROMPT + NEW)
        heads = [kept.held(PROMPT + NEW) for layer in cache.layers for kept in layer.retention]
        assert cache.nbytes == sum(heads) * 3 * 2 * 8 * 4  # rows, keys and values, head size, bytes
        before = [tensor for layer in cache.layers for group in layer.groups for tensor in group.block.tensors]
        with torch.inference_mode():
            feed(model, cache, ids[:, PROMPT:], [1], mask)
        after = [tensor for layer in cache.layers for group in layer.groups for tensor in group.block.tensors]
        assert all(a is b for a, b in zip(before, after, strict=True))
        cache.reserve(5)  # less than there is
        assert cache.nbytes == sum(heads) * 3 * 2 * 8 * 4


def test_what_cannot_go_on_is_refused(way):
    model, (ids, mask) = moved("llama", way), texts(way, pads=False)
    compressor = compressor_for(model, "mixed")
    with compressor.attached(model):
        with pytest.raises(CacheUseError, match="no token was seen yet"):
            GraphedDecoder(model, compressor.new_cache(model.config), 4)
        with pytest.raises(CacheUseError, match="is a DynamicCache; expected"):
            GraphedDecoder(model, model(ids, use_cache=True).past_key_values, 4)
        unfinished = compressor.new_cache(model.config, prompt_length=20)
        feed(model, unfinished, ids[:, :5], [5])
        with pytest.raises(CacheUseError, match="prompt is not complete, 5 tokens of it were seen"):
            GraphedDecoder(model, unfinished, 4)
        cache, logits = begin(model, compressor, ids, mask)
        with pytest.raises(InputError, match="max_new_tokens is 0"):
            GraphedDecoder(model, cache, 0)
        decoder, first = GraphedDecoder(model, cache, 6), logits.argmax(-1)
        with pytest.raises(CacheUseError, match="holds a batch of 3, but got tokens of 2 rows"):
            decoder.step(first[:2])
        with pytest.raises(CacheUseError, match="has room for 32 tokens and saw 25, so 8 more do not fit"):
            decoder.decode(first, 8)
        decoder.decode(first, 7)
        with pytest.raises(CacheUseError, match="room for 32 tokens and saw 32"):
            decoder.step(first)


def test_a_replay_refuses_what_has_moved(way):
    if way == "as it is":
        return
    model, (ids, mask) = moved("llama", way), texts(way, pads=False)
    compressor = compressor_for(model, "mixed")
    with compressor.attached(model):
        cache, logits = begin(model, compressor, ids, mask)
        decoder, first = GraphedDecoder(model, cache, 6), logits.argmax(-1)
        decoder.decode(first, 3)
        cache.reorder_cache(torch.tensor([2, 0, 1], device=ids.device))
        with pytest.raises(CacheUseError, match="moved in memory since a step was captured"):
            decoder.step(first)
        assert GraphedDecoder(model, cache, 3).decode(first, 3).shape == (3, 3)


@pytest.mark.parametrize("family", ["mistral", "llama"])
def test_where_the_kernel_cannot_serve_for_good_nothing_is_captured(way, family):
    """The model's own window will hide sinks; positions inside the cache turn queries."""
    model, (ids, mask) = moved(family, way), texts(way, pads=False)
    compressor = compressor_for(model, "mixed")
    if family == "llama":
        compressor = StreamingLLMCompressor(2, 6, positions="cache")
    with compressor.attached(model):
        cache, logits = begin(model, compressor, ids[:, :PROMPT], mask)
        decoder = GraphedDecoder(model, cache, NEW)
        found = decoder.decode(logits.argmax(-1), NEW)
        other = compressor.new_cache(model.config, "streaming")
        more = model.generate(ids[:, :PROMPT], past_key_values=other, max_new_tokens=NEW + 1, do_sample=False)
    assert torch.equal(found, more[:, PROMPT + 1 :])
    assert not decoder.captured


def test_a_step_that_cannot_be_captured_leaves_the_counts_alone(monkeypatch):
    stand_in(monkeypatch)
    model, (ids, mask) = model_of("llama"), texts("stand-in", pads=False)
    compressor = compressor_for(model, "mixed")

    def fails(act, device):
        act()
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr("kvcompress.cache.cuda_graph.record", fails)
    with compressor.attached(model):
        cache, logits = begin(model, compressor, ids, mask)
        decoder = GraphedDecoder(model, cache, 6)
        found = decoder.step(logits.argmax(-1))
        with pytest.raises(
            UnsupportedModelError, match="LlamaForCausalLM cannot be captured in a CUDA graph: operation"
        ):
            decoder.step(found)
        assert cache.seen == ids.shape[1] + 1
        assert all(group.seen == cache.seen for layer in cache.layers for group in layer.groups)
