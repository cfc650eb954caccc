"""The central test on a GPU, in the precisions that models are served in."""

import copy

import pytest
import torch

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

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
LENGTH = 33
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


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
