"""Selection at the end of a prompt, for all heads of a layer at once.

The heads of a layer may keep different numbers of keys and use different scores. Group by group, a selection takes about
a hundred small operations each, and a layer with many groups takes the host longer than a GPU needs for the next layer.
So each score looks at all heads that use it, one sort ranks all heads, and only gathering the kept keys is left to each
group. The algorithm is that of unpadded rows; the rows of a padded batch take it one by one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from kvcompress.cache.select.exchange import select
from kvcompress.cache.select.head_group import SelectGroup
from kvcompress.cache.select.records import SelectionInputs
from kvcompress.scores.base import Score
from kvcompress.scores.inputs import AttentionTotals, ScoreInputs
from kvcompress.scores.topk import ranking


def select_in_prompt(groups: Sequence[SelectGroup], keys: Tensor, values: Tensor, inputs: SelectionInputs) -> None:
    """Store a prompt of all heads of a layer, `[batch, kv_head, column, head_dim]`, in empty groups, and select.

    Every group has fewer slots than there are columns. Groups with the same score must be adjacent.
    """
    if not inputs.padding.longest:
        for group in groups:
            group.expect(keys, values)
        PromptSelection.of(groups, keys, values, inputs).fill(keys.shape[2])
    else:
        for group in groups:
            index = group.index(keys.device)
            group.append(keys[:, index], values[:, index], inputs.padding)
            select([group], [inputs.of_heads(index)])
        # So far all rows hold sinks and window, with the best of these selected. A row with more tokens than slots
        # selects among all its tokens.
        for row, pads in enumerate(inputs.padding.rows):
            length = keys.shape[2] - pads
            short_of_slots = [group for group in groups if group.capacity is not None and length > group.capacity]
            if short_of_slots:
                of_row = keys[row : row + 1, :, pads:], values[row : row + 1, :, pads:]
                selection = PromptSelection.of(short_of_slots, *of_row, inputs.of_row(row, length))
                selection.fill(keys.shape[2], row)
    for group in groups:
        group.close_selection()


def take_heads(tensor: Tensor, heads: Sequence[int]) -> Tensor:
    """Return these heads of `[batch, head, ...]`; a view if they are adjacent."""
    starts = [i for i, head in enumerate(heads) if not i or head != heads[i - 1] + 1]
    ends = [*starts[1:], len(heads)]
    runs = [tensor[:, heads[i] : heads[i] + end - i] for i, end in zip(starts, ends, strict=True)]
    return runs[0] if len(runs) == 1 else torch.cat(runs, 1)


@dataclass(frozen=True)
class PromptSelection:
    """Selection of several groups among all keys of unpadded rows.

    `heads` lists the groups' heads in order; `keys` and `values` are those of these heads, `inputs` those of the layer.
    """

    groups: Sequence[SelectGroup]
    heads: Sequence[int]
    keys: Tensor
    values: Tensor
    inputs: SelectionInputs

    @classmethod
    def of(
        cls, groups: Sequence[SelectGroup], keys: Tensor, values: Tensor, inputs: SelectionInputs
    ) -> "PromptSelection":
        """Take the groups' heads out of a layer's keys and values, `[batch, kv_head, column, head_dim]`."""
        heads = [head for group in groups for head in group.heads]
        return cls(groups, heads, take_heads(keys, heads), take_heads(values, heads), inputs)

    def fill(self, columns: int, row: int | None = None) -> None:
        """Fill the groups, all rows or row `row`, after `columns` columns, the pads of the row among them."""
        seen, device = self.keys.shape[2], self.keys.device
        numbers = [(*group.requested[:3], group.every) for group in self.groups for _ in group.heads]
        # [head, 1] each
        sinks, window, chosen, every = torch.tensor(numbers).T[..., None].to(device, non_blocking=True)
        places = torch.arange(seen, device=device)
        since = seen - window  # where the window begins
        stays = ((places < sinks) | (places >= since + every))[None]
        scores, received = self._score(places[None, None], stays)
        near = max(group.requested.chosen + group.every for group in self.groups)  # ranks that decide everything
        order = ranking(scores, stays)[..., :near]
        taken = torch.zeros_like(scores, dtype=torch.bool).scatter_(
            -1, order, (places[:near] < chosen).expand_as(order)
        )
        # The oldest of the window leave next. For the i-th of them that is taken, the i-th worst older key leaves.
        oldest = since + places[: max(group.every for group in self.groups)]
        oldest = oldest.clamp_max(seen - 1).expand(len(order), -1, -1)
        enters = taken.gather(-1, oldest)
        worst = torch.searchsorted((order < since).cumsum(-1), chosen + 1 - enters.cumsum(-1)).clamp_max(near - 1)
        leaving = torch.where(enters, order.gather(-1, worst), oldest)
        for group, part, of_group in zip(self.groups, self._parts(), received, strict=True):
            (first, size, keep, _), r = group.requested, group.every
            shape = len(order), len(group.heads), -1
            ring = torch.cat((leaving[:, part, :r], places[seen - size + r :].expand(shape)), -1)
            turn = (first + keep - columns) % size  # the oldest lies in the slot of the column after the prompt
            pieces = places[:first].expand(shape), order[:, part, :keep], ring[..., turn:], ring[..., :turn]
            source = torch.cat(pieces, -1)
            group.hold(self.keys[:, part], self.values[:, part], source, of_group and of_group.take(source), row)

    def _parts(self) -> Iterator[slice]:
        end = 0
        for group in self.groups:
            begin, end = end, end + len(group.heads)
            yield slice(begin, end)

    def _score(self, places: Tensor, stays: Tensor) -> tuple[Tensor, list[AttentionTotals | None]]:
        """Return scores `[batch, head, column]`, and the attention that each group's keys received."""
        scores, received = [], []
        for score, members in groupby(zip(self.groups, self._parts(), strict=True), lambda member: member[0].score):
            parts = [part for _, part in members]
            inputs = self.score_inputs(score, slice(parts[0].start, parts[-1].stop), places, stays)
            found, begin = score.received(inputs), parts[0].start
            scores.append(score.of_candidates(inputs, found))
            for part in parts:
                of = slice(part.start - begin, part.stop - begin)
                received.append(found and AttentionTotals(found.total[:, of], found.queries[:, of]))
        return scores[0] if len(scores) == 1 else torch.cat(scores, 1), received

    def score_inputs(self, score: Score, part: slice, places: Tensor, stays: Tensor) -> ScoreInputs:
        """Return the inputs of a score for some of the heads; `places` `[1, 1, column]`, `stays` `[1, head, column]`."""
        queries, at, asked, seen = None, None, None, self.keys.shape[2]
        if score.needs_queries:
            every_query = self.inputs.queries
            assert every_query is not None
            some = score.looks_at(every_query.shape[3])
            queries = take_heads(every_query[:, :, :, some], self.heads[part]).flatten(1, 2)
            asked = range(seen - every_query.shape[3], seen)[some]
            at = places[0, :, asked.start : asked.stop : asked.step]
        return ScoreInputs(
            self.keys[:, part],
            self.values[:, part],
            places,
            self.inputs.scaling,
            queries,
            at,
            self.inputs.rotation,
            stays=stays[:, part],
            in_order=True,
            query_range=asked,
        )
