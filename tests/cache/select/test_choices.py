"""What a cache chooses, against slow scores of the text itself: nothing that the cache keeps is looked at to judge it.

The oracle replays recorded choices, right or wrong. Here every choice is made again from all keys and queries of the text.
"""

from itertools import pairwise

import pytest
import torch

from kvcompress.cache.layer import CacheState
from kvcompress.cache.select.layer import SelectLayer
from kvcompress.core.retention import Retention
from kvcompress.models.rotary import Rotation
from kvcompress.scores.inputs import AttentionTotals, ScoreInputs
from kvcompress.scores.registry import SCORES, make_score
from kvcompress.scores.selection_rule import SelectionRule
from tests.reference.recorded import of_head
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
