"""Plans whose heads choose keys, and their judge: the oracle that replays what a cache recorded."""

import torch

from kvcompress.core.plan import RetentionPlan
from kvcompress.core.retention import FULL, PRUNED, Retention
from kvcompress.methods import HeadAwareCompressor
from kvcompress.models.architecture import Architecture
from kvcompress.scores.selection_rule import SelectionRule
from tests.cache.cache_tools import LAYERS, feed, inputs_for, real
from tests.reference.oracle import judged
from tests.reference.recorded_selections import recorded_choices

CHOOSING = SelectionRule(every=3, observe=7)


def select_layers(model, score):
    """Heads that choose beside heads of every other kind, `[layer][kv_head]`."""
    width = Architecture.of_config(model.config).num_key_value_heads
    kinds = [Retention(2, 5, 4, score), FULL, Retention(0, 2, 3, score), Retention(2, 5, 4, score), Retention(1, 4)]
    kinds += [PRUNED, Retention(3, 7, 1, "key_norm")]
    return [[kinds[(2 * layer + head) % len(kinds)] for head in range(width)] for layer in range(LAYERS)]


def select_compressor(model, layers, rule=CHOOSING):
    plan = RetentionPlan(tuple(tuple(layer) for layer in layers), model.config.num_attention_heads)
    return HeadAwareCompressor.from_plan(plan, selection_rule=rule)


def uniform(model, kept, rule=CHOOSING):
    width = Architecture.of_config(model.config).num_key_value_heads
    return select_compressor(model, [[kept] * width] * LAYERS, rule)


def replayed(model, layers, choices, ids, mask=None, prompt_length=None):
    """Logits `[batch, column, vocabulary]` of one pass with every head's mask as recorded."""
    with judged(model, layers, "exact" if prompt_length else "streaming", prompt_length, choices):
        return model(ids, use_cache=False, **inputs_for(mask, 0, ids.shape[1])).logits


def furthest(model, compressor, ids, chunks, mask=None, prefill="streaming", prompt_length=None):
    """Largest difference between a cache's logits and the oracle's, and how many choices were made."""
    cache = compressor.new_cache(model.config, prefill, prompt_length)
    with recorded_choices(cache) as choices:
        found = feed(model, cache, ids, chunks, mask)
    prompt_length = (prompt_length or chunks[0]) if prefill == "exact" else None
    expected = replayed(model, compressor.retention, choices, ids, mask, prompt_length)
    return (real(found, mask) - real(expected, mask)).abs().max().item(), sum(map(len, choices))


def all_alike(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
