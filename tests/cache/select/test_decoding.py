"""Between two choices a head that selects decodes as a window does: one launch a layer, and steps that can be captured."""

import copy

import pytest
import torch

from kvcompress.cache.cuda_graph import GraphedDecoder
from kvcompress.scores.selection_rule import SelectionRule
from tests.cache.cache_tools import feed, model_of, padded, tokens
from tests.cache.graph_stand_in import stand_in
from tests.cache.select.select_tools import replayed, select_compressor, select_layers
from tests.reference.recorded import recorded_choices

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
