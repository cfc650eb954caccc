"""What a cache chooses, against slow scores of the text itself: nothing that the cache keeps is looked at to judge it.

The oracle replays recorded choices, right or wrong. Here every choice is made again from all keys and queries of the text.
"""

import pytest
import torch

from kvcompress.cache import Choosing
from kvcompress.cache.choosing_layer import ChoosingLayer
from kvcompress.cache.layer import Shared
from kvcompress.cache.rotation import Rotation
from kvcompress.retention import Retention
from kvcompress.scores import SCORES, Held, Received, make_score
from tests.slow_scores import Slow

BATCH, HEADS, GROUP, SIZE, LENGTH, PROMPT, SCALE = 2, 2, 2, 12, 46, 23, 0.7
ROTATION = Rotation(8, 100.0)
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

    def __init__(self, kept: Retention, choosing: Choosing, batch: int, head: int) -> None:
        query, keys, values = text()
        own = slice(head * GROUP, (head + 1) * GROUP)
        self.query, self.keys, self.values = query[batch, own], keys[batch, head], values[batch, head]
        self.kept, self.choosing, self.score = kept, choosing, choosing.score(kept.score)
        self.every = min(choosing.every, kept.window)
        self.chosen: list[int] = list(range(kept.sinks, kept.sinks + kept.chosen))
        self.last = 0  # column of the choice before
        self.sums: dict[int, tuple[float, float]] = {}

    def follow(self, column: int, prompt: bool, chosen: list[int]) -> None:
        """See that these are the best when `column` columns were seen, of all of them at the end of a prompt."""
        sinks, window, count, name = self.kept
        held = list(range(column)) if prompt else sorted({*range(sinks), *self.chosen, *range(column - window, column)})
        stays = [place < sinks or place >= column - window + self.every for place in held]
        asked = column if prompt else min(self.choosing.observe, column)
        if name == "accumulated_attention" and not prompt:
            asked = min(asked, column - self.last)
        sums = torch.tensor([self.sums.get(place, (0.0, 0.0)) for place in held])
        found = Held(
            self.keys[None, None, held],
            self.values[None, None, held],
            torch.tensor(held)[None, None],
            SCALE,
            self.query[None, :, column - asked : column],
            torch.arange(column - asked, column)[None],
            ROTATION,
            stays=torch.tensor(stays)[None, None],
            earlier=Received(sums[None, None, :, 0], sums[None, None, :, 1]),
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
        self.chosen, self.last = chosen, column


@pytest.mark.parametrize("every", [3, 7])
@pytest.mark.parametrize("observe", [2, 9])
@pytest.mark.parametrize(
    ("prefill", "chunks"), [("streaming", [17, 9, 1, 15, 1, 1, 1, 1]), ("exact", [PROMPT] + [1] * 23)]
)
@pytest.mark.parametrize("name", SCORES)
def test_every_choice_is_that_of_the_slow_score(name, prefill, chunks, observe, every):
    kept = Retention(2, 6, 4, name)
    scores = {other: make_score(other, **parameters) for other, parameters in OTHERS.items()}
    choosing = Choosing(every, observe, scores, ROTATION)
    layer, record = ChoosingLayer([kept] * HEADS, Shared(prefill, choosing=choosing)), []
    layer.record_choices(record)
    query, keys, values = text()
    begin = 0
    for new in chunks:
        part = slice(begin, begin + new)
        layer.attend(query[:, :, part], keys[:, :, part], values[:, :, part], SCALE, 0.0)
        begin += new
    assert begin == LENGTH
    assert len(record) >= 4
    for batch in range(BATCH):
        for head in range(HEADS):
            judge = Judge(kept, choosing, batch, head)
            for i, choice in enumerate(record):
                judge.follow(choice.column, prefill == "exact" and i == 0, choice.chosen[batch, head].tolist())
