"""A long text with a bounded cache: memory stays the same, logits stay finite, also past the trained context."""

import pytest
import torch

from kvcompress.methods import StreamingLLMCompressor
from tests.tiny import tiny_model


@pytest.mark.parametrize("positions", ["original", "cache"])
@torch.no_grad()
def test_a_long_text_takes_no_more_memory(positions: str) -> None:
    model = tiny_model("llama")  # trained on 512 positions
    compressor = StreamingLLMCompressor(4, 60, positions=positions)
    cache = compressor.new_cache(model.config, "streaming")
    token, sizes = torch.zeros(1, 1, dtype=torch.long), set()
    generator = torch.Generator().manual_seed(0)
    with compressor.attached(model):
        for step in range(700):
            logits = model(token, past_key_values=cache, use_cache=True).logits[:, -1:]
            assert logits.isfinite().all()
            token = torch.multinomial(logits[0].softmax(-1), 1, generator=generator)
            if step >= 200:
                sizes.add((cache.nbytes, cache.peak_nbytes))
    assert len(sizes) == 1
    assert cache.seen == 700
