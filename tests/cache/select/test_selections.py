"""Selections of a cache: the best keys by slow scores of the text, the same for one group or several, really held."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompress.cache.layer import CacheState
from kvcompress.cache.select import exchange
from kvcompress.cache.select.layer import SelectLayer
from kvcompress.core.retention import Retention
from kvcompress.models.rotary import Rotation
from kvcompress.scores.inputs import AttentionTotals, ScoreInputs
from kvcompress.scores.registry import SCORES, make_score
from kvcompress.scores.selection_rule import SelectionRule
from tests.cache.cache_tools import LAYERS, feed, model_of, padded, tokens
from tests.cache.select.select_tools import CHOOSING, select_compressor, select_layers
from tests.reference.recorded_selections import of_head, recorded_choices
from tests.reference.slow_scores import Slow

BATCH, HEADS, GROUP, SIZE, LENGTH, PROMPT, SCALE = 2, 2, 2, 12, 46, 23, 0.7
ROTATION, WORST = Rotation(8, 100.0), float("-inf")
OTHERS = {
    "snapkv": {"window": 5},
    "expected_attention": {"future": 20, "most": 9},
    "leverage": {"chunk": 16, "sketch": 6},
    "accumulated_attention": {"most": 9},
}


def text() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    query = torch.randn(BATCH, HEADS * GROUP, LENGTH, SIZE)
    keys, values = torch.randn(2, BATCH, HEADS, LENGTH, SIZE)
    return query, keys, values


class Judge:
    """One KV head of one row, which goes from choice to choice by itself."""

    def __init__(self, kept: Retention, choosing: SelectionRule, batch: int, head: int) -> None:
        query, keys, values = text()
        own = slice(head * GROUP, (head + 1) * GROUP)
        self.query, self.keys, self.values = query[batch, own], keys[batch, head], values[batch, head]
        self.kept, self.choosing, self.score = kept, choosing, choosing.score(kept.score)
        self.every = min(choosing.every, kept.window)
        self.chosen: list[int] = list(range(kept.sinks, kept.sinks + kept.chosen))
        self.last = 0  # column of the choice before
        self.sums: dict[int, tuple[float, float]] = {}

    def follow(self, column: int, prompt: bool, chosen: list[int], leaving: list[int]) -> None:
        """See that `chosen` are the best when `column` columns were seen, of all of them at the end of a prompt, and that
        of the others the window's stay where they are and the worst lies where the next column goes."""
        sinks, window, count, name = self.kept
        held = list(range(column)) if prompt else sorted({*range(sinks), *self.chosen, *range(column - window, column)})
        stays = [place < sinks or place >= column - window + self.every for place in held]
        asked = column if prompt else min(self.choosing.observe, column)
        if name == "accumulated_attention" and not prompt:
            asked = min(asked, column - self.last)
        sums = torch.tensor([self.sums.get(place, (0.0, 0.0)) for place in held])
        found = ScoreInputs(
            self.keys[None, None, held],
            self.values[None, None, held],
            torch.tensor(held)[None, None],
            SCALE,
            self.query[None, :, column - asked : column],
            torch.arange(column - asked, column)[None],
            ROTATION,
            stays=torch.tensor(stays)[None, None],
            earlier=AttentionTotals(sums[None, None, :, 0], sums[None, None, :, 1]),
        )
        slow = Slow(found)
        scores = slow.answer(name, self.score)[0, 0].tolist()
        if name == "accumulated_attention":
            total, number = slow.attention(0, 0, slow.at_most(self.score.most))
            before = [self.sums.get(place, (0.0, 0.0)) for place in held]
            self.sums = {place: (total[i] + before[i][0], number[i] + before[i][1]) for i, place in enumerate(held)}
        free = {place: score for score, place, stay in zip(scores, held, stays, strict=True) if not stay}
        assert len(set(chosen)) == count < len(free)
        assert set(chosen) <= set(free)
        left = max(free[place] for place in free if place not in chosen)
        assert min(free[place] for place in chosen) >= left - 1e-5  # neighbours may be pooled to the same score
        oldest = range(column - window, column - window + self.every)
        enter = [place for place in oldest if place in chosen]
        out = [after for place, after in zip(oldest, leaving, strict=True) if place in chosen]
        assert [after for after in leaving if after not in out] == [place for place in oldest if place not in enter]
        older = [place for place in free if place < oldest[0]] if prompt else self.chosen
        assert set(out) <= set(older) - set(chosen)
        gone = [free[place] for place in older if place not in chosen and place not in out]
        assert len(out) == len(enter)
        assert all(free[place] >= max(gone, default=WORST) - 1e-5 for place in out)
        assert all(free[first] <= free[then] + 1e-5 for first, then in pairwise(out))
        self.chosen, self.last = chosen, column


@pytest.mark.parametrize("every", [3, 7])
@pytest.mark.parametrize("observe", [2, 9])
@pytest.mark.parametrize(
    ("prefill", "chunks"), [("streaming", [17, 9, 1, 15, 1, 1, 1, 1]), ("exact", [PROMPT] + [1] * 23)]
)
@pytest.mark.parametrize(("shift", "beside"), list(enumerate([(2, 6, 4), (2, 6, 9), (0, 9, 7), (1, 5, 2)])))
@pytest.mark.parametrize("name", SCORES)
def test_every_choice_is_that_of_the_slow_score(name, shift, beside, prefill, chunks, observe, every):
    """`beside` is what the other head of the layer keeps, by a score some places further on."""
    names = list(SCORES)
    kept = [Retention(2, 6, 4, name), Retention(*beside, names[(names.index(name) + shift) % len(names)])]
    scores = {other: make_score(other, **parameters) for other, parameters in OTHERS.items()}
    choosing = SelectionRule(every, observe, scores, ROTATION)
    layer, record = SelectLayer(kept, CacheState(prefill, selection_rule=choosing)), []
    layer.record_selections(record)
    query, keys, values = text()
    begin = 0
    for new in chunks:
        part = slice(begin, begin + new)
        layer.attend(query[:, :, part], keys[:, :, part], values[:, :, part], SCALE, 0.0)
        begin += new
    assert begin == LENGTH
    for head in range(HEADS):
        choices = of_head(record, head)
        assert len(choices) >= 4
        for batch in range(BATCH):
            judge = Judge(kept[head], choosing, batch, head)
            for i, (column, chosen, leaving) in enumerate(choices):
                whole = prefill == "exact" and i == 0
                judge.follow(column, whole, chosen[batch].tolist(), leaving[batch].tolist())


def decoded(model, layers, prefill, pads, rows=None):
    """Logits, choices and cache of a prompt and single tokens after it."""
    compressor = select_compressor(model, layers)
    ids, mask = padded(3, 38) if pads else (tokens(3, 38), None)
    with compressor.attached(model), torch.inference_mode():
        cache = compressor.new_cache(model.config, prefill)
        with recorded_choices(cache) as choices:
            logits = feed(model, cache, ids, [25] + [1] * 13, mask)
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
    for one, other_one in zip(together, alone, strict=True):
        assert (one.column, one.heads) == (other_one.column, other_one.heads)
        assert torch.equal(one.chosen, other_one.chosen)
        assert torch.equal(one.leaving, other_one.leaving)
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


SOME_SCORES = st.sampled_from(["key_norm", "key_diff", "snapkv", "accumulated_attention"])
chosen = st.builds(Retention, st.integers(0, 4), st.integers(1, 8), st.integers(1, 9), SOME_SCORES)
windows = st.builds(Retention, st.integers(0, 4), st.integers(1, 8), st.just(0), st.just(""))
heads = st.lists(st.one_of(chosen, windows), min_size=1, max_size=3).filter(lambda kept: any(k.chosen for k in kept))
chunks = st.lists(st.integers(1, 20), min_size=1, max_size=7)


@settings(max_examples=80, deadline=None)
@given(
    heads=heads,
    chunks=chunks,
    pads=st.lists(st.integers(0, 25), min_size=1, max_size=3),
    prefill=st.sampled_from(["exact", "streaming"]),
    rule=st.builds(SelectionRule, st.integers(1, 9), st.integers(1, 5)),
)
def test_positions_held(heads, chunks, pads, prefill, rule):
    shared = CacheState(prefill, selection_rule=rule)
    shared.padding.set(torch.tensor(pads) if any(pads) else None)
    layer = SelectLayer(heads, shared)
    generator = torch.Generator().manual_seed(sum(chunks))
    batch, seen = len(pads), 0
    for new in chunks:
        # Next to random numbers a key holds its own position: what lies in the storage can then be read off.
        place = (torch.arange(seen, seen + new) - torch.tensor(pads)[:, None]).float()
        keys = torch.randn(batch, len(heads), new, 4, generator=generator)
        keys[..., 0] = place[:, None] / 64
        layer.attend(torch.randn(batch, len(heads), new, 4, generator=generator), keys, -keys, None, 0.0)
        seen += new
        for row, pad in enumerate(pads):
            real = max(seen - pad, 0)
            found = layer.positions(row)
            for kept, held, stored in zip(heads, found, stored_in(layer, row), strict=True):
                assert stored == held
                assert len(set(held)) == len(held) == min(real, kept.capacity)
                assert set(kept.positions(real)) <= set(held) <= set(range(real))
    assert layer.held() == [kept.held(seen) for kept in heads]
    assert all(group.block.slots <= group.capacity for group in layer.groups)


def stored_in(layer, row):
    """The positions of the keys that lie in the slots that count, read from the storage, ascending, head by head."""
    found = [[] for _ in range(layer.heads)]
    for group in layer.groups:
        keys, values = group.read()
        counts = group.positions(layer.shared.padding, torch.device("cpu"))
        assert torch.equal(keys, -values)
        for index, head in enumerate(group.heads):
            found[head] = sorted((64 * keys[row, index, counts[row if len(counts) > 1 else 0] >= 0, 0]).int().tolist())
    return found
