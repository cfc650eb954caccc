"""Strategy select at its edges: half precision, windows of a token, more to choose than there is, choices every token."""

import pytest
import torch

from kvcompress.core.retention import Retention
from kvcompress.scores.registry import SCORES
from kvcompress.scores.selection_rule import SelectionRule
from tests.cache.cache_tools import model_of, padded, tokens
from tests.cache.select.select_tools import furthest, select_compressor, select_layers

LENGTH = 40


@pytest.mark.parametrize("score", SCORES)
def test_bfloat16_agrees_with_the_recorded_choices(score):
    model, (ids, mask) = model_of("llama", torch.bfloat16), padded(3, LENGTH)
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
