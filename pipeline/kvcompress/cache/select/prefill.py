"""The choice at the end of a prompt, of all heads of a layer at once.

Heads of one layer may keep different numbers of keys and go by different scores. To choose group by group takes a hundred
small operations for each, and where a layer has many groups the host cannot launch them as fast as a GPU computes the next
layer. So every score looks at all heads that go by it, one sort ranks all heads, and only the gathering of what is kept is
left to each group. It serves texts without pads; with them a group chooses for itself (`choose_of_padded_prompt`), and a
row that has none has to come to the same, among keys whose scores differ.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from kvcompress.cache.select.head_group import ChoosingGroup
from kvcompress.cache.select.types import Evidence
from kvcompress.scores.base import Score
from kvcompress.scores.inputs import AttentionTotals, ScoreInputs
from kvcompress.scores.topk import ranking


def choose_of_prompt(groups: Sequence[ChoosingGroup], keys: Tensor, values: Tensor, evidence: Evidence) -> None:
    """Fill groups that are empty and have fewer slots than there are columns, `[batch, kv_head, column, head_dim]`.

    keys, values, evidence: those of all heads of the layer. Groups with the same score have to follow each other.
    """
    heads = [head for group in groups for head in group.heads]
    Prompt(groups, heads, side_by_side(keys, heads), side_by_side(values, heads), evidence).choose()


def side_by_side(tensor: Tensor, heads: Sequence[int]) -> Tensor:
    """These heads of `[batch, head, ...]`, side by side."""
    first = [i for i, head in enumerate(heads) if not i or head != heads[i - 1] + 1]
    ends = [*first[1:], len(heads)]
    runs = [tensor[:, heads[i] : heads[i] + end - i] for i, end in zip(first, ends, strict=True)]
    return runs[0] if len(runs) == 1 else torch.cat(runs, 1)


@dataclass(frozen=True)
class Prompt:
    """What a choice of these groups is made from: K and V of their heads, `heads`, side by side in the groups' order, and
    the evidence of the whole layer."""

    groups: Sequence[ChoosingGroup]
    heads: Sequence[int]
    keys: Tensor
    values: Tensor
    evidence: Evidence

    def choose(self) -> None:
        """Fill the groups."""
        seen, device = self.keys.shape[2], self.keys.device
        sinks, window, chosen, every = self._numbers().to(device, non_blocking=True)
        columns = torch.arange(seen, device=device)
        since = seen - window  # from here on the window
        stays = ((columns < sinks) | (columns >= since + every))[None]
        scores, received = self._score(columns[None, None], stays)
        near = max(group.wanted.chosen + group.every for group in self.groups)  # ranks in which all is settled
        order = ranking(scores, stays)[..., :near]
        taken = torch.zeros_like(scores, dtype=torch.bool).scatter_(
            -1, order, (columns[:near] < chosen).expand_as(order)
        )
        # The oldest of the window, which go next. For the i-th of them that is taken the i-th worst older key goes.
        oldest = since + columns[: max(group.every for group in self.groups)]
        oldest = oldest.clamp_max(seen - 1).expand(len(order), -1, -1)
        enters = taken.gather(-1, oldest)
        worst = torch.searchsorted((order < since).cumsum(-1), chosen + 1 - enters.cumsum(-1)).clamp_max(near - 1)
        leaving = torch.where(enters, order.gather(-1, worst), oldest)
        for group, part, earlier in zip(self.groups, self._parts(), received, strict=True):
            (first, size, keep, _), r = group.wanted, group.every
            shape = len(order), len(group.heads), -1
            ring = torch.cat((leaving[:, part, :r], columns[seen - size + r :].expand(shape)), -1)
            turn = (first + keep - seen) % size  # the oldest lies where the column after the prompt will
            pieces = columns[:first].expand(shape), order[:, part, :keep], ring[..., turn:], ring[..., :turn]
            source = torch.cat(pieces, -1)
            group.hold(self.keys[:, part], self.values[:, part], source, earlier and earlier.take(source))

    def _numbers(self) -> Tensor:
        """What every head keeps and how often it chooses, `[4, head, 1]`."""
        numbers = [(*group.wanted[:3], group.every) for group in self.groups for _ in group.heads]
        return torch.tensor(numbers).T[..., None]

    def _parts(self) -> Iterator[slice]:
        end = 0
        for group in self.groups:
            begin, end = end, end + len(group.heads)
            yield slice(begin, end)

    def _score(self, places: Tensor, stays: Tensor) -> tuple[Tensor, list[AttentionTotals | None]]:
        """Scores `[batch, head, column]`, and what each group's keys received."""
        scores, received = [], []
        for score, members in groupby(zip(self.groups, self._parts(), strict=True), lambda member: member[0].score):
            parts = [part for _, part in members]
            held = self.held(score, slice(parts[0].start, parts[-1].stop), places, stays)
            found, begin = score.received(held), parts[0].start
            scores.append(score.of_candidates(held, found))
            for part in parts:
                of = slice(part.start - begin, part.stop - begin)
                received.append(found and AttentionTotals(found.total[:, of], found.queries[:, of]))
        return scores[0] if len(scores) == 1 else torch.cat(scores, 1), received

    def held(self, score: Score, part: slice, places: Tensor, stays: Tensor) -> ScoreInputs:
        """What a score is given of these heads; `places` `[1, 1, column]`, `stays` `[1, head, column]`."""
        queries, at, stand, seen = None, None, None, self.keys.shape[2]
        if score.needs_queries:
            asked = self.evidence.queries
            assert asked is not None
            some = score.looks_at(asked.shape[3])
            queries = side_by_side(asked[:, :, :, some], self.heads[part]).flatten(1, 2)
            stand = range(seen - asked.shape[3], seen)[some]
            at = places[0, :, stand.start : stand.stop : stand.step]
        return ScoreInputs(
            self.keys[:, part],
            self.values[:, part],
            places,
            self.evidence.scaling,
            queries,
            at,
            self.evidence.rotation,
            stays=stays[:, part],
            in_order=True,
            query_range=stand,
        )
