"""A prompt's keys are chosen while later layers compute: slow as the choice may be, nobody reads too early."""

import copy

import pytest
import torch

from kvcompress.cache.select.prefill import choose_of_prompt
from kvcompress.methods.compressor import Compressor
from tests.cache.cache_tools import model_of, tokens
from tests.cache.select.select_tools import CHOOSING, select_compressor, select_layers

PROMPT, WHOLE = 30, 44
SLEEP = 100_000_000  # cycles, some fifty milliseconds: longer than a pass of a tiny model


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(*args):
        torch.cuda._sleep(SLEEP)
        choose_of_prompt(*args)
        torch.cuda._sleep(SLEEP)

    monkeypatch.setattr("kvcompress.cache.select.layer.choose_of_prompt", slowly)


def answers(compressor: Compressor, model, ids, pieces: list[int]) -> tuple[torch.Tensor, list]:
    """Logits of the text read in pieces, and the positions that every head holds after each of them."""
    found, held, begin = [], [], 0
    with compressor.attached(model), torch.inference_mode():
        cache = compressor.new_cache(model.config, "exact", prompt_length=PROMPT)
        for length in pieces:
            piece = ids[:, begin : begin + length].to(model.device)
            found.append(model(piece, past_key_values=cache).logits)
            held.append([layer.positions() for layer in cache.compressed_layers])
            begin += length
    return torch.cat(found, 1).cpu(), held


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("pieces", [[PROMPT, 1, 13], [17, 13, 14], [PROMPT + 5, 9]])
@pytest.mark.parametrize("score", ["key_norm", "expected_attention", "accumulated_attention"])
def test_a_slow_choice_is_waited_for(slow, score, pieces):
    model, ids = model_of("llama"), tokens(2, WHOLE)
    compressor = select_compressor(model, select_layers(model, score), CHOOSING)
    expected, there = answers(compressor, model, ids, pieces)
    found, held = answers(compressor, copy.deepcopy(model).to("cuda"), ids, pieces)
    assert held == there
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
