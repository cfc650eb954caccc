"""Prices of chosen keys, against masks written out key by key, and against what the cache itself chooses."""

from typing import Any

import pytest
import torch

import kvcompress.sensitivity.fact_price as fact_price
from kvcompress.cache.dispatch import attached
from kvcompress.methods.head_aware_compress import HeadAwareCompressor
from kvcompress.models.rotary import Rotation
from kvcompress.scores.selection_rule import SelectionRule
from kvcompress.sensitivity.attention_hook import LayerAttention, attention_hook
from kvcompress.sensitivity.fact_price import fact_prices
from kvcompress.sensitivity.params import SensitivityParams
from kvcompress.sensitivity.prices import SelectOption
from kvcompress.sensitivity.selection_outputs import STEP, changes_along, select_options, selected_keys
from kvcompress.sensitivity.text_price import text_prices
from tests.reference.recorded_selections import recorded_choices
from tests.tiny import tiny_model

SINKS, LENGTH = 2, 300
OPTIONS = [SelectOption("key_norm", 0.5, 128), SelectOption("key_diff", 0.25, 100), SelectOption("key_norm", 0.7, 250)]


def tensors(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(4, LENGTH, 8, generator=generator)
    return query, *torch.randn(2, 2, LENGTH, 8, generator=generator).unbind(0)


def slow_rank(score: str, keys: torch.Tensor) -> list[float]:
    """Of one head's keys `[key, head_dim]`."""
    if score == "key_norm":
        return [-float(key.norm()) for key in keys]
    anchor = torch.stack([key / key.norm() for key in keys]).mean(0)
    return [-float((key @ anchor) / (key.norm() * anchor.norm())) for key in keys]


def slow_kept(option: SelectOption, keys: torch.Tensor, query: int) -> set[int]:
    """The keys that the query sees: sinks, the last of the window, and what was chosen at the last whole STEP."""
    kept = set(range(SINKS)) | set(range(query - option.window + 1, query + 1))
    seen = query // STEP * STEP
    if seen:
        ranked = slow_rank(option.score, keys[:seen])
        candidates = range(SINKS, min(seen, seen - option.window + STEP))
        kept |= set(sorted(candidates, key=lambda key: -ranked[key])[: option.selected])
    return {key for key in kept if 0 <= key <= query}


@pytest.mark.parametrize("moment", [0, 1, 3, 4])
def test_changes_are_those_of_a_mask(moment: int) -> None:
    query, key, value = tensors()
    start, stop = moment * STEP, min((moment + 1) * STEP, LENGTH)
    gradient = torch.randn(2, 2, stop - start, 8, generator=torch.Generator().manual_seed(1))
    selected = selected_keys(range(0, LENGTH, STEP), OPTIONS, query, key, value, SINKS, 0.3, None)
    text = query.unflatten(0, (2, 2))[:, :, start:stop], key[:, :stop], value[:, :stop]
    found = changes_along(gradient, *text, [16, 90], SINKS, 0.3, None, OPTIONS, selected[:, :, moment, :stop])
    torch.testing.assert_close(found[:2], changes_along(gradient, *text, [16, 90], SINKS, 0.3))
    for i, option in enumerate(OPTIONS):
        for head in range(2):
            for at in range(start, stop, 7):
                kept = sorted(slow_kept(option, key[head], at))
                rows = query.unflatten(0, (2, 2))[head, :, at]
                few = (rows @ key[head, kept].T * 0.3).softmax(-1) @ value[head, kept]
                full = (rows @ key[head, : at + 1].T * 0.3).softmax(-1) @ value[head, : at + 1]
                expected = ((few - full) * gradient[head, :, at - start]).sum()
                torch.testing.assert_close(found[2 + i, head, at - start], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("score", ["expected_attention", "leverage", "key_diff", "snapkv"])
def test_a_selection_knows_nothing_of_later_tokens(score: str) -> None:
    text, rotation = tensors(), Rotation(8, 1000.0)
    option = SelectOption(score, 0.3, 100)
    (whole,) = selected_keys([0, 128, 192], [option], *text, SINKS, 0.3, rotation)
    (cut,) = selected_keys([128], [option], *(tensor[:, :128] for tensor in text), SINKS, 0.3, rotation)
    assert not whole[:, 0].any()
    assert (whole.sum(-1)[:, 1:] == option.selected).all()
    assert whole[:, 1].nonzero().tolist() == cut[:, 0].nonzero().tolist()
    assert whole[:, 1].nonzero().tolist() != whole[:, 2].nonzero().tolist()


@pytest.mark.parametrize(("score", "same"), [("expected_attention", 1.0), ("key_diff", 1.0), ("leverage", 0.9)])
def test_the_cache_chooses_the_same_at_the_end_of_a_prompt(score: str, same: float) -> None:
    """Leverage is a comparison with all others: there keys of the window, which the cache leaves out, change a few."""
    model = tiny_model("llama")
    ids = torch.randint(5, 200, (1, LENGTH), generator=torch.Generator().manual_seed(2))
    option = SelectOption(score, 0.4, 160)
    compressor = HeadAwareCompressor.from_model_config(
        model.config, "select", sink_size=SINKS, window_size=option.window, select_size=option.selected, score=score,
        selection_rule=SelectionRule(every=STEP),
    )  # fmt: skip
    with torch.no_grad(), attached(model):
        cache = compressor.new_cache(model.config, "exact")
        with recorded_choices(cache) as record:
            model(ids, past_key_values=cache)
    recorder = Recorder()
    with torch.no_grad(), attention_hook(model, recorder):
        model(ids)
    for layer, made in enumerate(record):
        found = selected_keys(
            [LENGTH], [option], *recorder.text[layer], SINKS, recorder.scaling, Rotation.of(model.config)
        )
        for mine, its in zip(found[0, :, 0], made[0].chosen[0].tolist(), strict=True):
            keys = set(mine.nonzero()[:, 0].tolist())
            assert len(keys & set(its)) >= same * option.selected
            assert len(keys) == option.selected


class Recorder:
    """Attention hook that keeps queries, keys and values."""

    def __init__(self) -> None:
        self.text: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def __call__(self, attention: LayerAttention) -> torch.Tensor:
        self.text[attention.layer] = attention.query[0], attention.key[0], attention.value[0]
        self.scaling = attention.scaling
        return attention.output


def test_text_prices_of_windows_are_what_they_are_alone_and_of_all_keys_nothing() -> None:
    model = tiny_model("llama")
    ids = torch.randint(5, 200, (LENGTH,), generator=torch.Generator().manual_seed(1))
    shape = (2, 2)
    options = [
        SelectOption("key_diff", 0.5, 128),
        SelectOption("key_diff", 0.5, 256),
        SelectOption("key_norm", 0.75, 2 * LENGTH),
    ]
    alone, _ = text_prices(model, ids, [16, 64], SINKS, shape, 0)
    found, _ = text_prices(model, ids, [16, 64], SINKS, shape, 0, options, None)
    torch.testing.assert_close(found[:2], alone)
    assert (found[2] > found[3]).all()
    assert found[3].min() > 0
    assert found[4].abs().max() < 1e-8  # window and chosen keys together are the whole text
    assert (found[2] < found[1]).all()  # 64 keys more beside a window of 64


def test_nothing_chosen_loses_all_that_a_head_carries(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    generator = torch.Generator().manual_seed(4)
    context = torch.randint(5, 200, (200,), generator=generator).tolist()
    asked = [(torch.randint(5, 200, (6,), generator=generator).tolist(), [7, 8]), ([9, 10, 11], [12])]
    options = [SelectOption("key_diff", 0.5, 64), SelectOption("key_norm", 0.8, 320)]
    found = fact_prices(model, context, asked, 32, SINKS, (2, 2), 3, options)
    assert found.shape == (2, 3, 2, 2)
    alone = fact_prices(model, context, asked, 32, SINKS, (2, 2), 3)
    torch.testing.assert_close(found[:, :1], alone)
    assert found[:, 2].abs().max() < 1e-6  # all of the context
    assert (found[:, 1] - found[:, 0]).abs().max() > 0.01

    def none(*arguments: Any) -> torch.Tensor:
        return torch.zeros_like(selected_keys(*arguments))

    monkeypatch.setattr(fact_price, "selected_keys", none)
    nothing = fact_prices(model, context, asked, 32, SINKS, (2, 2), 3, options)
    torch.testing.assert_close(nothing[:, 1], nothing[:, 0], rtol=1e-4, atol=1e-6)


def test_what_does_not_fit_is_not_priced() -> None:
    config = tiny_model("llama").config
    params = SensitivityParams(
        choice_scores=["key_diff", "leverage"], choice_parts=[0.5, 0.8], choice_sizes=[128, 256, 512]
    )
    found, rotation = select_options(config, params, 400)
    assert rotation is not None
    assert found == [SelectOption(score, 0.5, size) for score in ("key_diff", "leverage") for size in (128, 256)]
    config.rope_parameters = {**config.rope_parameters, "rope_type": "dynamic", "factor": 2.0}
    found, rotation = select_options(config, params, 400)
    assert rotation is None
    assert {option.score for option in found} == {"key_diff"}
    assert select_options(tiny_model("mistral").config, params, 400)[0] == []
