"""Streaming past the context: windows, bytes, and positions inside the cache."""

import numpy as np
import torch

from kvcompress.evaluation.beyond import WINDOW, beyond_contenders, stream
from tests.tiny import VOCABULARY, tiny_model


def test_windows_hold_the_mean_of_their_tokens() -> None:
    model = tiny_model("llama")  # its trained context is 512 tokens
    tokens = torch.randint(0, VOCABULARY, (2 * WINDOW + 1,), generator=torch.Generator().manual_seed(0))
    contenders = beyond_contenders(model.config, None, 32)
    rows = stream(model, tokens, contenders, 64, progress=False)
    assert [row["tokens"] for row in rows] == [WINDOW, 2 * WINDOW] * 3
    assert all(np.isfinite(row["nll"]) for row in rows)
    assert {row["nbytes"] for row in rows} == {2 * 2 * 32 * 2 * 8 * 4}
    name, compressor = next(iter(contenders.items()))
    with torch.inference_mode(), compressor.attached(model):
        cache = compressor.new_cache(model.config, "streaming")
        losses = []
        for i in range(2 * WINDOW):  # token by token, the slow way
            logits = model(tokens[None, i : i + 1], past_key_values=cache).logits[0, -1]
            losses.append(float(torch.nn.functional.cross_entropy(logits, tokens[i + 1])))
    mine = [row["nll"] for row in rows if row["name"] == name]
    np.testing.assert_allclose(mine, [np.mean(losses[:WINDOW]), np.mean(losses[WINDOW:])], atol=2e-3)
