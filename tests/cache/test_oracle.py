"""Mask oracle: the cache agrees with it in however many passes a text is fed, on the CPU and on a GPU."""

import copy

import pytest
import torch
from transformers import DynamicCache

from kvcompress.cache import attend
from kvcompress.cache.head_group import HeadGroup
from kvcompress.cache.padding import Padding
from kvcompress.cache.storage import Meter
from kvcompress.core.retention import FULL, Retention
from tests.cache.cache_tools import (
    FAMILIES,
    PLANS,
    compressor_for,
    feed,
    inputs_for,
    model_of,
    padded,
    plan_for,
    real,
    tokens,
)
from tests.reference.oracle import judged

LENGTH = 33
FEEDS = {"one_shot": [LENGTH], "chunks": [11, 9, 1, 8], "token_by_token": [1]}


def oracle(model, plan, ids, mask, prompt_length=None):
    prefill = "exact" if prompt_length else "streaming"
    with judged(model, plan_for(model, plan), prefill, prompt_length):
        return model(ids, use_cache=False, **inputs_for(mask, 0, ids.shape[1])).logits


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", FAMILIES)
def test_streaming_agrees_with_the_oracle(family, plan, batch):
    model = model_of(family)
    ids, mask = (tokens(1, LENGTH), None) if batch == 1 else padded(batch, LENGTH)
    expected = real(oracle(model, plan, ids, mask), mask)
    compressor = compressor_for(model, plan)
    with compressor.attached(model):
        for name, chunks in FEEDS.items():
            found = real(feed(model, compressor.new_cache(model.config, prefill="streaming"), ids, chunks, mask), mask)
            assert (found - expected).abs().max() < 1e-5, name


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_agrees_with_the_oracle(family, plan, batch):
    model = model_of(family)
    ids, mask = (tokens(1, LENGTH), None) if batch == 1 else padded(batch, LENGTH)
    compressor = compressor_for(model, plan)
    with compressor.attached(model):
        for name, chunks in FEEDS.items():
            # The prompt is the first pass.
            found = real(feed(model, compressor.new_cache(model.config), ids, chunks, mask), mask)
            expected = real(oracle(model, plan, ids, mask, chunks[0]), mask)
            assert (found - expected).abs().max() < 1e-5, name
        # With a prompt_length it may come in several; the third chunk ends it.
        cache = compressor.new_cache(model.config, prompt_length=21)
        found = real(feed(model, cache, ids, FEEDS["chunks"], mask), mask)
        assert (found - real(oracle(model, plan, ids, mask, 21), mask)).abs().max() < 1e-5


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_agrees_with_the_oracle(family, plan):
    model = model_of(family, torch.bfloat16)
    ids, mask = padded(2, LENGTH)
    compressor = compressor_for(model, plan)
    expected = real(oracle(model, plan, ids, mask), mask).float()
    with compressor.attached(model):
        found = real(feed(model, compressor.new_cache(model.config, prefill="streaming"), ids, [20, 1], mask), mask)
    assert ((found.float() - expected).norm(dim=-1) / expected.norm(dim=-1)).max() < 2e-2


@pytest.mark.parametrize("prefill", ["exact", "streaming"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_full_plan_equals_the_dynamic_cache(family, prefill):
    model = model_of(family)
    for ids, mask in ((tokens(2, LENGTH), None), padded(3, LENGTH)):
        for chunks in FEEDS.values():
            expected = real(feed(model, DynamicCache(config=model.config), ids, chunks, mask), mask)
            compressor = compressor_for(model, "all_full")
            with compressor.attached(model):
                found = real(feed(model, compressor.new_cache(model.config, prefill=prefill), ids, chunks, mask), mask)
            assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("prefill", ["exact", "streaming"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_of_a_padded_batch_equals_its_own_unpadded_run(family, prefill):
    model = model_of(family)
    ids, mask = padded(4, LENGTH)
    compressor = compressor_for(model, "mixed")
    with compressor.attached(model):
        together = feed(model, compressor.new_cache(model.config, prefill=prefill), ids, [22, 1], mask)
        for row in range(4):
            pads = 5 * row
            cache = compressor.new_cache(model.config, prefill=prefill)
            alone = feed(model, cache, ids[row : row + 1, pads:], [22 - pads, 1])
            assert (together[row, pads:] - alone[0]).abs().max() < 1e-5


def test_padding_longer_than_the_first_chunk():
    model = model_of("llama")
    ids, mask = padded(3, LENGTH)  # the last row begins at column 10, in the fourth chunk
    compressor = compressor_for(model, "mixed")
    expected = real(oracle(model, "mixed", ids, mask), mask)
    with compressor.attached(model):
        cache = compressor.new_cache(model.config, prefill="streaming")
        found = real(feed(model, cache, ids, [3, 3, 3, 3, 3, 1], mask), mask)
    assert (found - expected).abs().max() < 1e-5


def test_an_input_of_many_blocks_agrees_with_the_oracle():
    model = model_of("llama")
    model_length = 700  # almost three blocks of queries, with storage that grows on the way
    ids = tokens(1, model_length)
    compressor = compressor_for(model, "mixed")
    expected = oracle(model, "mixed", ids, None)
    with compressor.attached(model):
        for chunks in ([model_length], [300, 1, 399], [520, 1]):
            found = feed(model, compressor.new_cache(model.config, prefill="streaming"), ids, chunks)
            assert (found - expected).abs().max() < 1e-5


def slow_flash(query, keys, values, left, right, scale):
    """What flash attention on a GPU gives: a bound as far away as there are keys is none."""
    left, right = (-1 if bound >= keys.shape[1] else bound for bound in (left, right))
    group = query.shape[2] // keys.shape[2]
    keys, values = (tensor.repeat_interleave(group, dim=2) for tensor in (keys, values))
    scores = torch.einsum("bqhd,bkhd->bhqk", query, keys) * (query.shape[3] ** -0.5 if scale is None else scale)
    place = torch.arange(query.shape[1])[:, None] + keys.shape[1] - query.shape[1]
    at = torch.arange(keys.shape[1])[None]
    hidden = ((at > place + right) & (right >= 0)) | ((at < place - left) & (left >= 0))
    scores = scores.masked_fill(hidden, float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values), scores.logsumexp(-1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("plan", PLANS)
def test_chunks_that_need_no_mask_agree_with_the_oracle(monkeypatch, family, plan):
    """As a GPU reads them: by an attention that knows where the last columns stand, and one that knows a window."""
    used, windowed = [], []
    monkeypatch.setattr(attend, "flash_serves", lambda *_: used.append(1) or True)
    monkeypatch.setattr("kvcompress.cache.flash_window.flash", lambda *a: windowed.append(1) or slow_flash(*a))
    model, ids = model_of(family), tokens(2, LENGTH)
    expected = oracle(model, plan, ids, None)
    compressor = compressor_for(model, plan)
    with compressor.attached(model):
        for chunks in [*FEEDS.values(), [1, 2, 3, 5, 22], [3, 17, 2], [20, 13]]:
            found = feed(model, compressor.new_cache(model.config, prefill="streaming"), ids, chunks)
            assert (found - expected).abs().max() < 1e-5
    held = any(not kept.pruned for layer in plan_for(model, plan) for kept in layer)
    if held and family != "mistral":  # whose layers all have a window of their own
        assert used
        assert windowed or plan in ("all_full", "window_beyond_text")


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@needs_cuda
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_agrees_with_the_oracle(family, plan, dtype):
    model = copy.deepcopy(model_of(family)).to("cuda", dtype)
    ids, mask = (tensor.cuda() for tensor in padded(3, LENGTH))
    with torch.inference_mode(), judged(model, plan_for(model, plan), "streaming"):
        expected = real(model(ids, use_cache=False, **inputs_for(mask, 0, LENGTH)).logits, mask).float()
    compressor = compressor_for(model, plan)
    for chunks in ([LENGTH], [11, 9, 1, 8], [1]):
        with torch.inference_mode(), compressor.attached(model):
            cache = compressor.new_cache(model.config, prefill="streaming")
            found = real(feed(model, cache, ids, chunks, mask), mask).float()
        assert ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max() < TOLERANCE[dtype]


@needs_cuda
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", ["gpt_neox", "llama", "qwen3", "mistral"])
def test_cuda_reads_unpadded_chunks_as_the_oracle_does(monkeypatch, family, plan, dtype):
    """Without padding chunks of full heads need no mask, and bounded heads are read in larger blocks."""
    monkeypatch.setattr(attend, "LARGE_BLOCK", 16)
    model = copy.deepcopy(model_of(family)).to("cuda", dtype)
    ids = tokens(2, 100).cuda()
    with torch.inference_mode(), judged(model, plan_for(model, plan), "streaming"):
        expected = model(ids, use_cache=False).logits.float()
    compressor = compressor_for(model, plan)
    for chunks in ([100], [40, 33, 1, 26]):
        with torch.inference_mode(), compressor.attached(model):
            found = feed(model, compressor.new_cache(model.config, prefill="streaming"), ids, chunks).float()
        assert ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max() < TOLERANCE[dtype]


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kept", [Retention(4, 300), Retention(0, 64), Retention(7, 1), FULL])
@pytest.mark.parametrize(("of_head", "size"), [(4, 128), (1, 80), (3, 64)])
def test_cuda_reads_long_chunks_as_the_cpu_does(kept, of_head, size, dtype):
    torch.manual_seed(0)
    groups = [HeadGroup(kept, range(2), Meter()) for _ in range(2)]
    how = attend.AttendOptions(Padding(), None)
    for new in (1000, 37, 2, 500):
        query = torch.randn(2, 2, of_head, new, size).to(dtype)
        keys, values = torch.randn(2, 2, 2, new, size).to(dtype)
        expected = attend.attend_group(groups[0], query.float(), keys.float(), values.float(), how)
        found = attend.attend_group(groups[1], query.cuda(), keys.cuda(), values.cuda(), how).float().cpu()
        assert (found - expected).norm() / expected.norm() < 5e-3


@needs_cuda
def test_cuda_generates_as_the_cpu_does():
    model = model_of("llama")
    compressor = compressor_for(model, "mixed")
    ids, mask = padded(3, 20)
    found = []
    for device in ("cpu", "cuda"):
        moved = copy.deepcopy(model).to(device)
        with compressor.attached(moved):
            cache = compressor.new_cache(moved.config)
            out = moved.generate(
                ids.to(device), attention_mask=mask.to(device), past_key_values=cache, max_new_tokens=24
            )
        found.append(out.cpu())
    assert torch.equal(*found)
