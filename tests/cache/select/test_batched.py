"""Heads of several layers that are due at the same time choose at once, and choose what each would alone."""

import pytest
import torch

from kvcompress.cache.layer import CacheState
from kvcompress.cache.select import exchange
from kvcompress.cache.select.layer import SelectLayer
from kvcompress.core.retention import Retention
from kvcompress.scores.registry import SCORES
from tests.cache.cache_tools import LAYERS, feed, model_of, padded, tokens
from tests.cache.select.select_tools import CHOOSING, select_compressor, select_layers
from tests.reference.recorded import recorded_choices

PROMPT, NEW = 25, 13


def decoded(model, layers, prefill, pads, rows=None):
    """Logits, choices and cache of a prompt and single tokens after it."""
    compressor = select_compressor(model, layers)
    ids, mask = padded(3, PROMPT + NEW) if pads else (tokens(3, PROMPT + NEW), None)
    with compressor.attached(model), torch.inference_mode():
        cache = compressor.new_cache(model.config, prefill)
        with recorded_choices(cache) as choices:
            logits = feed(model, cache, ids, [PROMPT] + [1] * NEW, mask)
    return logits, [choice for layer in choices for choice in layer], cache


@pytest.fixture
def weighed(monkeypatch):
    """Return a list that gets the number of heads of every selection before a pass."""
    heads, real = [], exchange.select

    def select(groups, inputs):
        heads.append(sum(len(group.heads) for group in groups))
        real(groups, inputs)

    monkeypatch.setattr(exchange, "select", select)
    return heads


@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("prefill", ["exact", "streaming"])
@pytest.mark.parametrize("score", SCORES)
def test_heads_choose_together_what_they_choose_alone(monkeypatch, weighed, score, prefill, pads):
    model = model_of("llama")
    layers = select_layers(model, score)
    found, together, cache = decoded(model, layers, prefill, pads)
    at_once = list(weighed)
    monkeypatch.setattr("kvcompress.cache.select.exchange.LARGEST", 0)
    weighed.clear()
    expected, alone, other = decoded(model, layers, prefill, pads)
    assert max(at_once) > max(weighed)
    assert sum(at_once) == sum(weighed)
    assert len(at_once) < len(weighed)
    assert len(together) == len(alone) > LAYERS
    for one, twin in zip(together, alone, strict=True):
        assert (one.column, one.heads) == (twin.column, twin.heads)
        assert torch.equal(one.chosen, twin.chosen)
        assert torch.equal(one.leaving, twin.leaving)
    assert (found - expected).abs().max() < 1e-5
    # What one group keeps is no view of what several have in common.
    assert cache.evidence_nbytes == other.evidence_nbytes
    assert cache.nbytes == other.nbytes


def test_no_more_is_laid_side_by_side_than_allowed(monkeypatch, weighed):
    model = model_of("llama")
    width = len(select_layers(model, "key_norm")[0])
    layers = [[Retention(2, 5, 4, "key_norm")] * width] * LAYERS
    for bytes_short, heads in ((0, width * LAYERS), (1, width * (LAYERS - 1))):
        _, _, cache = decoded(model, layers, "streaming", pads=False)
        monkeypatch.setattr("kvcompress.cache.select.exchange.LARGEST", cache.nbytes - bytes_short)
        weighed.clear()
        decoded(model, layers, "streaming", pads=False)
        assert max(weighed) == heads


@pytest.mark.parametrize(
    "other", [Retention(2, 5, 4, "key_diff"), Retention(2, 4, 5, "key_norm"), Retention(1, 5, 5, "key_norm")]
)
def test_heads_that_differ_do_not_choose_as_one(weighed, other):
    model = model_of("llama")
    width = len(select_layers(model, "key_norm")[0])
    decoded(model, [[Retention(2, 5, 4, "key_norm")] * width, [other] * width], "streaming", pads=False)
    assert set(weighed) == {width}


def test_layers_of_different_scaling_do_not_choose_as_one(weighed):
    kept, shared, generator = (
        Retention(2, 5, 4, "snapkv"),
        CacheState("streaming", selection_rule=CHOOSING),
        torch.Generator(),
    )
    layers = [SelectLayer([kept] * 2, shared) for _ in range(3)]
    for _ in range(kept.capacity):
        query, keys, values = (torch.randn(1, 2, 1, 8, generator=generator) for _ in range(3))
        for layer, scale in zip(layers, (0.1, 3.0, 0.1), strict=True):
            layer.attend(query, keys, values, scale, 0.0)
    exchange.select_due(layers)
    assert weighed == [4, 2]
