"""Mask oracle of strategy select: a cache computes masked attention over the positions it recorded to hold."""

import copy
from dataclasses import replace

import pytest
import torch

from kvcompress.cache.cuda_graph import GraphedDecoder
from kvcompress.core.retention import Retention
from kvcompress.scores.registry import SCORES
from kvcompress.scores.selection_rule import SelectionRule
from kvcompress.scores.snapkv import SnapKV
from tests.cache.cache_tools import feed, model_of, padded, tokens
from tests.cache.graph_stand_in import stand_in
from tests.cache.select.select_tools import CHOOSING, furthest, replayed, select_compressor, select_layers
from tests.reference.recorded_selections import recorded_choices

LENGTH = 34
FEEDS = {"one_shot": [LENGTH], "chunks": [17, 9, 1, 8], "token_by_token": [1]}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_the_cache_agrees_with_the_recorded_choices(family, score, batch):
    model, ids = model_of(family), tokens(batch, LENGTH)
    compressor = select_compressor(model, select_layers(model, score))
    with compressor.attached(model):
        for name, chunks in FEEDS.items():
            off, made = furthest(model, compressor, ids, chunks)
            assert made > 15, name
            assert off < 1e-5, name
        for chunks, prompt_length in (([17, 9, 1, 7], None), ([11, 9, 1], 24)):
            off, made = furthest(model, compressor, ids, chunks, None, "exact", prompt_length)
            assert made > 5
            assert off < 1e-5, (chunks, prompt_length)


@pytest.mark.parametrize("score", SCORES)
def test_padded_rows_agree_with_the_recorded_choices(score):
    model, (ids, mask) = model_of("llama"), padded(3, LENGTH)
    compressor = select_compressor(model, select_layers(model, score))
    with compressor.attached(model):
        for chunks in ([LENGTH], [3, 3, 3, 3, 9, 1]):
            assert furthest(model, compressor, ids, chunks, mask)[0] < 1e-5
        for chunks in ([17, 1], [27, 1, 6]):
            assert furthest(model, compressor, ids, chunks, mask, "exact")[0] < 1e-5


@pytest.mark.parametrize("prefill", ["exact", "streaming"])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_generate_agrees_with_the_recorded_choices(family, score, prefill):
    model, ids = model_of(family), tokens(3, 20)
    layers = select_layers(model, score)
    compressor = select_compressor(model, layers)
    with compressor.attached(model):
        cache = compressor.new_cache(model.config, prefill)
        options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        with recorded_choices(cache) as choices:
            found = model.generate(
                ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=15, **options
            )
    text = found.sequences[:, :-1]
    expected = replayed(model, layers, choices, text, None, 20 if prefill == "exact" else None)[:, 19:]
    assert (torch.stack(found.logits, dim=1) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("score", SCORES)
def test_the_same_text_makes_the_same_choices_however_it_is_cut(score):
    model = model_of("llama")
    # No token comes twice: in the first layer its keys would tie but for rounding.
    ids = torch.stack([1 + torch.randperm(90, generator=torch.Generator().manual_seed(i))[:LENGTH] for i in (0, 1)])
    # Nor are scores pooled: the means of neighbours are of the same keys.
    choosing = replace(CHOOSING, scores={"snapkv": SnapKV(kernel=1)})
    compressor = select_compressor(model, select_layers(model, score), choosing)
    for prefill, prompt_length, feeds in (
        ("streaming", None, list(FEEDS.values())),
        ("exact", 25, [[25, 1], [11, 9, 1, 8], [LENGTH]]),
    ):
        expected = None
        for chunks in feeds:
            cache = compressor.new_cache(model.config, prefill, prompt_length)
            with compressor.attached(model), recorded_choices(cache) as choices:
                logits = feed(model, cache, ids, chunks)
            # A long pass reads group by group, so groups may note their choices in another order.
            record = [(i, c.column, c.heads, c.chosen.tolist(), c.leaving.tolist()) for i in (0, 1) for c in choices[i]]
            found = sorted(record), logits, cache.layers[0].positions(1)
            expected = expected or found
            assert found[0] == expected[0]
            assert (logits - expected[1]).abs().max() < 1e-5
            assert found[2] == expected[2]


def test_the_judge_sees_a_choice_that_was_not_made():
    model, ids = model_of("llama"), tokens(1, LENGTH)
    layers = select_layers(model, "key_diff")
    compressor = select_compressor(model, layers)
    with compressor.attached(model):
        cache = compressor.new_cache(model.config, "streaming")
        with recorded_choices(cache) as choices:
            found = feed(model, cache, ids, [LENGTH])
    for wrong in ([[], []], [choices[0], choices[1][:-1]]):
        assert (found - replayed(model, layers, wrong, ids)).abs().max() > 1e-3


@pytest.mark.parametrize("score", SCORES)
def test_bfloat16_agrees_with_the_recorded_choices(score):
    model, (ids, mask) = model_of("llama", torch.bfloat16), padded(3, 40)
    compressor = select_compressor(model, select_layers(model, score))
    with compressor.attached(model):
        for prefill, chunks in (("streaming", [17, 9, 1, 8]), ("exact", [30, 1])):
            off, made = furthest(model, compressor, ids, chunks, mask, prefill)
            assert made > 5
            assert off < 5e-2  # neighbouring numbers of this precision are 0.03 apart there


@pytest.mark.parametrize("score", ["key_diff", "snapkv", "accumulated_attention"])
def test_a_pass_may_be_longer_than_the_window_and_many_choices(score):
    """One query head a KV head or all to one, windows of a token, more to choose than is ever there."""
    kinds = [
        Retention(0, 1, 3, score),
        Retention(0, 2, 40, score),
        Retention(5, 1, 1, score),
        Retention(1, 9, 2, score),
    ]
    for family, heads, choosing, chunk in (
        ("gpt_neox", kinds, SelectionRule(every=1, observe=1), 24),
        ("llama_mqa", kinds[:1], SelectionRule(), 1),
    ):
        model = model_of(family)
        compressor = select_compressor(model, [heads, heads[::-1]], choosing)
        with compressor.attached(model):
            assert furthest(model, compressor, tokens(2, 24), [chunk])[0] < 1e-5


PROMPT, NEW = 18, 16
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))


@pytest.mark.parametrize("way", ["as it is", "stand-in", CUDA])
@pytest.mark.parametrize("prefill", ["exact", "streaming"])
@pytest.mark.parametrize("score", ["key_diff", "snapkv", "accumulated_attention"])
@pytest.mark.parametrize("pads", [False, True])
def test_captured_steps_choose_when_it_is_time(monkeypatch, way, prefill, score, pads):
    if way == "stand-in":
        stand_in(monkeypatch)
    device = "cuda" if way == "cuda" else "cpu"
    model = copy.deepcopy(model_of("gpt_neox")).to(device)  # whose heads of 16 the kernel can serve
    prompt = PROMPT + (6 if pads else 0)
    ids, mask = padded(3, prompt) if pads else (tokens(3, prompt), None)
    ids, mask = ids.to(device), None if mask is None else mask.to(device)
    layers = select_layers(model, score)
    compressor = select_compressor(model, layers, SelectionRule(every=4, observe=6))
    with compressor.attached(model), torch.inference_mode():
        cache = compressor.new_cache(model.config, prefill)
        with recorded_choices(cache) as choices:
            first = feed(model, cache, ids, [prompt], mask)[:, -1].argmax(-1)
            decoder, logits, token, text = GraphedDecoder(model, cache, NEW), [], first, [ids]
            for _ in range(NEW):
                text.append(token[:, None])
                token = decoder.step(token)
                logits.append(decoder.logits.clone())
    assert decoder.captured == (way != "as it is")
    text = torch.cat(text, dim=1)
    whole = None if mask is None else torch.nn.functional.pad(mask, (0, NEW), value=1)
    expected = replayed(model, layers, choices, text, whole, prompt if prefill == "exact" else None)[:, prompt:]
    assert sum(map(len, choices)) > 8
    assert (torch.stack(logits, dim=1) - expected).abs().max() < (1e-3 if way == "cuda" else 1e-5)


@pytest.mark.parametrize("score", SCORES)
def test_a_padded_row_selects_in_its_prompt_what_it_selects_alone(score):
    model, (ids, mask) = model_of("llama"), padded(3, LENGTH)
    compressor = select_compressor(model, select_layers(model, score))
    with compressor.attached(model):
        together, alone = compressor.new_cache(model.config), compressor.new_cache(model.config)
        feed(model, together, ids, [LENGTH], mask)
        for row in range(3):
            alone.reset()
            feed(model, alone, ids[row : row + 1, 5 * row :], [LENGTH])
            for layer, other in zip(together.layers, alone.layers, strict=True):
                assert layer.positions(row) == other.positions()
