"""`generate` in all its ways, continuation over several turns, and several caches on one model."""

import pytest
import torch
from transformers import DynamicCache

from tests.cache.cache_tools import FAMILIES, compressor_for, inputs_for, model_of, padded, plan_for, tokens
from tests.reference.oracle import judged

NEW = 14
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}


def oracle_greedy(model, plan, ids, mask, prefill):
    """Greedy decoding without any cache: the whole text through the mask oracle for every token."""
    prompt = ids.shape[1] if prefill == "exact" else None
    mask = torch.ones_like(ids) if mask is None else mask
    with judged(model, plan_for(model, plan), prefill, prompt):
        for _ in range(NEW):
            logits = model(ids, use_cache=False, **inputs_for(mask, 0, ids.shape[1])).logits
            ids = torch.cat((ids, logits[:, -1:].argmax(-1)), dim=1)
            mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
    return ids


@pytest.mark.parametrize("prefill", ["exact", "streaming"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_gives_the_oracles_tokens(family, batch, prefill):
    model = model_of(family)
    ids, mask = (tokens(1, 22), None) if batch == 1 else padded(3, 22)
    compressor = compressor_for(model, "mixed")
    expected = oracle_greedy(model, "mixed", ids, mask, prefill)
    with compressor.attached(model):
        cache = compressor.new_cache(model.config, prefill=prefill)
        found = model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
    assert torch.equal(found, expected)
    assert cache.get_seq_length() == 22 + NEW - 1


def test_sampling_with_a_full_plan_draws_the_dynamic_caches_tokens():
    model = model_of("llama")
    ids = tokens(2, 12)
    sample = {**GREEDY, "do_sample": True}
    torch.manual_seed(5)
    expected = model.generate(ids, past_key_values=DynamicCache(config=model.config), **sample)
    compressor = compressor_for(model, "all_full")
    with compressor.attached(model):
        torch.manual_seed(5)
        found = model.generate(ids, past_key_values=compressor.new_cache(model.config), **sample)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("family", ["gpt_neox", "mistral"])
def test_beam_search_with_a_full_plan_gives_the_dynamic_caches_tokens(family):
    model = model_of(family)
    ids, mask = padded(2, 12)
    beams = {**GREEDY, "num_beams": 3, "attention_mask": mask}
    expected = model.generate(ids, past_key_values=DynamicCache(config=model.config), **beams)
    compressor = compressor_for(model, "all_full")
    with compressor.attached(model):
        found = model.generate(ids, past_key_values=compressor.new_cache(model.config), **beams)
    assert torch.equal(found, expected)


def test_beam_search_scores_are_the_oracles():
    """Every beam's score, summed by `generate` over reordered caches, is the oracle's score of that text."""
    model = model_of("llama")
    ids = tokens(1, 20)
    compressor = compressor_for(model, "mixed")
    with compressor.attached(model):
        found = model.generate(
            ids,
            past_key_values=compressor.new_cache(model.config, prefill="streaming"),
            num_beams=4,
            num_return_sequences=4,
            length_penalty=0.0,
            return_dict_in_generate=True,
            output_scores=True,
            **GREEDY,
        )
    with judged(model, plan_for(model, "mixed")):
        logits = model(found.sequences, use_cache=False).logits.log_softmax(-1)
    of_tokens = logits[:, 19:-1].gather(2, found.sequences[:, 20:, None])[..., 0].sum(-1)
    assert (of_tokens - found.sequences_scores).abs().max() < 1e-4


@pytest.mark.parametrize("prefill", ["exact", "streaming"])
@pytest.mark.parametrize("plan", ["mixed", "window_1", "all_full", "pruned_layer"])
def test_assisted_decoding_rolls_back_exactly(plan, prefill):
    model, assistant = model_of("llama"), model_of("llama_mqa")
    ids = tokens(1, 22)
    compressor = compressor_for(model, plan)
    with compressor.attached(model):
        expected = model.generate(ids, past_key_values=compressor.new_cache(model.config, prefill=prefill), **GREEDY)
        cache = compressor.new_cache(model.config, prefill=prefill)
        found = model.generate(ids, past_key_values=cache, assistant_model=assistant, **GREEDY)
        lookup = compressor.new_cache(model.config, prefill=prefill)
        by_lookup = model.generate(ids, past_key_values=lookup, prompt_lookup_num_tokens=5, **GREEDY)
    assert torch.equal(found, expected)
    assert torch.equal(by_lookup, expected)


def test_a_second_turn_continues_where_the_first_ended():
    model = model_of("qwen3")
    compressor = compressor_for(model, "mixed")
    with compressor.attached(model):
        cache = compressor.new_cache(model.config, prefill="streaming")
        first = model.generate(tokens(1, 15), past_key_values=cache, **GREEDY)
        both = torch.cat((first, tokens(1, 11, seed=3)), dim=1)
        mask = torch.ones_like(both)  # else generate takes a generated 0 for padding
        found = model.generate(both, attention_mask=mask, past_key_values=cache, **GREEDY)
    assert torch.equal(found, oracle_greedy(model, "mixed", both, None, "streaming"))


def test_generate_may_feed_the_prompt_in_chunks():
    model = model_of("gpt_neox")
    ids = tokens(1, 30)
    compressor = compressor_for(model, "mixed")
    with compressor.attached(model):
        cache = compressor.new_cache(model.config, prefill="exact", prompt_length=30)
        found = model.generate(ids, past_key_values=cache, prefill_chunk_size=8, **GREEDY)
    assert torch.equal(found, oracle_greedy(model, "mixed", ids, None, "exact"))


def test_caches_on_one_model_do_not_know_each_other():
    model = model_of("llama")
    plans = ["mixed", "no_sinks", "all_full"]
    texts = {name: tokens(1, 30, seed=i) for i, name in enumerate(plans)}
    found = {name: [] for name in plans}
    compressors = {name: compressor_for(model, name) for name in plans}
    with compressors["mixed"].attached(model):
        caches = {name: compressors[name].new_cache(model.config, prefill="streaming") for name in plans}
        for at in range(0, 30, 5):
            for name in plans:
                ids = texts[name][:, at : at + 5]
                found[name].append(model(ids, past_key_values=caches[name], use_cache=True).logits)
    for name in plans:
        with judged(model, plan_for(model, name)):
            expected = model(texts[name], use_cache=False).logits
        assert (torch.cat(found[name], dim=1) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_an_attached_model_without_a_compressed_cache_is_as_before(family):
    model = model_of(family)
    ids, mask = padded(3, 30)
    compressor = compressor_for(model, "mixed")

    def run():
        kwargs = inputs_for(mask, 0, 30)
        plain = model(ids, use_cache=False, **kwargs).logits
        cached = model(ids, past_key_values=DynamicCache(config=model.config), use_cache=True, **kwargs).logits
        return plain, cached, model.generate(ids, attention_mask=mask, **GREEDY)

    expected = run()
    with compressor.attached(model):
        found = run()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
